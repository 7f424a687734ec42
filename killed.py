# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: id,tags
#     notebook_metadata_filter: kernelspec
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown] id="44cbf04b"
# # killed
#
# > Runs that are killed at every step and continued, against the run that was not: trl's checkpoints and ours.

# %% id="70ce71a0"
#| default_exp training.killed

# %% [markdown] id="bbcadfee"
# That a run can be continued is easily said. Here every method is killed after each of its steps, continued by new
# objects from what lies on the disk, and compared with a run that nobody disturbed: the hash of the weights, and every
# number of every step.

# %% id="40eeab52"
#| export
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmkit.core.card import ModelCard
from llmkit.core.tiny import tiny_tokenizer
from llmkit.models.factory import ModelConfig, build, save_model
from llmkit.training.history import Tuned, Watch
from llmkit.training.ppo import PPOConfig, train_ppo
from llmkit.training.rlhf import GroupConfig, Task, TuneConfig, train_offline, train_online
from llmkit.training.rows import sums, wrong_sums

STEPS, PER_ROLLOUT = 12, 4
METHODS = ("DPO", "GRPO", "RLOO", "PPO")


# %% [markdown] id="3330841a"
# The runs: twelve steps, for which the sampling methods write three rollouts of four steps each (two slices, gone
# through twice). The preference pairs are 25 and the batch is four, so that a kill may also fall between two epochs.

# %% id="ddbb0e0f"
#| export
def digits(prompt: str, completion: str, **row: Any) -> float:
    "The share of digits in four letters: a reward that even random weights get some of."
    return sum(c.isdigit() for c in completion) / 4


# %% id="5972d99e"
#| export
def start_model(folder: Path) -> Path:
    "A random model of two layers, made once in `folder`."
    if not (folder / "config.json").exists():
        tokenizer = tiny_tokenizer(264)
        save_model(build(ModelConfig.tiny(len(tokenizer)), seed=0), tokenizer, folder)
    return folder


# %% id="72ee9783"
#| export
def small_run(
    method: str,  # one of METHODS
    home: Path,
    checkpoints: Path | None = None,
    watch: Watch | None = None,
    exact: bool = True,  # False: trl's trainer as it is
    every: int = 1,  # steps between checkpoints
) -> Tuned:
    "Twelve steps of a method."
    start, pairs = start_model(home / "start"), wrong_sums(sums(5))
    common: dict[str, Any] = {"steps": STEPS, "lr": 0.01, "chat": False, "checkpoint_every": every}
    out = home / f"out-{method}"
    prompts = [{"prompt": p["prompt"]} for p in pairs]
    if method == "PPO":
        config = PPOConfig(batch=8, epochs=2, minibatches=2, new_tokens=3, kl_target=0.01, **common)
        return train_ppo(start, prompts, digits, config, out, checkpoints=checkpoints, watch=watch)
    if method == "DPO":
        return train_offline(
            Task(method, start, pairs, TuneConfig(batch=4, **common), checkpoints, exact=exact), out, watch
        )
    group = GroupConfig(batch=8, per_rollout=2, epochs=2, new_tokens=3, **common)
    return train_online(Task(method, start, prompts, group, checkpoints, digits, exact=exact), out, watch)


# %% id="0d29bca8"
#| export
class Killed(BaseException):
    "What ends a run in the middle here; no handler of errors sees it."


# %% id="bb3f9b1a"
#| export
def killer(step: int) -> Watch:
    "A watch that kills the run after `step`."

    def watch(row: dict[str, float]) -> None:
        if row["step"] == step:
            raise Killed

    return watch


# %% id="211fc4d7"
#| export
def resume_case(
    method: str,
    kill: int,  # the step after which the run is killed
    whole: Tuned,  # the run that was not
    home: Path,
    exact: bool = True,
    every: int = 1,
) -> dict[str, Any]:
    "Kill, continue, compare."
    revision = ModelCard.load(whole.folder).revision
    place = home / f"{method}-{kill}-{every}-{exact}"
    try:
        small_run(method, home / "killed", place, killer(kill), exact, every)
        raise AssertionError(f"{method} was not killed after step {kill}")
    except Killed:
        again = small_run(method, home / "again", place, None, exact, every)
    row: dict[str, Any] = {"method": method, "kill": kill, "in_buffer": method != "DPO" and kill % PER_ROLLOUT > 0}
    row |= {"kept by": "llmkit" if exact or method == "PPO" else "trl"}
    return row | {
        "weights equal": ModelCard.load(again.folder).revision == revision,
        "history equal": again.history == whole.history,
    }


# %% id="6f7c7751"
#| export
def resume_cases(methods: Iterable[str], kills: Iterable[int], home: Path, exact: bool = True) -> list[dict[str, Any]]:
    "`resume_case` of each method at each step."
    kills, rows = list(kills), []
    for method in methods:
        whole = small_run(method, home / "whole")
        rows += [resume_case(method, kill, whole, home, exact) for kill in kills]
    return rows


# %% [markdown] id="92c322ab"
# A few of them here; [the benchmark](../benchmarks/training.ipynb) runs them all.

# %% id="8561aba7"
import tempfile

from fastcore.test import test_eq

home = Path(tempfile.mkdtemp())
ours = resume_cases(["DPO", "GRPO"], [5, 6], home)
test_eq([r["weights equal"] and r["history equal"] for r in ours], [True] * 4)

# %% [markdown] id="d5a31f4b"
# With a checkpoint every third step, a kill after the fifth loses two steps and nothing else:

# %% id="609661d9"
whole = small_run("PPO", home / "whole")
test_eq(resume_case("PPO", 5, whole, home, every=3)["weights equal"], True)

# %% [markdown] id="1a3d8a66"
# trl's own checkpoints, at the boundary between two rollouts and in the middle of one:

# %% id="4fb97b36"
theirs = resume_cases(["GRPO"], [4, 6], home, exact=False)
test_eq([(r["in_buffer"], r["weights equal"]) for r in theirs], [(False, True), (True, False)])
theirs

# %% [markdown] id="5ee1ab5b"
# ## All cases
# `resume_cases(METHODS, range(1, 12), home)`, and the same for trl's checkpoints:
