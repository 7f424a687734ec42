"""Bad input at the command line: one line that says what to do, exit code 2, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Done, command


def refused(done: Done, *parts: str, code: int = 2) -> None:
    """The command failed with one line on stderr that holds `parts` and says what to do."""
    assert done.code == code, done.err
    assert len(done.err.splitlines()) == 1 and done.err.startswith("error: "), done.err
    assert all(part in done.err for part in parts), done.err
    assert "; " in done.err, f"does not say what to do: {done.err}"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["quikstart"], ["no command 'quikstart'", "did you mean 'quickstart'?"]),
        (["quickstart", "--sed", "1"], ["--sed", "llmkit quickstart --help"]),
        (["quickstart", "--seed", "one"], ["--seed", "llmkit quickstart --help"]),
        (["quickstart", "--preset", "big"], ["no preset 'big'", "quickstart, tiny"]),
        (["quickstart", "--resume"], ["runs/quickstart does not exist", "start without --resume"]),
        (["run"], ["'notebook'", "llmkit run --help"]),
        (["run", "trian_model"], ["did you mean 'train_model'?"]),
        (["run", "nothing/here.ipynb"], ["nothing/here.ipynb does not exist"]),
        (["run", "train_model", "-p", "learning_rate", "1e-3"], ["no parameter 'learning_rate'"]),
        (["run", "train_model", "-p", "step", "3"], ["did you mean 'steps'?"]),
        (["run", "train_model", "-p", "lr", "fast"], ["lr = 'fast'", "must be a number"]),
        (["run", "train_model", "-p", "steps", "1.5"], ["steps = 1.5", "must be a whole number"]),
        (["run", "train_model", "-p", "lr", "-1"], ["lr = -1", "must be above 0"]),
        (["run", "train_model", "-p", "lr"], ["'lr'"]),
        (["serve", "model=nothing"], ["nothing"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) and v and not v[0].startswith(("no ", "did")) else "",
)
def test_a_wrong_call(llmkit: Callable[..., Done], tmp_path: Path, words: list[str], parts: list[str]) -> None:
    refused(llmkit(*words), *parts)
    assert list(tmp_path.iterdir()) == []


BAD_DATA = {
    "not UTF-8": ("latin.txt", "caf\xe9 au lait".encode("latin-1"), ["latin.txt", "UTF-8"]),
    "invalid JSON": ("rows.jsonl", b'{"text": "fine"}\n{"text": \n', ["rows.jsonl", "line 2"]),
    "unknown row": ("rows.jsonl", b'{"words": "fine"}\n', ["rows.jsonl", "line 1"]),
    "empty data set": ("empty.jsonl", b"", []),
    "too little text": ("short.txt", b"a few words\n", []),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(llmkit: Callable[..., Done], tmp_path: Path, case: str) -> None:
    name, content, parts = BAD_DATA[case]
    (tmp_path / name).write_bytes(content)
    refused(llmkit("quickstart", "--preset", "tiny", "--data", name), *parts)
    assert [p.name for p in tmp_path.iterdir() if p.name != "runs"] == [name]
    assert not (tmp_path / "runs/quickstart").exists()


def test_a_missing_file(llmkit: Callable[..., Done], tmp_path: Path) -> None:
    refused(llmkit("quickstart", "--data", "nothing.txt"), "nothing.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_ours(llmkit: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(llmkit("quickstart", "--out", "."), "is not empty", "--resume", "--out")
    refused(llmkit("quickstart", "--out", ".", "--resume"), "holds no run to resume")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with random weights."""
    from llmkit.core.tiny import tiny_model

    return tiny_model(tmp_path / "model")


def test_a_model_without_weights(llmkit: Callable[..., Done], model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    refused(llmkit("serve", f"m={model}"), str(model), "safetensors")


def test_a_model_with_a_pickle(llmkit: Callable[..., Done], model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(llmkit("serve", f"m={model}"), "pytorch_model.bin")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--variant", "int3"], ["has no variant 'int3'"]),
        (["--engine", "vllm"], ["vllm is not installed", "pip install vllm"]),
        (["--engine", "vllm", "--kv-gb", "2"], ["kv_gb = 2.0"]),
        (["--engine", "ort", "--variant", "torch"], ["variant = 'torch'"]),
    ],
    ids=lambda v: " ".join(v) if v and v[0].startswith("--") else "",
)
def test_an_engine_that_cannot_be(
    llmkit: Callable[..., Done], model: Path, options: list[str], parts: list[str]
) -> None:
    """The engine's own process fails, and says no more than the sentence."""
    refused(llmkit("serve", f"m={model}", "--port", "0", *options), *parts)


def test_a_port_in_use_names_the_next_free_one(llmkit: Callable[..., Done], model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(llmkit("serve", f"m={model}", "--port", str(port)), str(port), "--port")


def test_papermill_pairs_reach_the_job(llmkit: Callable[..., Done], tmp_path: Path, job: Callable[..., Path]) -> None:
    import nbformat

    path = job("says", "out = ''\nword = 'a'\nn = 1\nflags = []", "word, n, flags")
    done = llmkit("run", path, "-p", "word", "0012345", "-p", "n=7", "-p", "flags", "['x', 'y']", "--out", "said")
    assert done.code == 0, done.err
    book = nbformat.read(tmp_path / "said/says.ipynb", 4)
    assert book.cells[-1].outputs[0]["data"]["text/plain"] == "('0012345', 7, ['x', 'y'])"
    assert done.out.splitlines()[-1] == "said/says.ipynb"
    refused(llmkit("run", path, "--out", "said", "-p", "n", "8"), "holds a finished run")


def test_a_failing_job(llmkit: Callable[..., Done], tmp_path: Path, job: Callable[..., Path]) -> None:
    path = job("fails", "n = 0", "1 / n")
    done = llmkit("run", path, "--out", "run")
    refused(done, "fails failed with ZeroDivisionError: division by zero", "run/fails.ipynb")
    assert (tmp_path / "run/fails.ipynb").exists()


def test_a_killed_kernel(llmkit: Callable[..., Done], job: Callable[..., Path]) -> None:
    done = llmkit(
        "run", job("dies", "n = 0", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"), "--out", "run"
    )
    refused(done, "the kernel of dies died", "kernel.log")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job(tmp_path: Path, job: Callable[..., Path], number: int) -> None:
    path = job("sleeps", "n = 60", "import time\nopen('began', 'w').close()\ntime.sleep(n)")
    words = command("run", path, "--out", "run")
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    if number == signal.SIGINT:
        assert (process.returncode, err) == (2, "interrupted\n")
    else:  # somebody wants the machine back
        refused(Done(process.returncode, "", err), "was told to stop", "llmkit jobs resume sleeps-", code=75)
    assert not (tmp_path / "run/.kernel.json").exists()


def test_ctrl_c_before_anything_ran(tmp_path: Path) -> None:
    """At any moment: also while Python is still importing."""
    code = "import signal, llmkit.cli.main as m\nm.dispatch = lambda w: signal.raise_signal(signal.SIGINT)\nm.main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "interrupted\n")


def test_console_script_and_module_are_the_same(llmkit: Callable[..., Done]) -> None:
    script = Path(sys.executable).with_name("llmkit")
    done = subprocess.run([script, "version"], capture_output=True, text=True, env=os.environ)
    assert done.stdout == llmkit("version").out != ""


def test_every_command_has_help(llmkit: Callable[..., Done]) -> None:
    from llmkit.cli.main import COMMANDS

    for name in COMMANDS:
        done = llmkit(name, "--help")
        assert done.code == 0 and f"llmkit {name}" in done.out, done.err


def test_show_lists_the_parameters(llmkit: Callable[..., Done], tmp_path: Path) -> None:
    done = llmkit("run", "train_model", "--show")
    assert done.code == 0 and any(line.startswith("lr ") for line in done.out.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_something_about_each_group(llmkit: Callable[..., Done]) -> None:
    out = llmkit("doctor").out
    assert all(word in out for word in ("engine", "accelerator", "extra", "service"))
