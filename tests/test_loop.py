"""The loop closes: a served model, a stream that changes, an alarm, a candidate, a rollout, and nobody's hand."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT

from llmkit.cli.retrain import Ledger
from llmkit.core.card import ModelCard
from llmkit.core.registry import get_version, register, set_alias
from llmkit.core.run import read_json
from llmkit.data.prepared import Prepared
from llmkit.deployment.candidate import german_rows, held_windows, own_harvest
from llmkit.deployment.plan import Plan, Stage
from llmkit.deployment.rollout import RouterBackend, move_champion, run_rollout
from llmkit.deployment.traffic import LabelLoop, drive
from llmkit.monitoring.drift import DriftDetector
from llmkit.monitoring.monitor import prompt_windows
from llmkit.monitoring.profile import PROFILE_SCHEMA, make_profile
from llmkit.monitoring.requestlog import read_requests
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess

POLICY: dict[str, Any] = {
    "when": {"rows": 40, "labelled": 10},
    "take": {"similarity": 1.0},
    "train": {"steps": 40, "length": 64, "batch_size": 8},
    "evaluate": {"answers": 4},
    "gates": {"bounds": "smoke", "new_drop": 1.0, "old_rise": 0.05, "windows": 16},
}


class World:
    """A tiny model that knows a little Python, the champion of a registry, behind a server that keeps a log."""

    def __init__(self, home: Path) -> None:
        _, self.model = own_harvest(home)
        self.data, self.log, self.tracking = str(home / "data"), home / "requests.db", f"sqlite:///{home}/registry.db"
        self.prepared, card = Prepared(self.data), ModelCard.load(self.model)
        known = self.prepared.tokenizer.batch_decode(prompt_windows(self.prepared, "valid", 60, 24).tolist())
        card.profile = {"schema": PROFILE_SCHEMA, "prompts": make_profile(known, "prompts", model=card.revision)}
        card.save(self.model)
        self.revision = card.revision
        set_alias("llmkit", "champion", register(self.model, "llmkit", self.tracking), self.tracking)
        self.policy = home / "policy.yaml"
        self.policy.write_text(yaml.safe_dump(POLICY))

    def look(self, out: Path) -> list[str]:
        """The words of a monitor's look at the log, with permission to train."""
        given = {"model": self.model, "log": self.log, "data": self.data, "tracking": self.tracking}
        words = [sys.executable, "-m", "llmkit.cli", "run", "monitor_model", "--out", str(out)]
        given |= {"retrain": self.policy, "run_length": "1e5", "slices": "finish"}
        return words + [w for name, value in given.items() for w in ("-p", f"{name}={value}")]


def german_users(server: ServerProcess, admin: AdminClient, log: Path, n: int) -> None:
    """`n` users who write German; every second says how it should have gone on."""
    said = german_rows(n)
    replies = drive(server.url, [r["prompt"] for r in said], concurrency=4, max_tokens=4)
    for i, (reply, row) in enumerate(zip(replies, said, strict=True)):
        assert not reply.error, reply
        if i % 2:
            admin.feedback(reply.id, "label", row["labels"]["label"])
    end = time.monotonic() + 20
    while sum("label" in r["labels"] for r in read_requests(log)) < n // 2:
        assert time.monotonic() < end, "the labels are not in the log"
        time.sleep(0.1)


def killed_while_training(words: list[str], loop: Path) -> int:
    """Start a look, kill it with everything of it when the training runs; its exit code."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while not list(loop.glob("runs/*/01_train_model/.kernel.json")):
        assert process.poll() is None and time.monotonic() < end, "the training did not begin"
        time.sleep(0.05)
    process.kill()
    return process.wait()


def test_a_drifted_stream_recovers_without_a_hand(tmp_path: Path) -> None:
    """German comes, the alarm rings, a training is killed and continued, the candidate is better and is rolled out."""
    world = World(tmp_path)
    loop = world.policy.with_suffix("")
    with (
        ServerProcess({world.revision: world.model}, log=world.log, variant="torch", slots=4) as server,
        AdminClient(server.base, server.admin_key) as admin,
    ):
        german_users(server, admin, world.log, 120)
        assert killed_while_training(world.look(tmp_path / "first"), loop) == -9
        assert Ledger(loop).running()
        ended = subprocess.run(world.look(tmp_path / "second"), cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        found = read_json(tmp_path / "second" / "result.json")
        assert "continuing" in found["tables"]["retraining"][0]["decision"], found["tables"]["retraining"]
        assert found["metrics"]["loss_new_change"] < -2 and found["metrics"]["loss_old_change"] < 0.05
        (entry,) = Ledger(loop).entries
        assert entry.status == "registered" and "prompts drifted" in entry.why[0]
        version = get_version("llmkit", "candidate", world.tracking)
        assert version and version.version == entry.version == 2 and version.tags["gate"] == "passed"
        assert read_json(Path(entry.data) / "manifest.json")["labelled"] > 50

        candidate = ModelCard.load(version.folder)
        fresh = [r["prompt"] for r in german_rows(60, seed=9)]
        assert not DriftDetector(candidate.profile["prompts"], 1e5).detect(fresh).alarm
        admin.load(candidate.revision, version.folder, "torch")
        windows, _ = held_windows(Prepared(entry.data), 64, 32)
        plan = Plan(stages=[Stage(weight=0.5, max_requests=600)], baseline=60, quantile=0.3, alpha=0.01)
        crown = lambda: move_champion("llmkit", version.version, world.tracking)  # noqa: E731
        backend, traffic = RouterBackend(admin), LabelLoop(server.url, windows)
        result = run_rollout(backend, plan, candidate.revision, world.revision, traffic, crown)
        assert result.verdict == "promote", str(result)
        assert backend.traffic() == {candidate.revision: 1.0}
        assert get_version("llmkit", "champion", world.tracking).version == 2
