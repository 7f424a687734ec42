"""The whole line, end to end, at a size that takes a minute."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import Done, command

from llmkit.cli.recovery import JOBS
from llmkit.cli.retrain import Ledger
from llmkit.core.card import ModelCard
from llmkit.core.registry import get_version
from llmkit.core.run import read_json, read_result

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


def finished(out: Path, jobs: dict[str, str] | None = None) -> None:
    """The line in `out` is whole: every stage finished, tracked, with its notebook; the report stands by itself."""
    jobs = jobs or {name: name for name in STAGES}
    state = json.loads((out / "state.json").read_text())
    assert {n: r["status"] for n, r in state["stages"].items()} == dict.fromkeys(jobs, "finished")
    for number, (name, job) in enumerate(jobs.items(), 1):
        folder = out / f"{number:02d}_{name}"
        result = json.loads((folder / "result.json").read_text())
        assert result["mlflow_run_id"] and (folder / f"{job}.ipynb").exists()
    html = (folder / "report.html").read_text()
    assert all(name in html for name in list(jobs)[:-1])
    assert not re.search(r"<(script|img|link)[^>]+(src|href)=[\"']https?:", html), "the report loads something"


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A tiny line and what it said."""
    out = tmp_path_factory.mktemp("line") / "run"
    env = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "2"}
    words = command("quickstart", "--preset", "tiny", "--out", out)
    return out, subprocess.run(words, env=env, capture_output=True, text=True, timeout=240)


def test_tiny_quickstart(line: tuple[Path, subprocess.CompletedProcess[str]], llmkit: Callable[..., Done]) -> None:
    out, done = line
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == f"report: {out / '09_write_report/report.html'}" and Path(last[8:]).exists()
    assert done.stderr == ""
    finished(out)

    from llmkit.core.tracking import tracking_client

    client = tracking_client(f"sqlite:///{out / 'mlflow.db'}")
    parent = client.get_run(json.loads((out / "state.json").read_text())["parent_run"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=100
    )
    assert sorted(r.info.run_name for r in children) == sorted(STAGES)
    assert parent.info.status == "FINISHED"

    # A resume of a whole line keeps all of it, without being told again how it was started.
    again = llmkit("quickstart", "--resume", "--out", out)
    assert again.code == 0 and again.out.count("kept") == len(STAGES), again.out
    refused = llmkit("quickstart", "--resume", "--out", out, "--seed", "1")
    assert refused.code == 2 and "seed = 0, not 1" in refused.err


def killed_while_training(out: Path) -> int:
    """Let the traffic of the line in `out` drift, and kill the command while the loop trains; its exit code."""
    words = command("quickstart", "--resume", "--drift", "--out", out)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    end = time.monotonic() + 150
    while not list(out.glob("retraining/runs/*/01_train_model/.kernel.json")):
        assert process.poll() is None and time.monotonic() < end, "the training did not begin"
        time.sleep(0.05)
    process.kill()
    return process.wait()


def test_a_drifted_stream_recovers_without_a_hand(
    line: tuple[Path, subprocess.CompletedProcess[str]], llmkit: Callable[..., Done]
) -> None:
    """German comes, the alarm rings, a training is killed and continued, the candidate is better and is rolled out."""
    out, _ = line
    assert killed_while_training(out) == -9
    assert Ledger(out / "retraining").running()
    done = llmkit("quickstart", "--resume", "--out", out)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"report: {out / '14_report_recovery/report.html'}"
    finished(out, {name: name for name in STAGES} | JOBS)

    found = {name: read_result(out / f"{i:02d}_{name}") for i, name in enumerate(JOBS, 10)}
    before, after = found["drifted_traffic"]["metrics"], found["recovered_traffic"]["metrics"]
    assert before["evidence_of_drift"] > 8 > after["evidence_of_drift"]
    assert "continuing" in found["retrain_model"]["tables"]["retraining"][0]["decision"]
    change = found["retrain_model"]["metrics"]
    assert change["loss_new_change"] < -0.5 and change["loss_old_change"] < 0.05, change
    (entry,) = Ledger(out / "retraining").entries
    assert entry.status == "registered" and "prompts drifted" in entry.why[0]
    assert read_json(Path(entry.data) / "manifest.json")["labelled"] > 20
    assert found["release_candidate"]["tables"]["rollouts"][0]["verdict"] == "promote"
    champion = get_version("llmkit", "champion", f"sqlite:///{out / 'mlflow.db'}")
    assert champion and champion.version == entry.version == 3
    assert champion.tags["revision"] == ModelCard.load(champion.folder).revision


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
