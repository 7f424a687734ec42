"""What the ranks of test_distributed.py run, each function in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmkit.models.factory import ModelConfig, build
from llmkit.training.distributed import Objective, bare, digest, make_strategy
from llmkit.training.portable import whole

ROWS, LENGTH = 8, 16  # of a global batch
SHORT = {"timeout": 10.0}


def net(seed: int = 0) -> Any:
    """A two-layer decoder."""
    return build(ModelConfig(vocab_size=64, arch="qwen3"), seed)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Goes around the model's own forward, as llmkit's loss does."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return nn.functional.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), ids[:, 1:].flatten())


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.003, betas=(0.9, 0.95))


def batch(step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
    """A rank's rows of the global batch of a step."""
    ids = torch.randint(0, 64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    return ids[rank::world]


def advance(strategy: Any, objective: Any, optimizer: Any, step: int, micro: int = 1) -> float:
    """One step in `micro` micro-batches; its loss."""
    total = torch.zeros(())
    for i, ids in enumerate(batch(step, strategy.rank, strategy.world).chunk(micro)):
        with strategy.accumulate(objective, i == micro - 1):
            with strategy.autocast():
                loss = objective(ids)
            strategy.backward(loss / micro, objective)
        total += loss.detach() / micro
    strategy.step(objective, optimizer, max_norm=0.5)
    return strategy.mean(total).item() if strategy.calls > 1 else checked(strategy, objective, loss, total)


def checked(strategy: Any, objective: Any, loss: torch.Tensor, total: torch.Tensor) -> float:
    """The mean loss of the first step, after verify."""
    global verified
    verified = strategy.verify(objective, loss)
    return strategy.mean(total).item()


verified: Any = None


def train(name: str, steps: int = 8, micro: int = 1, save: str = "", load: str = "", first: int = 0, **how: Any) -> Any:
    """Losses, and a fingerprint of the weights at the end."""
    options = {} if name == "single" else SHORT | how.pop("options", {})
    strategy = make_strategy(name, device="cpu", **how, **options)
    objective, optimizer = strategy.prepare(Objective(net(seed=7 if load else 0), loss_of), adam)
    if load:
        strategy.load(objective, optimizer, Path(load))
    losses = [advance(strategy, objective, optimizer, step, micro) for step in range(first, first + steps)]
    if save:
        strategy.save(objective, optimizer, Path(save))
    weights = strategy.full_state(objective)
    facts = verified.facts | {"wrapper": verified.wrapper, "world": verified.world}
    strategy.close()
    return {"losses": losses, "weights": digest(weights.values()), "names": sorted(weights), "facts": facts}


def several(names: list[str], **how: Any) -> dict[str, Any]:
    """`train` with one strategy after another in the same processes."""
    return {name: train(name, **how) for name in names}
