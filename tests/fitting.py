"""Tiny trainings that tests run here, in other processes, and until they are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from llmkit.core.errors import LLMKitError
from llmkit.core.tiny import TEXTS, tiny_tokenizer
from llmkit.data.dataset import Dataset
from llmkit.models.factory import ModelConfig, build
from llmkit.training.adapted import add_adapter
from llmkit.training.adapter import Adapter
from llmkit.training.batches import Packed
from llmkit.training.distributed import make_strategy
from llmkit.training.loop import fit, state_for
from llmkit.training.recipe import Recipe

KINDS: dict[str, dict[str, Any]] = {
    "pretraining": {"optimizer": "muon", "lr": 0.01, "long": "split"},
    "pretraining in bf16": {"precision": "bf16", "lr": 0.01, "long": "split", "micro_batch": 1},
    "fine-tuning": {"lr": 0.01, "micro_batch": 2, "gradient_checkpointing": True},
    "fine-tuning in fp16": {"precision": "fp16", "lr": 0.01, "micro_batch": 3},
    "lora": {"lr": 0.02, "micro_batch": 1},
    "dora": {"lr": 0.02, "micro_batch": 2},
    "qlora": {"lr": 0.02, "micro_batch": 1, "precision": "bf16"},
    "pissa": {"lr": 0.02, "micro_batch": 1},
    "ia3": {"lr": 0.1, "micro_batch": 1, "gradient_checkpointing": True},
}
DROPPED = ("lora", "dora", "qlora", "pissa")  # methods whose matrices can have dropout


class KilledError(Exception):
    """Stands for the end of the process."""


def write_data(folder: Path) -> None:
    """Text and conversations, some of them longer than a row."""
    texts = [{"text": t * (1 + i % 3)} for i, t in enumerate(TEXTS)]
    pairs = [{"prompt": t.split("(")[0], "completion": t.split('"""')[1] * (1 + i % 7)} for i, t in enumerate(TEXTS)]
    for name, rows in (("texts", texts), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def model_for(kind: str, dropout: bool = True) -> Any:
    """A model with dropout; a kind that is an adapter has one, with dropout if it can."""
    net = build(ModelConfig.tiny(512), seed=0)
    for layer in net.model.layers:
        layer.self_attn.attention_dropout = 0.1 if dropout else 0.0
    if kind in (*DROPPED, "ia3"):
        dials = {"rank": 4, "alpha": 8.0, "dropout": 0.1 * dropout} if kind in DROPPED else {}
        add_adapter(net, Adapter(method=kind, **dials))
    return net


def training(
    folder: str,
    kind: str = "fine-tuning",
    name: str = "run",
    strategy: str = "single",
    every: int = 2,
    die: int = 1000,
    dropout: bool = True,
    **over: Any,
) -> tuple[list[float], Any]:
    """Losses and model of a run of eight steps that continues what is there; `die` batches
    are its last."""
    home = Path(folder)
    settings: dict[str, Any] = {"steps": 8, "batch_size": 6, "length": 64, "warmup": 2, "seed": 3}
    recipe = Recipe(**(settings | KINDS[kind] | over))
    data = Dataset(home / ("texts.jsonl" if "pretraining" in kind else "pairs.jsonl"))
    batches = Packed(data, tiny_tokenizer(), recipe, window=10)
    given = batches.next
    net = model_for(kind, dropout)

    def deadly() -> Any:
        nonlocal die
        die -= 1
        if die == -1:
            raise KilledError
        return given()

    batches.next = deadly  # type: ignore[method-assign]
    state = state_for(home / name, net, batches, recipe, every)
    made = make_strategy(strategy, recipe.precision, "cpu")
    try:
        return fit(net, batches, recipe, made, state), net
    finally:
        made.close()


def ranks(**options: Any) -> list[float]:
    """The losses, for a launcher."""
    return training(**options)[0]


def several(kinds: list[str], strategy: str, **options: Any) -> dict[str, list[float]]:
    """The losses of several kinds, one after the other in the same processes."""
    return {k: training(kind=k, name=f"{strategy}-{k}", strategy=strategy, **options)[0] for k in kinds}


def main() -> None:
    """`python fitting.py FOLDER [STEP]`: train, be sent SIGTERM in that step, print the losses."""
    folder, step = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else -1
    calls = 0

    def told(module: Any, inputs: Any) -> None:
        nonlocal calls
        calls += type(module).__name__ == "Objective"
        if calls == step:
            os.kill(os.getpid(), signal.SIGTERM)

    torch.nn.modules.module.register_module_forward_pre_hook(told)
    try:
        print(json.dumps(training(folder, name="told")[0]))
    except LLMKitError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
