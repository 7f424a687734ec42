"""Rollouts whose controller dies: by kill -9 at points of its own and at random, and as a command on a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from azure_plane.model import mock_model

from llmkit.benchmarks.rollout_kills import HOLDS, kill_figures, rollout_kills
from llmkit.benchmarks.world import World, world
from llmkit.cli.target import Setup, open_backend, ready
from llmkit.core.card import ModelCard
from llmkit.core.registry import get_version, register, set_alias
from llmkit.deployment.backend import RouterBackend
from llmkit.deployment.controller import Controller, begin_rollout
from llmkit.deployment.journal import Book
from llmkit.deployment.plan import Plan
from llmkit.deployment.policy import history
from llmkit.deployment.signals import LogSignals
from llmkit.deployment.state import RolloutState
from llmkit.deployment.traffic import drive
from llmkit.monitoring.requestlog import read_requests
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess

KEY = "an-admins-key"


def test_kills(tmp_path: Path) -> None:
    """Each scenario with three kills at chosen points and one rollout with some at random moments."""
    found = rollout_kills(tmp_path, at_points=2, at_random=1)
    wrong = [r for r in found["rows"] if not all(r[k] for k in HOLDS)]
    figures = kill_figures(found)
    assert not wrong and figures["rollouts"] >= 8, wrong or figures
    assert (figures["wrong"], figures["split_wrong"], figures["looks_after_alarm"]) == (0, 0, 0)
    assert figures["looks"] > 50


@pytest.fixture
def routed(tmp_path: Path) -> Iterator[World]:
    """Routes, users and a log."""
    with world(tmp_path, rate=1000.0) as made:
        yield made
        assert not made.watcher.wrong


PLAN = "stages: [{weight: 0.3, max_requests: 1000000}]\ngates: [errors]\npromote_alpha: 1.0e-250\nratio_alpha: 1.0e-9\n"


class Command:
    """`llmkit rollout WORDS...` for a world."""

    def __init__(self, made: World) -> None:
        self.made, self.env = made, os.environ | {"LLMKIT_ROLLOUTS": str(made.home / "rollouts")}
        self.env |= {"LLMKIT_ADMIN_KEY": "key", "PYTHONUNBUFFERED": "1"}
        (made.home / "plan.yml").write_text(PLAN)

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start it and do not wait."""
        line = [sys.executable, "-m", "llmkit.cli", "rollout", *words]
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(line, env=self.env, text=True, **both)  # type: ignore[call-overload]

    def start(self) -> subprocess.Popen[str]:
        """Start a rollout."""
        made = self.made
        about = ["--server", made.routes.base, "--log", str(made.log), "--plan", str(made.home / "plan.yml")]
        return self.begin("start", "--canary", "new", "--stable", "old", "--every", "0.05s", *about)

    def run(self, *words: str) -> str:
        """What it prints."""
        return self.begin(*words).communicate(timeout=60)[0]

    def book(self) -> Book:
        """The newest rollout's journal."""
        return Book(history(self.made.home / "rollouts")[0].folder)

    def until_looked(self, n: int) -> None:
        """Wait for the controller's n-th look."""
        end = time.monotonic() + 40
        while not (past := history(self.made.home / "rollouts")) or past[0].state.looks < n:
            assert time.monotonic() < end, past
            time.sleep(0.05)


def test_a_command_that_is_killed_is_taken_up(routed: World) -> None:
    """kill -9; a second rollout is refused; orders reach the controller that runs, and one that does not."""
    llmkit = Command(routed)
    first = llmkit.start()
    llmkit.until_looked(2)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert routed.routes.router.routes["llmkit"] == {"old": 0.7, "new": 0.3}
    looks = llmkit.book().read().looks
    assert "has a rollout under way" in llmkit.start().communicate(timeout=60)[0]
    assert len(history(routed.home / "rollouts")) == 1
    second = llmkit.begin("resume")
    llmkit.until_looked(looks + 2)
    assert "is asked of the controller that runs" in llmkit.run("abort", "--why", "the tone is wrong")
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 1 and "aborted: " in said and "the tone is wrong" in said, said
    assert routed.routes.router.routes["llmkit"] == {"old": 1.0}
    journal = llmkit.run("history", "new")
    assert "the tone is wrong" in journal and "traffic is old 70 %, new 30 %" in journal
    begun = [e.data for e in llmkit.book().entries("settled")]
    assert [d["traffic"]["weights"].get("new", 0.0) for d in begun] == [0.3, 0.0]  # once, whoever was killed


# The gate asks for what both revisions have alike, however busy the machine is.
POLICY = """
model: quick
tracking: {tracking}
server: {server}
log: {log}
every: 0.1
plan:
  stages: [{{weight: 0.5, max_requests: 100000}}]
  gates: [{{name: long, bad: prompt_tokens > 1}}]
  margin: 3
"""


def registered(folder: Path, uri: str, seed: int) -> int:
    """A model of the mock engine in the registry, with all that a policy asks for."""
    mock_model(folder)
    head = json.dumps({"__metadata__": {"seed": str(seed)}}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)  # a revision of its own
    card = ModelCard.load(folder)
    card.data, card.profile = {"hash": f"{seed}"}, {"prompts": {"rows": 40}}
    card.save(folder)
    version = register(folder, "quick", uri, tags={"gate": "passed"})
    set_alias("quick", "candidate", version, uri)
    return version


def test_a_candidate_is_rolled_out_by_itself(tmp_path: Path) -> None:
    """The registry's candidate moves; `watch` loads it into a real server, and is killed; the next one promotes it."""
    uri, log = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "requests.db"
    set_alias("quick", "champion", registered(tmp_path / "one", uri, 1), uri)
    old = ModelCard.load(tmp_path / "one").revision
    with ServerProcess({old: tmp_path / "one"}, engine="mock", log=log) as server:
        env = os.environ | {"LLMKIT_ROLLOUTS": str(tmp_path / "rollouts"), "LLMKIT_ADMIN_KEY": server.admin_key}
        policy = tmp_path / "policy.yml"
        policy.write_text(POLICY.format(tracking=uri, server=server.base, log=log))
        watch = [sys.executable, "-m", "llmkit.cli", "rollout", "watch", str(policy), "--once"]
        version, over = registered(tmp_path / "two", uri, 2), threading.Event()
        first = subprocess.Popen(watch, env=env, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not (past := history(tmp_path / "rollouts")) or past[0].state.looks < 1:
            assert time.monotonic() < end and first.poll() is None, past
            time.sleep(0.02)
        first.kill()
        first.wait()
        assert history(tmp_path / "rollouts")[0].state.phase == "stage"  # without users, no look ends it
        users = threading.Thread(target=use, args=(server.url, over), daemon=True)
        users.start()
        done = subprocess.run(watch, env=env, capture_output=True, text=True, timeout=60)
        over.set()
        users.join()
        assert "promoted: " in done.stdout, done
        with AdminClient(server.base, server.admin_key) as admin:
            assert admin.routes()["llmkit"] == {ModelCard.load(tmp_path / "two").revision: 1.0}
    champion = get_version("quick", "champion", uri)
    assert champion is not None and champion.version == version


def test_a_shadow_is_judged_by_its_copies(tmp_path: Path) -> None:
    """A real server copies requests; nobody's answer comes from the shadow, and no copy is made after the end."""
    mock_model(tmp_path / "model")
    log, over = tmp_path / "requests.db", threading.Event()
    plan = Plan.from_dict(
        {
            "stages": [{"weight": 1.0, "max_requests": 100_000}],
            "gates": [{"name": "long", "bad": "completion_tokens > 1"}],
            "margin": 3.0,
        }
    )
    state = RolloutState(alias="llmkit", canary="new", stable="old", plan=plan.to_dict(), strategy="shadow")
    with ServerProcess({"old": tmp_path / "model", "new": tmp_path / "model"}, engine="mock", log=log) as server:
        users = threading.Thread(target=use, args=(server.url, over), daemon=True)
        users.start()
        book = begin_rollout(state, tmp_path / "rollouts")
        with AdminClient(server.base, server.admin_key) as admin:
            ended = Controller(book, RouterBackend(admin), LogSignals(log, every=0.3)).run()
            assert (admin.routes()["llmkit"], admin.shadows()) == ({"old": 1.0}, {})
        over.set()
        users.join()
    assert ended.outcome == "passed", str(ended)
    rows = read_requests(log, shadows=True)
    assert {(r["revision"], r["source"]) for r in rows} <= {("old", ""), ("old", "cache"), ("new", "shadow")}
    copied = [e.data["traffic"]["shadow"] for e in book.entries("settled")]
    assert copied == [["new", 1.0], None]


def use(url: str, over: threading.Event) -> None:
    """Be the users of a server until it is over."""
    while not over.is_set():
        drive(url, ["def f(x):"] * 40, max_tokens=2)


def test_a_server_that_is_restarted_needs_no_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of reach for longer than six tries take, it forgets the canary and the split: both are brought back."""
    mock_model(tmp_path / "model")
    models, log = {"old": tmp_path / "model"}, tmp_path / "requests.db"
    monkeypatch.setenv("LLMKIT_ADMIN_KEY", KEY)
    plan = Plan.from_dict({"stages": [{"weight": 0.3, "max_requests": 10_000}], "gates": ["errors"]})
    with ServerProcess(models, engine="mock", log=log, admin_key=KEY) as server, ExitStack() as stack:
        port = int(server.base.rsplit(":", 1)[1])
        admin = stack.enter_context(AdminClient(server.base, KEY))
        admin.load("new", tmp_path / "model")
        setup = ready(Setup(place=server.base, log=str(log)), plan, "new", "old", "canary")
        state = RolloutState(alias="llmkit", canary="new", stable="old", plan=plan.to_dict(), setup=setup.to_dict())
        backend = stack.enter_context(open_backend(Setup.from_dict(state.setup)))
        book = begin_rollout(state, tmp_path / "rollouts")
        controller = Controller(book, backend, LogSignals(log, every=0.0), backoff=0.0)
        while controller.step().looks < 2:
            pass
        server.stop()
        for _ in range(20):
            assert not controller.step().paused
        with ServerProcess(models, engine="mock", log=log, admin_key=KEY, port=port):
            assert admin.routes()["llmkit"] == {"old": 1.0}
            while (now := controller.step()).looks < 4:
                assert not now.paused, now.paused
            assert admin.routes()["llmkit"] == {"old": 0.7, "new": 0.3}
    told = [e.kind for e in book.entries() if e.kind in ("restarted", "recovered", "pause")]
    assert told == ["restarted", "recovered"]


def test_an_experiment_goes_on_after_a_restart(tmp_path: Path) -> None:
    """The server comes back without the treatment, the split and the salt; one command brings all three back."""
    mock_model(tmp_path / "model")
    env = os.environ | {"LLMKIT_ADMIN_KEY": KEY, "LLMKIT_ROLLOUTS": str(tmp_path / "rollouts")}

    def experiment(*words: str) -> str:
        line = [sys.executable, "-m", "llmkit.cli", "experiment", *words]
        done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    assert "14 days" in experiment("write", "ab.yml", "--control", "old", "--treatment", "new", "--metric", "latency")
    with ServerProcess({"old": tmp_path / "model"}, engine="mock", admin_key=KEY) as server:
        port, where = int(server.base.rsplit(":", 1)[1]), ("ab.yml", "--url", server.base)
        with AdminClient(server.base, KEY) as admin:
            admin.load("new", tmp_path / "model")
            assert "started and sealed" in experiment("start", *where)
            split, salts = admin.routes(), admin.salts()
    assert split["llmkit"] == {"old": 0.5, "new": 0.5} and salts["llmkit"]
    with (
        ServerProcess({"old": tmp_path / "model"}, engine="mock", admin_key=KEY, port=port) as server,
        AdminClient(server.base, KEY) as admin,
    ):
        assert admin.routes()["llmkit"] == {"old": 1.0}
        assert "moved by a restart of the server (llmkit experiment resume ab.yml)" in experiment("status", *where)
        assert "split again, " in experiment("resume", "ab.yml")
        assert (admin.routes(), admin.salts()) == (split, salts)
        assert "as it must be" in experiment("resume", "ab.yml")
        assert "was started already" in experiment("start", *where)
