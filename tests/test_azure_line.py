"""The quickstart, here and in Azure ML: the same data, model, numbers and verdicts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from azure_plane import Plane

ROOT = Path(__file__).resolve().parents[1]
EXACT = ("prepare_data", "train_model", "evaluate_model", "register_model")
MEASURED = ("second", "per_s", "mfu", "memory", "damaged_requests", "healthy_requests")  # of the machine, not the model


def llmkit(*words: str) -> str:
    """What the command line prints."""
    done = subprocess.run([sys.executable, "-m", "llmkit.cli", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hashes(folder: Path) -> dict[str, str]:
    """The content of every file in a folder, hashed."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def result(stage: Path) -> dict[str, Any]:
    """The result of a stage: its verdicts, and the numbers that no clock and no other load can change."""
    found = json.loads((stage / "result.json").read_text())
    metrics = {k: v for k, v in found["metrics"].items() if not any(word in k for word in MEASURED)}
    exact = metrics if any(name in stage.name for name in EXACT) else {k: v for k, v in metrics.items() if "perp" in k}
    return {"metrics": exact, "gate": [(c["name"], c["passed"]) for c in found["gate"]], "status": found["status"]}


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("preset", ["tiny", "quickstart"])
def test_the_whole_line_is_the_same_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    llmkit("quickstart", "--preset", preset, "--out", str(here))
    with Plane(tmp_path / "plane") as plane:
        monkeypatch.setenv("LLMKIT_AZURE_CLOUD", str(plane.cloud))
        llmkit("azure", "up", "cpu")
        llmkit("quickstart", "--preset", preset, "--out", str(there), "--on", "azureml", "--compute", "cpu")
    stages = [p.parent.name for p in sorted(here.glob("*/result.json"))]
    assert len(stages) == 9
    assert [p.parent.name for p in sorted(there.glob("*/result.json"))] == stages
    for stage in stages:
        assert result(there / stage) == result(here / stage), stage
    assert hashes(there / "01_prepare_data" / "data") == hashes(here / "01_prepare_data" / "data")
    weights = Path("02_train_model") / "model" / "model.safetensors"
    assert (there / weights).read_bytes() == (here / weights).read_bytes()
    assert (there / "09_write_report" / "report.html").stat().st_size > 100_000
