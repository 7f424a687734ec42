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
from llmkit.training.distributed import Objective, digest, make_strategy
from llmkit.training.group import LEFT
from llmkit.training.optim import make_adamw

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
    """Two groups: weight decay on matrices."""
    return make_adamw(model, 0.003, weight_decay=0.1)


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


def tour(names: list[str], home: str, **options: float) -> dict[str, Any]:
    """For each strategy: 8 steps; 4 steps and a checkpoint; the last 4 steps from the checkpoint of one process."""
    found: dict[str, Any] = {}
    for name in names:
        found[name] = train(name, options=options)
        train(name, steps=4, save=f"{home}/{name}", options=options)
        found[name]["rest"] = train(name, steps=4, first=4, load=f"{home}/single", options=options)["losses"]
    return found


def resumable(name: str, home: str, deaths: list[list[int]], steps: int = 8) -> list[float]:
    """Train with a checkpoint after every step; rank r dies before step s, once, for every [r, s] of `deaths`."""
    strategy = make_strategy(name, device="cpu", **SHORT)
    objective, optimizer = strategy.prepare(Objective(net(), loss_of), adam)
    last = Path(home) / "last.json"
    losses = json.loads(last.read_text()) if last.exists() else []
    strategy.barrier()  # nobody writes before all have read
    if losses:
        strategy.load(objective, optimizer, Path(home) / f"step-{len(losses)}")
    for step in range(len(losses), steps):
        for rank, when in deaths:
            mark = Path(home) / f"dead-{rank}-{when}"
            if (rank, when) == (strategy.rank, step) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        losses.append(advance(strategy, objective, optimizer, step))
        strategy.save(objective, optimizer, Path(home) / f"step-{step + 1}")
        if strategy.rank == 0:
            last.with_suffix(".part").write_text(json.dumps(losses))
            last.with_suffix(".part").replace(last)
    strategy.close()
    return losses


def many_groups(n: int) -> int:
    """Join a group, train some steps with compressed gradients, leave it, `n` times; how many are held."""
    for i in range(n):
        strategy = make_strategy("ddp", device="cpu", compression=("powersgd", "fp16")[i % 2], timeout=20.0)
        objective, optimizer = strategy.prepare(Objective(net(), loss_of), adam)
        for step in range(4):
            strategy.backward(objective(batch(step, strategy.rank, strategy.world)), objective)
            strategy.step(objective, optimizer, 1.0)
        strategy.close()
    return len({id(group) for group in LEFT})


def absent() -> None:
    """Rank 1 does not come."""
    if os.environ["RANK"] == "1":
        time.sleep(60)
    make_strategy("ddp", device="cpu", timeout=2.0)
