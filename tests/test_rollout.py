"""Rollouts against a real server: rolled back, promoted, interrupted, and a server that dies in the middle."""

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import count

import pytest

from llmkit.cli.target import Setup, find_profile
from llmkit.core.card import ModelCard
from llmkit.core.errors import ServiceError
from llmkit.core.registry import get_version
from llmkit.deployment.controller import Controller, begin_rollout
from llmkit.deployment.plan import Plan, Stage
from llmkit.deployment.release import RolloutJob, job_plan, make_damaged, make_healthy, open_release
from llmkit.deployment.rollout import RouterBackend, move_champion, run_rollout
from llmkit.deployment.signals import LogSignals
from llmkit.deployment.state import RolloutState
from llmkit.deployment.traffic import LabelLoop, drive
from llmkit.monitoring.monitor import prompt_windows
from llmkit.monitoring.profile import make_profile
from llmkit.monitoring.requestlog import read_requests
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess

FOREVER = Plan(stages=[Stage(weight=0.5, max_requests=10**6)], baseline=40, alpha=1e-300, promote_alpha=1e-300)


class World:
    "A champion with a damaged and a healthy revision beside it, behind a real server."

    def __init__(self, folder):
        self.cfg = RolloutJob()
        self.release = open_release(self.cfg, folder)
        self.folders = {"damaged": make_damaged(self.release, folder / "damaged", 1.0, 0)}
        self.folders["healthy"], self.version = make_healthy(self.release, folder / "healthy", 2, 1)
        self.stable = ModelCard.load(self.release.champion).revision
        self.windows = prompt_windows(self.release.prepared, "test", 120, 32)
        self.log = folder / "requests.db"
        self.server = ServerProcess({self.stable: self.release.champion}, log=self.log, variant="torch").start()
        self.admin = AdminClient(self.server.base, self.server.admin_key)
        self.backend = RouterBackend(self.admin)
        for name, path in self.folders.items():
            self.admin.load(name, path, "torch")

    def traffic(self):
        return LabelLoop(self.server.url, self.windows)

    def all_to_champion(self):
        self.backend.set_traffic({self.stable: 1.0})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    found = World(tmp_path_factory.mktemp("rollout"))
    yield found
    found.admin.close()
    found.server.stop()


def test_damaged_is_rolled_back(world):
    world.all_to_champion()
    moved = []
    result = run_rollout(
        world.backend, job_plan(world.cfg), "damaged", world.stable, world.traffic(), lambda: moved.append(1)
    )
    assert result.verdict == "rollback", str(result)
    assert world.backend.traffic() == {world.stable: 1.0}
    assert not moved


def test_healthy_is_promoted_with_its_alias(world):
    world.all_to_champion()
    release = world.release
    promote = lambda: move_champion(release.name, world.version, release.tracking)  # noqa: E731
    result = run_rollout(world.backend, job_plan(world.cfg), "healthy", world.stable, world.traffic(), promote)
    assert result.verdict == "promote", str(result)
    assert world.backend.traffic() == {"healthy": 1.0}
    assert get_version(release.name, "champion", release.tracking).version == world.version


def until(holds):
    """What `holds` gives, once it is something: a log is written by another process, in its own time."""
    end = time.monotonic() + 30
    while not (found := holds()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_labels_reach_the_log(world):
    labelled = lambda: [r for r in read_requests(world.log) if r["labels"]]  # noqa: E731
    until(lambda: {r["revision"] for r in labelled()} >= {world.stable, "damaged"})
    rows = labelled()
    assert all(0 <= r["labels"]["accuracy"] <= 1 for r in rows)


def users(world, n, seed, model="llmkit"):
    """Users who ask for the rest of a file; back when all of it is in the log."""
    before = len(read_requests(world.log))
    prompts = [w[:16].tolist() for w in (world.windows[i % len(world.windows)] for i in range(n))]
    drive(world.server.url, prompts, 8, model, max_tokens=24, temperature=0.8, seed=seed)
    until(lambda: len(read_requests(world.log)) >= before + n)


def test_drifting_answers_are_rolled_back_by_the_gate_of_that_name_alone(world, tmp_path):
    """The champion's folder has its profile, the log has the users' rows, and the plan has nothing but `drift`."""
    world.all_to_champion()
    began = time.time()
    users(world, 120, 1)
    rows = [r for r in read_requests(world.log, since=began) if r["revision"] == world.stable]
    card = ModelCard.load(world.release.champion)
    card.profile = {"predictions": make_profile(rows, "predictions", model=world.stable)}
    card.save(world.release.champion)
    users(world, 100, 2)  # the baseline: answers that the profile has not seen
    setup, over = Setup(place=world.server.base, log=str(world.log)), threading.Event()
    plan = Plan.from_dict({"stages": [{"weight": 0.5, "max_requests": 5000}], "gates": ["drift"], "baseline": 100})
    state = RolloutState(alias="llmkit", canary="damaged", stable=world.stable, plan=plan.to_dict())

    def ask():
        for seed in count(10):
            if over.is_set():
                return
            users(world, 40, seed)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    signals = LogSignals(world.log, every=0.3, drift=lambda: find_profile(setup, world.stable, world.backend))
    try:
        ended = Controller(begin_rollout(state, tmp_path), world.backend, signals).run()
    finally:
        over.set()
        asking.join()
    assert (ended.outcome, world.backend.traffic()) == ("rolled_back", {world.stable: 1.0}), str(ended)
    assert "drift" in ended.reason, ended.reason
    began = time.time()
    users(world, 120, 3, "healthy"), users(world, 120, 4, world.stable)
    rows = read_requests(world.log, since=began)
    line = Plan.from_dict(ended.plan).gates[0].predicate.value
    found = {name: [r for r in rows if r["revision"] == name] for name in ("healthy", world.stable)}
    unusual = {k: sum(s > line for s in signals.usual.of(part)) / len(part) for k, part in found.items()}
    assert unusual["healthy"] < 0.3 and unusual[world.stable] < 0.25, unusual


INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
from test_rollout import *
import numpy as np
backend = RouterBackend(AdminClient({base!r}, {key!r}))
traffic = LabelLoop({url!r}, np.load({windows!r}))
run_rollout(backend, FOREVER, "healthy", {stable!r}, traffic)
"""


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_interrupted_gives_traffic_back(world, tmp_path, number):
    import numpy as np

    world.all_to_champion()
    np.save(tmp_path / "windows.npy", world.windows)
    code = INTERRUPTED.format(
        tests=os.path.dirname(__file__),
        base=world.server.base,
        key=world.server.admin_key,
        url=world.server.url,
        windows=str(tmp_path / "windows.npy"),
        stable=world.stable,
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 40
    while "healthy" not in world.backend.traffic():
        assert child.poll() is None and time.monotonic() < until, child.stderr.read()
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(number)
    _, err = child.communicate(timeout=20)
    assert child.returncode != 0 and "KeyboardInterrupt" in err
    assert world.backend.traffic() == {world.stable: 1.0}


def test_a_server_that_dies_is_an_error_that_says_so(world):
    world.all_to_champion()
    traffic = world.traffic()

    def dying(n):
        if "healthy" in world.backend.traffic():
            os.kill(world.server.pid, signal.SIGKILL)
            time.sleep(0.2)
        return traffic(n)

    with pytest.raises(ServiceError, match="came back with a label") as caught:
        run_rollout(world.backend, FOREVER, "healthy", world.stable, dying)
    assert "could NOT be given back" in caught.value.__notes__[0]
