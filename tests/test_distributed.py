"""Training in several processes: equal losses, checkpoints of any origin, deaths, signals, and what is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ranks

from llmkit.benchmarks.kills import kills, said
from llmkit.benchmarks.nodes import two_nodes
from llmkit.benchmarks.ranks import training
from llmkit.core.errors import ConfigError, LLMKitError, MissingError, RunError
from llmkit.training.distributed import make_strategy
from llmkit.training.launch import launch

RANKS = str(Path(ranks.__file__))
CLOSE = 1e-6


def close(one: list[float], other: list[float]) -> bool:
    """Whether two runs have the same losses, as far as sums in another order allow."""
    return len(one) == len(other) and max(abs(a - b) for a, b in zip(one, other, strict=True)) < CLOSE


def both(function: str, restarts: int = 0, nproc: int = 2, **arguments: Any) -> Any:
    """Run a function of ranks.py in two processes."""
    return launch(f"{RANKS}:{function}", nproc=nproc, arguments=arguments, restarts=restarts, grace=5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight steps in one process, and the checkpoint after four."""
    home = tmp_path_factory.mktemp("checkpoints")
    ranks.train("single", steps=4, save=f"{home}/single")
    return ranks.train("single") | {"home": str(home)}


def toured(alone: dict[str, Any], names: list[str], timeout: float) -> dict[str, Any]:
    """Every strategy against one process: eight steps, a checkpoint read, a checkpoint written."""
    done = both("tour", names=names, home=alone["home"], timeout=timeout).value
    for name in names:
        assert close(done[name]["losses"], alone["losses"]), name
        assert close(done[name]["rest"], alone["losses"][4:]), name
        assert done[name]["names"] == alone["names"], name
        back = ranks.train("single", steps=4, first=4, load=f"{alone['home']}/{name}")
        assert close(back["losses"], alone["losses"][4:]), name
    return done


def test_ddp_and_fsdp_equal_one_process(alone: dict[str, Any]) -> None:
    done = toured(alone, ["ddp", "fsdp"], 20.0)
    assert done["ddp"]["facts"]["wrapper"] == "DistributedDataParallel"
    assert done["fsdp"]["facts"]["held by rank"] == [11376, 11376]


@pytest.mark.timeout(400)
def test_zero_equals_one_process(alone: dict[str, Any]) -> None:
    """On a fresh machine deepspeed compiles an operator here, for up to a minute."""
    done = toured(alone, ["zero2", "zero3"], 20.0)
    assert [done[n]["facts"]["weights in parts"] for n in ("zero2", "zero3")] == [False, True]


@pytest.mark.parametrize(("name", "deaths"), [("ddp", [[1, 2], [0, 5]]), ("fsdp", [[1, 3]])])
def test_a_killed_rank_changes_nothing(
    name: str, deaths: list[list[int]], alone: dict[str, Any], tmp_path: Path
) -> None:
    """Ranks die before a step, one after another; the run goes on from its checkpoints."""
    done = both("resumable", restarts=len(deaths), name=name, home=str(tmp_path), deaths=deaths)
    assert close(done.value, alone["losses"])
    assert [f["rank"] for f in done.failures if f["code"] == -signal.SIGKILL] == [rank for rank, _ in deaths]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_deaths(tmp_path: Path) -> None:
    """A random rank at a random step, twenty runs; all finish with the bits of the undisturbed one."""
    rows, _ = kills(20, ("ddp", "fsdp", "zero2"), tmp_path)
    print(said(rows))
    assert [row for row in rows if not (row["finished"] and row["equal"])] == []


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2"])
def test_many_asked_for_and_one_started(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="was started alone"):
        make_strategy(name, device="cpu")
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="world of one process"):
        make_strategy(name, device="cpu")


def test_groups_that_were_left_are_held() -> None:
    """One that its own thread takes down waits for itself or aborts: seen after 10 to 40 groups, on a busy machine."""
    assert both("many_groups", n=3).value == 3


def test_a_rank_that_never_arrives_is_named() -> None:
    with pytest.raises(RunError, match="rank 1 of 2 has not arrived after 2 s"):
        both("absent")


def test_a_node_that_never_arrives_ends_at_a_deadline() -> None:
    with pytest.raises(RunError, match="not all of 2 nodes have joined"):
        launch("math:sqrt", nproc=1, nnodes=2, endpoint="127.0.0.1:29719", deadline=2)


def until(true: Any, seconds: float = 30.0) -> bool:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return False


LIGHT = """
import os, time
from pathlib import Path
from llmkit.core.errors import ConfigError

def asleep(folder):
    (Path(folder) / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(120)

def refuse():
    raise ConfigError("there is no strategy 'dpp'", "did you mean 'ddp'?")
"""


def light(folder: Path) -> str:
    """Targets for ranks that need no torch."""
    path = folder / "light.py"
    path.write_text(LIGHT)
    return str(path)


ENDS = [("launcher", s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)] + [("agent", signal.SIGKILL)]


@pytest.mark.parametrize(("victim", "number"), ENDS, ids=lambda x: getattr(x, "name", x))
def test_no_orphans(victim: str, number: signal.Signals, tmp_path: Path) -> None:
    """Whoever is ended, and however, no rank and no agent is left."""
    script = light(tmp_path)
    words = f"{script + ':asleep'!r}, 2, 1, {{'folder': {str(tmp_path)!r}}}"
    code = f"from llmkit.training.launch import launch; launch({words})"
    started = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        assert until(lambda: len(list(tmp_path.glob("pid-*"))) == 2, 60)
        [agent] = psutil.Process(started.pid).children()
        below = [agent, *agent.children(recursive=True)]
        assert {int(p.read_text()) for p in tmp_path.glob("pid-*")} <= {p.pid for p in below}
        (started if victim == "launcher" else agent).send_signal(number)
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive
        assert started.wait(20) != 0
    finally:
        started.kill()
        started.wait()


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_node_cut_off_and_back(tmp_path: Path) -> None:
    """Two nodes; the cable is out for eight seconds in mid-run; the losses are those of one process."""
    try:
        found = two_nodes(tmp_path)
    except MissingError as e:
        pytest.skip(str(e))
    assert close(found["losses"], training())


def test_errors_of_ranks_are_errors_here(tmp_path: Path) -> None:
    """What a rank refuses is raised with its class, its hint and its number."""
    with pytest.raises(LLMKitError, match=r"rank \d: there is no strategy 'dpp'; did you mean 'ddp'") as e:
        launch(f"{light(tmp_path)}:refuse", nproc=2, restarts=0)
    assert isinstance(e.value, ConfigError)
