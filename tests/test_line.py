"""A line in a process of its own: killed, interrupted, held, stopped by its gate, resumed."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

RUN = "from llmkit.core.run import Check, Run\nrun = Run(out, stage)"
COUNT = """import os, time
from pathlib import Path
from llmkit.core.progress import Progress
with open(log, 'a') as f: f.write(stage + '\\n')
Path(out, 'half').write_text('half')
progress = Progress('tick', ticks, every=0)
for i in range(ticks):
    progress.update(i + 1, rate=10.0)
    time.sleep(0.1)"""
GATE = "run.metric('value', value)\nrun.gate([Check('value', value, '<', 5)])"

DRIVER = """
import sys
from pathlib import Path
from llmkit.cli import main as cli
from llmkit.runner.line import Line, Stage

def quickstart(words=None):
    folder, seed, ticks, value = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    def params(name, ticks):
        return lambda done: {"stage": name, "log": str(folder / "log"), "seed": seed, "ticks": ticks, "value": value}
    stages = [Stage("one", folder / "job.ipynb", params("one", 1)),
              Stage("two", folder / "job.ipynb", params("two", ticks)),
              Stage("keeps", folder / "job.ipynb", params("keeps", 1), resumes=True),
              Stage("report", folder / "job.ipynb", params("report", 1) if value < 5 else
                    (lambda done: params("report", 1)(done) | {"value": 0}), always=True)]
    Line("quickstart", stages, folder / "run", {"seed": seed}).run("--resume" in sys.argv)
    print("done")

cli.dispatch = lambda words: quickstart()
cli.main()
"""


@pytest.fixture
def start(tmp_path: Path, job: Callable[..., Path]) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start the line: seed, ticks of the second stage, value that the gate sees, and whether to resume."""
    parameters = "out = ''\nstage = 'x'\nlog = ''\nseed = 0\nticks = 1\nvalue = 0"
    job("job", parameters, RUN, COUNT, GATE, "_ = run.finish()")
    (tmp_path / "driver.py").write_text(DRIVER)
    begun: list[subprocess.Popen] = []

    def call(seed: int = 0, ticks: int = 1, value: int = 0, resume: bool = False, **options) -> subprocess.Popen:
        words = [sys.executable, tmp_path / "driver.py", tmp_path, seed, ticks, value, *["--resume"] * resume]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
        begun.append(subprocess.Popen(list(map(str, words)), text=True, start_new_session=True, **options))
        return begun[-1]

    yield call
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(check: Callable[[], object], seconds: float = 60) -> None:
    """Wait until `check` holds."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def log(tmp_path: Path) -> list[str]:
    """The stages that began, in order."""
    path = tmp_path / "log"
    return path.read_text().split() if path.exists() else []


def statuses(tmp_path: Path) -> dict[str, str]:
    """How each stage stands."""
    return {n: r["status"] for n, r in json.loads((tmp_path / "run/state.json").read_text())["stages"].items()}


def kernels(tmp_path: Path) -> list[int]:
    """Processes, other than zombies, whose environment names this run."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("LLMKIT_PROGRESS", "").startswith(str(tmp_path))
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def second_stage(tmp_path: Path) -> bool:
    """Whether the second stage has done its first tick."""
    return (tmp_path / "run/02_two/progress.jsonl").exists()


def test_in_order_with_plain_lines(tmp_path: Path, start: Callable) -> None:
    out, err = start().communicate(timeout=120)
    assert log(tmp_path) == ["one", "two", "keeps", "report"], err
    assert out.splitlines()[0] == "[1/4] one: started"
    assert out.splitlines()[-1] == "done" and "\x1b" not in out
    assert err == ""
    assert [p.name for p in sorted((tmp_path / "run").glob("0*"))] == ["01_one", "02_two", "03_keeps", "04_report"]
    assert (tmp_path / "run/01_one/job.ipynb").exists()
    assert kernels(tmp_path) == []


def test_resume_after_kill_9_in_a_stage(tmp_path: Path, start: Callable) -> None:
    first = start(ticks=600)
    wait_for(lambda: second_stage(tmp_path))
    orphans = kernels(tmp_path)
    first.kill()
    first.wait()
    assert orphans and statuses(tmp_path) == {"one": "finished", "two": "running"}
    # The line is resumed at once, while the orphaned kernel may still write.
    refused = start(ticks=1, resume=True)
    _, err = refused.communicate(timeout=60)
    assert refused.returncode == 0, err  # an unfinished stage may get other parameters: nothing was made with the old
    assert log(tmp_path) == ["one", "two", "two", "keeps", "report"]
    assert set(statuses(tmp_path).values()) == {"finished"}
    assert not set(orphans) & set(kernels(tmp_path))


def test_a_stage_that_resumes_gets_its_folder_back(tmp_path: Path, start: Callable) -> None:
    start().communicate(timeout=120)
    state = json.loads((tmp_path / "run/state.json").read_text())
    state["stages"]["two"]["status"] = state["stages"]["keeps"]["status"] = "running"
    (tmp_path / "run/state.json").write_text(json.dumps(state))
    for folder in ("02_two", "03_keeps"):
        (tmp_path / "run" / folder / "checkpoint").write_text("step 1")
    _, err = start(resume=True).communicate(timeout=120)
    assert log(tmp_path)[4:] == ["two", "keeps", "report"], err
    assert not (tmp_path / "run/02_two/checkpoint").exists()
    assert (tmp_path / "run/03_keeps/checkpoint").exists()


def test_a_missed_gate_ends_the_line_after_the_report(tmp_path: Path, start: Callable) -> None:
    line = start(value=9)
    _, err = line.communicate(timeout=120)
    assert line.returncode == 1
    assert "one: value 9 misses < 5; see " in err and len(err.splitlines()) == 1
    assert log(tmp_path) == ["one", "report"]
    assert statuses(tmp_path) == {"one": "gate_failed", "report": "finished"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_and_says_how_to_go_on(tmp_path: Path, start: Callable, number: int) -> None:
    line = start(ticks=600)
    wait_for(lambda: second_stage(tmp_path))
    line.send_signal(number)
    _, err = line.communicate(timeout=60)
    assert line.returncode == 2
    assert err == f"interrupted; continue with: llmkit quickstart --resume --out {tmp_path / 'run'}\n"
    assert kernels(tmp_path) == []
    _, err = start(resume=True).communicate(timeout=120)
    assert log(tmp_path) == ["one", "two", "two", "keeps", "report"], err


def test_two_processes_on_one_folder(tmp_path: Path, start: Callable) -> None:
    first = start(ticks=600)
    wait_for(lambda: second_stage(tmp_path))
    for resume in (False, True):
        second = start(ticks=600, resume=resume)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert err == (
            f"error: {tmp_path / 'run'} is in use by process {first.pid}; wait until it ends, or choose another --out\n"
        )
    assert first.poll() is None


def test_other_parameters_are_refused(tmp_path: Path, start: Callable) -> None:
    start().communicate(timeout=120)
    before = (tmp_path / "run/state.json").read_bytes()
    for options, text in (({"seed": 1, "resume": True}, "seed = 0, not 1"), ({}, "is not empty")):
        line = start(**options)
        _, err = line.communicate(timeout=60)
        assert (line.returncode, len(err.splitlines())) == (2, 1) and text in err
    assert (tmp_path / "run/state.json").read_bytes() == before
    # A finished stage, too, was made with what it was made with.
    line = start(ticks=2, resume=True)
    _, err = line.communicate(timeout=60)
    assert line.returncode == 2 and "02_two was made with ticks = 1, not 2" in err


def test_a_moved_folder_is_the_same_run(tmp_path: Path, start: Callable) -> None:
    start().communicate(timeout=120)
    state = json.loads((tmp_path / "run/state.json").read_text())
    assert all("{out}" not in json.dumps(r["params"]) for r in state["stages"].values())  # none lies in the folder here
    assert json.loads((tmp_path / "run/01_one/result.json").read_text())["mlflow_run_id"]


def test_live_table_on_a_terminal(tmp_path: Path, start: Callable) -> None:
    master, slave = pty.openpty()
    line = start(ticks=5, stdout=slave, stderr=slave)
    os.close(slave)
    text = b""
    while True:
        try:
            text += os.read(master, 65536)
        except OSError:  # the other side is closed
            break
    os.close(master)
    assert line.wait() == 0
    shown = text.decode()
    assert "\x1b[" in shown and "✓" in shown and "tick" in shown and "all" in shown
