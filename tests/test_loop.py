"""The loop closes: a served model, a stream that changes, an alarm, a candidate, a rollout, and nobody's hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from llmkit.cli.retrain import Ledger, Served, retrain
from llmkit.core.registry import get_version, register, set_alias
from llmkit.core.run import read_json
from llmkit.deployment.candidate import german_rows, own_harvest
from llmkit.deployment.retraining import RetrainPolicy

RULES: dict[str, Any] = {
    "when": {"rows": 40, "labelled": 10},
    "take": {"similarity": 1.0},
    "train": {"steps": 40, "length": 64, "batch_size": 8},
    "evaluate": {"answers": 4},
    "gates": {"bounds": "smoke", "new_drop": 1.0, "old_rise": 0.05, "windows": 16},
}
DRIFT = {"prompts": "after 22 rows"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A tiny model that knows a little Python, the champion of a registry."""
    home = tmp_path_factory.mktemp("served")
    _, model = own_harvest(home)
    tracking = f"sqlite:///{home / 'registry.db'}"
    set_alias("llmkit", "champion", register(model, "llmkit", tracking), tracking)
    return Served(model, str(home / "data"), tracking, "requests.db")


def test_a_killed_training_is_continued_and_registered(served: Served, tmp_path: Path) -> None:
    """Killed in mid-training, the next look goes on with it; the candidate is better on the new text and registered."""
    code = f"""
import os, threading
from test_loop import *
def kill():
    while not list(Path({str(tmp_path)!r}).glob("runs/*/01_train_model/.kernel.json")): pass
    os.kill(os.getpid(), 9)
threading.Thread(target=kill, daemon=True).start()
retrain(RetrainPolicy.from_dict(RULES), Served(**{vars(served)!r}), german_rows(160), DRIFT, {str(tmp_path)!r})
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert Ledger(tmp_path).running()
    made = retrain(RetrainPolicy.from_dict(RULES), served, [], {}, tmp_path)  # what was begun is ended
    assert made.entry and made.entry.status == "registered", made
    assert "continuing" in made.decision
    candidate = get_version("llmkit", "candidate", served.tracking)
    assert candidate and candidate.version == made.entry.version == 2
    assert get_version("llmkit", "champion", served.tracking).version == 1
    assert made.metrics["loss_new_change"] < -2 and made.metrics["loss_old_change"] < 0.05, made.metrics
    manifest = read_json(Path(made.entry.data) / "manifest.json")
    assert manifest["rows"] == 160 and manifest["from"]["log"] == "requests.db"
    again = retrain(RetrainPolicy.from_dict(RULES), served, german_rows(160), DRIFT, tmp_path)
    assert "the policy wants 1d" in again.decision and again.entry is None
