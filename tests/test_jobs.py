"""Jobs as processes: in the background, killed, cancelled, resumed, two on one folder, swept, ten thousand."""

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
from conftest import Done, command
from test_cli import refused

TICKS = """import os, time
from pathlib import Path
from llmkit.core.progress import Progress
path = Path(out, 'done')
done = int(path.read_text()) if path.exists() else 0
print('from', done, flush=True)
progress = Progress('tick', ticks, every=0)
for i in range(done, ticks):
    path.write_text(str(i + 1))
    progress.update(i + 1)
    time.sleep(0.1)"""


@pytest.fixture
def ticks(tmp_path: Path, job: Callable[..., Path]) -> Iterator[Path]:
    """A job that counts, and goes on counting where it was stopped; what it leaves running is ended."""
    yield job("ticks", "out = ''\nticks = 3\nname = 'a'", TICKS)
    for pid in mine(tmp_path):
        os.kill(pid, signal.SIGKILL)


def mine(tmp_path: Path) -> list[int]:
    """Launchers and kernels of this test that are alive."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("LLMKIT_PROGRESS", "")]
            if process.status() != psutil.STATUS_ZOMBIE and any(word.startswith(str(tmp_path)) for word in words):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def until(check: Callable[[], object], seconds: float = 60) -> None:
    """Wait until `check` holds."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Done]:
    """Call `llmkit` within this process, in the temporary folder: what only looks, or is refused."""
    from llmkit.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str | Path) -> Done:
        with pytest.raises(SystemExit) as end:
            main(list(map(str, words)))
        return Done(int(end.value.code or 0), *capsys.readouterr())

    return call


def row(quick: Callable[..., Done], id: str = "") -> dict:
    """How a job stands."""
    done = quick("jobs", "show", *[id] * bool(id), "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def begin(quick: Callable[..., Done], *words: str | Path) -> str:
    """Start a job in the background; its id."""
    done = quick("run", *words, "--background")
    assert done.code == 0, done.err
    return done.out.split()[0]


def ticking(folder: Path) -> bool:
    """Whether the job in `folder` has counted."""
    return (folder / "done").exists()


def test_the_shape_of_a_run_folder(
    llmkit: Callable[..., Done], quick: Callable[..., Done], tmp_path: Path, ticks: Path
) -> None:
    """The same files in the foreground and in the background; they say with what and from what it was made."""
    assert llmkit("run", ticks, "--out", "front").code == 0
    id = begin(quick, ticks, "--out", "behind")
    assert quick("jobs", "logs", "-f", id).code == 0
    names = {p.name for p in (tmp_path / "front").iterdir()}
    assert names == {p.name for p in (tmp_path / "behind").iterdir()}
    wanted = {"ticks.ipynb", "result.json", "log.txt", "kernel.log", "progress.jsonl", "job.json", "status.json"}
    assert wanted | {"facts.json", "environment.txt"} <= names
    facts = json.loads((tmp_path / "front/facts.json").read_text())
    assert facts["git"] is None and facts["environment"].startswith("sha256:")
    assert any(line.startswith("papermill==") for line in (tmp_path / "front/environment.txt").read_text().split())
    result = json.loads((tmp_path / "behind/result.json").read_text())
    assert result["status"] == "finished" and result["params"]["ticks"] == 3
    assert "from 0" in (tmp_path / "front/log.txt").read_text()
    assert [r["state"] for r in map(json.loads, quick("jobs", "list", "--json").out.splitlines())] == ["finished"] * 2


def test_the_terminal_goes_away(quick: Callable[..., Done], tmp_path: Path, ticks: Path) -> None:
    """The shell's process group is hung up and its terminal closed; the job goes on to its end."""
    main, side = pty.openpty()
    words = command("run", ticks, "-p", "ticks", "20", "--out", "run", "--background")
    shell = subprocess.Popen(
        ["bash", "-c", f"{' '.join(words)}; sleep 60"],
        cwd=tmp_path,
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
    )
    os.close(side)
    until(lambda: ticking(tmp_path / "run"))
    os.killpg(shell.pid, signal.SIGHUP)
    os.close(main)
    shell.wait()
    count = (tmp_path / "run/done").read_text()
    until(lambda: (tmp_path / "run/done").read_text() not in ("", count))
    assert quick("jobs", "logs", "-f", "run").out.splitlines()[-1].endswith(" finished")
    assert row(quick, "run")["state"] == "finished"
    until(lambda: mine(tmp_path) == [])


def test_kill_9_of_the_launcher(quick: Callable[..., Done], tmp_path: Path, ticks: Path) -> None:
    """Nobody was left to say so, and still it is preempted; it goes on in its folder, under its id."""
    id = begin(quick, ticks, "-p", "ticks", "15")
    folder = tmp_path / "runs" / id
    until(lambda: ticking(folder))
    assert row(quick)["message"].startswith("tick ")
    os.kill(json.loads((folder / "status.json").read_text())["pid"], signal.SIGKILL)
    until(lambda: row(quick)["state"] != "running")
    stands = row(quick)
    assert stands["state"] == "preempted" and f"llmkit jobs resume {id}" in stands["message"]
    assert quick("jobs", "logs", "-f", id).code == 75
    assert quick("jobs", "resume", id).out.split()[0] == id
    done = quick("jobs", "logs", "-f", id)
    assert done.code == 0, done.err
    starts = [line for line in done.out.splitlines() if line.startswith("from ")]
    assert starts[0] == "from 0" and starts[1] != "from 0"  # it went on
    refused(quick("jobs", "resume", id), "came to its end", "llmkit run")
    assert len(quick("jobs").out.splitlines()) == 2  # a title and one job


def test_kill_9_of_the_kernel(quick: Callable[..., Done], tmp_path: Path, ticks: Path) -> None:
    id = begin(quick, ticks, "-p", "ticks", "600")
    folder = tmp_path / "runs" / id
    until(lambda: ticking(folder))
    os.kill(json.loads((folder / ".kernel.json").read_text())["pid"], signal.SIGKILL)
    refused(quick("jobs", "logs", "-f"), f"{id} is failed: the kernel of ticks died")
    until(lambda: mine(tmp_path) == [])


@pytest.mark.parametrize("front", [True, False], ids=["foreground", "background"])
def test_cancel_and_resume(quick: Callable[..., Done], tmp_path: Path, ticks: Path, front: bool) -> None:
    """From another terminal, also what runs in the foreground; nothing of it is left."""
    if front:
        words = command("run", ticks, "-p", "ticks", "600", "--out", "run")
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    else:
        begin(quick, ticks, "-p", "ticks", "600", "--out", "run")
    until(lambda: ticking(tmp_path / "run"))
    id = row(quick)["id"]
    done = quick("jobs", "cancel", id)
    assert (done.code, done.out) == (0, f"{id} is cancelled\n"), done.err
    if front:
        assert process.communicate(timeout=30)[1] == "interrupted\n" and process.returncode == 2
    assert mine(tmp_path) == []
    refused(quick("jobs", "cancel", id), "it is cancelled")
    assert quick("jobs", "resume", id).code == 0
    words = command("jobs", "logs", "-f", id)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    follower = subprocess.Popen(words, **pipes)
    assert id in follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    assert follower.communicate(timeout=30)[1] == f"{id} goes on; follow it with: llmkit jobs logs -f {id}\n"
    assert row(quick)["state"] == "running"
    assert quick("jobs", "cancel", id).code == 0


def test_sigterm_is_preemption(quick: Callable[..., Done], tmp_path: Path, ticks: Path) -> None:
    """Somebody wants the machine back: code 75, half a notebook, and the same command goes on."""
    words = command("run", ticks, "-p", "ticks", "20", "--out", "run")
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(lambda: ticking(tmp_path / "run"))
    process.send_signal(signal.SIGTERM)
    assert "was told to stop; go on with: llmkit jobs resume" in process.communicate(timeout=30)[1]
    assert process.returncode == 75 and row(quick)["state"] == "preempted"
    book = json.loads((tmp_path / "run/ticks.ipynb").read_text())
    assert not book["metadata"]["papermill"]["end_time"]
    assert quick("run", ticks, "-p", "ticks", "20", "--out", "run").code == 0
    assert row(quick)["state"] == "finished"


def test_two_on_one_folder(quick: Callable[..., Done], tmp_path: Path, ticks: Path) -> None:
    """Four at the same moment: one runs, the others say who it is."""
    words = command("run", ticks, "-p", "ticks", "600", "--out", "run", "--background")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    many = [subprocess.Popen(words, **pipes) for _ in range(4)]
    said = [process.communicate(timeout=60) for process in many]
    assert sorted(process.returncode for process in many) == [0, 2, 2, 2], said
    assert all("is in use by" in err for process, (_, err) in zip(many, said, strict=True) if process.returncode)
    id = row(quick, "run")["id"]
    refused(quick("run", ticks, "-p", "ticks", "600", "--out", "run"), "is in use by", id)
    refused(quick("jobs", "resume", id), "is in use by", "llmkit jobs cancel")
    refused(quick("jobs", "fetch", id, "copy"), "is running", "when it has ended")
    assert len(quick("jobs").out.splitlines()) == 2
    quick("jobs", "cancel", id)


def test_a_launcher_that_dies_before_it_starts(quick: Callable[..., Done], tmp_path: Path, ticks: Path) -> None:
    """Killed between booking and starting: no job that waits for ever, and it can still be started."""
    code = (
        "import os, signal\nimport llmkit.runner.attempt as a\n"
        "a.spawn = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"from llmkit.cli.main import main\nmain(['run', {str(ticks)!r}, '--background'])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == -signal.SIGKILL
    stands = row(quick)
    assert stands["state"] == "failed" and "never started" in stands["message"]
    assert quick("jobs", "resume", stands["id"]).code == 0
    assert quick("jobs", "logs", "-f").code == 0


SWEEP = ("-p", "ticks", "5,6,7", "-p", "name", "b", "--sweep", "--out", "sweep")


def notebooks(tmp_path: Path) -> dict[str, int]:
    """When each finished run of the sweep was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("sweep/*/result.json")}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_killed(quick: Callable[..., Done], tmp_path: Path, ticks: Path, number: int) -> None:
    """Its runs end with it; a resume keeps what is finished and makes no second parent run."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    process = subprocess.Popen(command("run", ticks, *SWEEP), **pipes)
    until(lambda: (tmp_path / "sweep/001/result.json").exists() and ticking(tmp_path / "sweep/002"))
    process.send_signal(number)
    process.wait(timeout=60)
    until(lambda: mine(tmp_path) == [])
    assert row(quick, "sweep")["state"] == "preempted"
    assert row(quick, "sweep/002")["state"] == "preempted"
    if number == signal.SIGTERM:
        return  # what comes now is the same
    kept = notebooks(tmp_path)
    done = quick("run", ticks, *SWEEP, "--parallel", "2")
    assert done.code == 0, done.err
    assert [line.split()[:3] for line in done.out.splitlines()[-5:-2]] == [
        [f"00{n}", f"{n + 4}", "finished"] for n in (1, 2, 3)
    ]
    assert kept.items() <= notebooks(tmp_path).items() and len(notebooks(tmp_path)) == 3
    assert "Fatal" not in (tmp_path / "sweep/003/log.txt").read_text()  # how a process ends whose stdin is being read
    from llmkit.core.tracking import tracking_client

    client = tracking_client(f"sqlite:///{tmp_path / 'sweep/mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("ticks").experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == 4 and len(parents) == 1 and parents[0].info.status == "FINISHED"
    refused(quick("run", ticks, *SWEEP), "holds a finished run")


def test_a_sweep_in_the_background_is_cancelled(quick: Callable[..., Done], tmp_path: Path, ticks: Path) -> None:
    id = begin(quick, ticks, "-p", "ticks", "600,700,800", "--sweep", "--parallel", "2")
    folder = tmp_path / "runs" / id
    until(lambda: ticking(folder / "001") and ticking(folder / "002"))
    assert not (folder / "003").exists()
    assert quick("jobs", "cancel", id).out == f"{id} is cancelled\n"
    assert mine(tmp_path) == []
    assert [line.split()[2] for line in quick("jobs", "show", id).out.splitlines()[-5:-2]] == [
        "cancelled",
        "cancelled",
        "queued",
    ]


def test_bad_calls(quick: Callable[..., Done], tmp_path: Path, ticks: Path, job: Callable[..., Path]) -> None:
    """One line each, and nothing is made."""
    import nbformat

    book = nbformat.read(ticks, 4)
    book.cells[0].metadata["tags"] = []
    nbformat.write(book, tmp_path / "bare.ipynb")
    book.cells[0].metadata["tags"] = ["injected-parameters"]
    nbformat.write(book, tmp_path / "copy.ipynb")
    (tmp_path / "broken.yml").write_text("ticks: [1\n")
    (tmp_path / "list.yml").write_text("- 1\n")
    (tmp_path / "typo.yml").write_text("tick: 1\n")
    before = {p.name for p in tmp_path.iterdir()}
    for words, parts in (
        (["run", "bare.ipynb"], ["no cell tagged 'parameters'"]),
        (["run", "copy.ipynb"], ["the executed copy of another run"]),
        (["run", ticks, "-f", "broken.yml"], ["broken.yml: not valid YAML"]),
        (["run", ticks, "-f", "list.yml"], ["list.yml holds no settings"]),
        (["run", ticks, "-f", "gone.yml"], ["gone.yml"]),
        (["run", ticks, "-f", "typo.yml"], ["no parameter 'tick'", "did you mean 'ticks'?"]),
        (["run", ticks, "-p", "ticks", "1,2"], ["ticks = (1, 2)", "whole number"]),
        (["run", ticks, "-p", "ticks", "1", "--sweep"], ["several values"]),
        (["run", ticks, "-p", "ticks", "1,x", "--sweep"], ["ticks = 'x'", "whole number"]),
        (["run", ticks, "-p", "tick", "1,2", "--sweep"], ["no parameter 'tick'"]),
        (["run", ticks, "--parallel", "2"], ["--parallel 2", "--sweep"]),
        (["run", ticks, "--compute", "gpu"], ["--compute gpu", "--on azureml"]),
        (["run", ticks, "--on", "azurml"], ["no place 'azurml'", "did you mean 'azureml'?"]),
        (["jobs", "show"], ["no job yet", "--background"]),
        (["jobs", "show", "nothing"], ["no run 'nothing'", "llmkit jobs"]),
        (["jobs", "cancel", "nothing"], ["no run 'nothing'"]),
        (["jobs", "shwo"], ["shwo", "llmkit jobs --help"]),
    ):
        refused(quick(*words), *parts)
        assert {p.name for p in tmp_path.iterdir()} == before, words


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[list[Path]]:
    """The files below the temporary folder that this process opens, in order."""
    found: list[Path] = []
    on = True

    def hook(event: str, args: tuple) -> None:
        if on and event == "open" and str(args[0]).startswith(str(tmp_path)):
            found.append(Path(args[0]).relative_to(tmp_path))

    sys.addaudithook(hook)
    yield found
    on = False  # a hook cannot be taken away


def test_ten_thousand_runs(quick: Callable[..., Done], tmp_path: Path, opened: list[Path]) -> None:
    """The list opens the files of what it shows and nothing else, and reads the index from its end."""
    (tmp_path / "runs").mkdir()
    with open(tmp_path / "runs/jobs.jsonl", "w") as f:
        for n in range(10_000):
            folder = tmp_path / f"runs/old-{n}"
            if n >= 9_000:  # the others were deleted
                folder.mkdir()
                (folder / "status.json").write_text(json.dumps({"id": folder.name, "state": "finished"}))
            f.write(json.dumps({"id": folder.name, "where": "here", "folder": str(folder)}) + "\n")
    opened.clear()
    done = quick("jobs", "list", "--json")
    assert [json.loads(line)["id"] for line in done.out.splitlines()] == [f"old-{n}" for n in range(9_999, 9_979, -1)]
    newest = [Path(f"runs/old-{n}/status.json") for n in range(9_980, 10_000)]
    assert sorted(path for path in opened if path.name != "jobs.jsonl") == sorted(newest)
    opened.clear()
    refused(quick("jobs", "show", "odl-7"), "no run 'odl-7'", "did you mean 'old-9")
    assert {path.name for path in opened} == {"jobs.jsonl"}
