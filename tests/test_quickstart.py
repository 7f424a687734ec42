"""The whole line, end to end, at a size that takes a minute."""

from __future__ import annotations

import json
import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import Done, command

STAGES = [
    "prepare_data",
    "train_model",
    "evaluate_model",
    "register_model",
    "optimize_model",
    "serve_model",
    "monitor_model",
    "rollout_model",
    "write_report",
]


def finished(out: Path) -> None:
    """The line in `out` is whole: every stage finished, tracked, with its notebook; the report stands by itself."""
    state = json.loads((out / "state.json").read_text())
    assert {n: r["status"] for n, r in state["stages"].items()} == dict.fromkeys(STAGES, "finished")
    for number, name in enumerate(STAGES, 1):
        folder = out / f"{number:02d}_{name}"
        result = json.loads((folder / "result.json").read_text())
        assert result["mlflow_run_id"] and (folder / f"{name}.ipynb").exists()
    html = (out / "09_write_report/report.html").read_text()
    assert all(name in html for name in STAGES[:-1])
    assert not re.search(r"<(script|img|link)[^>]+(src|href)=[\"']https?:", html), "the report loads something"


def test_tiny_quickstart(llmkit: Callable[..., Done], tmp_path: Path) -> None:
    done = llmkit("quickstart", "--preset", "tiny", "--out", "run", OMP_NUM_THREADS="2")
    assert done.code == 0, done.err
    last = done.out.splitlines()[-1]
    assert last == f"report: {tmp_path / 'run/09_write_report/report.html'}" and Path(last[8:]).exists()
    assert done.err == ""
    finished(tmp_path / "run")

    from llmkit.core.tracking import tracking_client

    client = tracking_client(f"sqlite:///{tmp_path / 'run/mlflow.db'}")
    parent = client.get_run(json.loads((tmp_path / "run/state.json").read_text())["parent_run"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=100
    )
    assert sorted(r.info.run_name for r in children) == sorted(STAGES)
    assert parent.info.status == "FINISHED"

    # A resume of a whole line keeps all of it, without being told again how it was started.
    again = llmkit("quickstart", "--resume", "--out", "run")
    assert again.code == 0 and again.out.count("kept") == len(STAGES), again.out
    refused = llmkit("quickstart", "--resume", "--out", "run", "--seed", "1")
    assert refused.code == 2 and "seed = 0, not 1" in refused.err


@pytest.mark.soak
def test_killed_again_and_again(tmp_path: Path) -> None:
    """`kill -9` at random moments loses nothing: the line ends as if it had run through, and no process stays."""
    chance = random.Random(0)
    words = command("quickstart", "--preset", "tiny", "--out", "run")
    kills = 0
    while kills < 12:
        resume = ["--resume"] if (tmp_path / "run").exists() else []
        process = subprocess.Popen([*words, *resume], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(timeout=chance.uniform(1, 25))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0, process.stderr.read()
        break
    done = subprocess.run([*words, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    finished(tmp_path / "run")
    time.sleep(2)  # what polls its parent has had the time to notice
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert not left
