"""Trainings that are killed, told to leave, and spread over processes are the trainings that were not."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fitting
import pytest
import torch
from conftest import command
from fitting import KINDS, KilledError, ranks, training, write_data
from safetensors.torch import load_file

from llmkit.core.errors import ModelError
from llmkit.core.tiny import tiny_tokenizer
from llmkit.data.dataset import Dataset
from llmkit.training.batches import Packed
from llmkit.training.launch import launch
from llmkit.training.loop import fit, state_for
from llmkit.training.recipe import Recipe


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with data."""
    write_data(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_equal(kind: str, home: Path) -> None:
    """Killed at random steps, twice: the same losses and weights as uninterrupted, to the bit, ten times."""
    losses, model = training(str(home), kind, "whole")
    assert losses[-1] < losses[0]
    chance = random.Random(kind)
    for case in range(10):
        first, every = chance.randrange(1, 8), chance.randrange(1, 5)
        for die in (first, chance.randrange(0, 8 - first + first % every), 1000):
            torch.manual_seed(chance.randrange(1000))  # what a new process would have
            try:
                again, same = training(str(home), kind, f"run{case}", every=every, die=die)
                break
            except KilledError:
                continue
        assert again == losses, (case, first, every)
        assert all(a.equal(b) for a, b in zip(model.parameters(), same.parameters(), strict=True)), case


def process(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """fitting.py in a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code = [sys.executable, fitting.__file__, str(home), *words]
    return subprocess.run(code, capture_output=True, text=True, env=env, timeout=120)


def test_told_to_leave(home: Path) -> None:
    """SIGTERM in a step: a checkpoint after it, code 75, and the next process ends as if nothing was."""
    whole = training(str(home), name="whole")[0]
    left = process(home, "8")  # the second micro-batch of step 3
    assert left.returncode == 75, left.stderr
    assert "told to stop after step 3" in left.stderr and "start it again" in left.stderr
    assert [p.name for p in (home / "told").glob("step-*")] != []
    again = process(home)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == whole


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_read_the_same_rows(strategy: str, home: Path) -> None:
    """The losses of one process, and a checkpoint of two goes on in one."""
    alone = training(str(home), name="alone", dropout=False, micro_batch=1)[0]
    options = {"folder": str(home), "strategy": strategy, "name": strategy, "dropout": False, "micro_batch": 2}
    target = f"{fitting.__file__}:ranks"
    both = launch(target, nproc=2, arguments=options, folder=home / "launch", restarts=0, echo=None).value
    assert both == pytest.approx(alone, abs=1e-5)
    saved = home / strategy / "step-00000006"
    assert saved.is_dir()
    for later in (home / strategy).glob("step-00000008"):
        later.rename(home / "later")
    torch.manual_seed(0)
    assert ranks(folder=str(home), name=strategy, dropout=False, micro_batch=2) == pytest.approx(alone, abs=1e-5)


def test_a_checkpoint_of_an_adapter_holds_what_is_trained(home: Path) -> None:
    """Names of the adapter and its optimizer alone, a fraction of the model's bytes; another base is refused."""
    net = training(str(home), "dora", "run")[1]
    newest = max((home / "run").glob("step-*"))
    names = json.loads((newest / "weights/portable.json").read_text())["tensors"]
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {n.removeprefix("model/") for n in names if n.startswith("model/")} == trained
    assert {n.split("/")[1] for n in names if n.startswith("optimizer/")} == trained
    assert len(trained) < len(list(net.parameters()))
    with torch.no_grad():
        frozen = next(p for p in net.parameters() if not p.requires_grad)
        frozen += 1
    recipe = Recipe(**({"steps": 8, "batch_size": 6, "length": 64, "warmup": 2, "seed": 3} | KINDS["dora"]))
    batches = Packed(Dataset(home / "pairs.jsonl"), tiny_tokenizer(), recipe, window=10)
    with pytest.raises(ModelError, match="are of another run: frozen was"):
        fit(net, batches, recipe, state=state_for(home / "run", net, batches, recipe))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adapters_on_two_processes(strategy: str, home: Path) -> None:
    """The losses of one process, and a checkpoint of two goes on in one."""
    kinds = ["dora", "ia3", *(["qlora"] if strategy == "ddp" else ["pissa"])]
    options = {"folder": str(home), "dropout": False, "micro_batch": 2, "precision": "fp32"}
    target = f"{fitting.__file__}:several"
    both = launch(target, 2, arguments=options | {"strategy": strategy, "kinds": kinds}, folder=home / "launch").value
    for kind in kinds:
        alone = training(name=f"alone-{kind}", kind=kind, **options)[0]
        assert both[kind] == pytest.approx(alone, abs=2e-5), kind
        assert (home / f"{strategy}-{kind}/step-00000006").is_dir()
        (home / f"{strategy}-{kind}/step-00000008").rename(home / f"later-{kind}")
        again = training(name=f"{strategy}-{kind}", kind=kind, **options)[0]
        assert again == pytest.approx(alone, abs=2e-5), kind


def test_a_job_is_told_to_leave(tmp_path: Path) -> None:
    """SIGTERM to `llmkit run train_model`: code 75, and the same command then ends as if nothing was."""
    given = ["-p", "steps", "120", "-p", "sft_steps", "4", "-p", "checkpoint_every", "7", "-p", "precision", "fp32"]
    words = command("run", "train_model", "--out", "run", *given)
    env = os.environ | {"COLUMNS": "200"}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(words, cwd=tmp_path, env=env, **pipes)
    while not any(tmp_path.glob("run/checkpoints/pretrain/step-*")):
        assert first.poll() is None, first.stderr.read() if first.stderr else ""
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 75, error
    assert "told to stop after pretraining step" in error
    again = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    words[words.index("run", words.index("--out"))] = "whole"
    whole = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert whole.returncode == 0, whole.stderr
    cards = [json.loads((tmp_path / name / "model/llmkit.json").read_text()) for name in ("run", "whole")]
    assert cards[0]["metrics"] == cards[1]["metrics"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("zero2", marks=pytest.mark.soak)])
def test_train_model_on_two_processes(strategy: str, tmp_path: Path) -> None:
    """`llmkit train --nproc 2` writes the model that one process writes, up to rounding."""
    given = ["-p", "steps", "6", "-p", "sft_steps", "3", "-p", "precision", "fp32", "-p"]
    data = ["data", str(tmp_path / "one/data")]
    if strategy.startswith("zero"):
        given = ["-p", "optimizer", "adamw", "-p", "lr", "0.003", *given]
    env = os.environ | {"COLUMNS": "200"}
    for words in (
        ["--out", "one", *given[:-1]],
        ["--out", "two", "--nproc", "2", "--strategy", strategy, *given, *data],
    ):
        done = subprocess.run(
            command("train", *words), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr
    cards = [json.loads((tmp_path / name / "model/llmkit.json").read_text())["metrics"] for name in ("one", "two")]
    assert cards[1] == pytest.approx(cards[0], abs=1e-4)
    assert not (tmp_path / "two/checkpoints").exists()
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(w, weights[1][name], atol=2e-2) for name, w in weights[0].items())


@pytest.mark.soak
def test_train_model_on_two_nodes(tmp_path: Path) -> None:
    """`llmkit train --nnodes 2` on each of two nodes: both end well, and leave the model that one process writes."""
    given = ["-p", "steps", "6", "-p", "sft_steps", "3", "-p", "precision", "fp32"]
    env = os.environ | {"COLUMNS": "200"}
    one = subprocess.run(
        command("train", "--out", "one", *given), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250
    )
    assert one.returncode == 0, one.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = ["--nnodes", "2", *given, "-p", "data", str(tmp_path / "one/data"), "-p", "shared", str(tmp_path / "two")]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    nodes = [
        subprocess.Popen(command("train", "--out", f"node{n}", *words), env=env | {"NODE_RANK": str(n)}, **pipes)
        for n in (0, 1)
    ]
    errors = [p.communicate(timeout=250)[1] for p in nodes]
    assert [p.returncode for p in nodes] == [0, 0], errors
    cards = [json.loads((tmp_path / name / "model/llmkit.json").read_text())["metrics"] for name in ("one", "two")]
    assert cards[1] == pytest.approx(cards[0], abs=1e-4)
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(w, weights[1][name], atol=2e-2) for name, w in weights[0].items())
    for n in (0, 1):
        heard = [json.loads(line) for line in (tmp_path / f"node{n}/metrics.jsonl").read_text().splitlines()]
        assert any("tokens_per_s" in line for line in heard), n
    assert not (tmp_path / "two/checkpoints").exists()
