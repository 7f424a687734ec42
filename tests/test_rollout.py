"""Rollouts against a real server: rolled back, promoted, interrupted, and a server that dies in the middle."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llmkit.core.card import ModelCard
from llmkit.core.errors import ServiceError
from llmkit.core.registry import get_version
from llmkit.deployment.plan import Plan, Stage
from llmkit.deployment.release import RolloutJob, job_plan, make_damaged, make_healthy, open_release
from llmkit.deployment.rollout import RouterBackend, move_champion, run_rollout
from llmkit.deployment.traffic import LabelLoop
from llmkit.monitoring.monitor import prompt_windows
from llmkit.monitoring.requestlog import read_requests
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess

FOREVER = Plan(stages=[Stage(weight=0.5, max_requests=10**6)], baseline=40, alpha=1e-300, promote_alpha=1e-300)


class World:
    "A champion with a damaged and a healthy revision beside it, behind a real server."

    def __init__(self, folder):
        self.cfg = RolloutJob()
        self.release = open_release(self.cfg, folder)
        self.folders = {"damaged": make_damaged(self.release, folder / "damaged", 1.0, 0)}
        self.folders["healthy"], self.version = make_healthy(self.release, folder / "healthy", 2, 1)
        self.stable = ModelCard.load(self.release.champion).revision
        self.windows = prompt_windows(self.release.prepared, "test", 120, 32)
        self.log = folder / "requests.db"
        self.server = ServerProcess({self.stable: self.release.champion}, log=self.log, variant="torch").start()
        self.admin = AdminClient(self.server.base, self.server.admin_key)
        self.backend = RouterBackend(self.admin)
        for name, path in self.folders.items():
            self.admin.load(name, path, "torch")

    def traffic(self):
        return LabelLoop(self.server.url, self.windows)

    def all_to_champion(self):
        self.backend.set_traffic({self.stable: 1.0})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    found = World(tmp_path_factory.mktemp("rollout"))
    yield found
    found.admin.close()
    found.server.stop()


def test_damaged_is_rolled_back(world):
    world.all_to_champion()
    moved = []
    result = run_rollout(
        world.backend, job_plan(world.cfg), "damaged", world.stable, world.traffic(), lambda: moved.append(1)
    )
    assert result.verdict == "rollback", str(result)
    assert world.backend.traffic() == {world.stable: 1.0}
    assert not moved


def test_healthy_is_promoted_with_its_alias(world):
    world.all_to_champion()
    release = world.release
    promote = lambda: move_champion(release.name, world.version, release.tracking)  # noqa: E731
    result = run_rollout(world.backend, job_plan(world.cfg), "healthy", world.stable, world.traffic(), promote)
    assert result.verdict == "promote", str(result)
    assert world.backend.traffic() == {"healthy": 1.0}
    assert get_version(release.name, "champion", release.tracking).version == world.version


def test_labels_reach_the_log(world):
    time.sleep(0.3)  # the log gathers a batch
    rows = [r for r in read_requests(world.log) if r["labels"]]
    assert {r["revision"] for r in rows} >= {world.stable, "damaged"}
    assert all(0 <= r["labels"]["accuracy"] <= 1 for r in rows)


INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
from test_rollout import *
import numpy as np
backend = RouterBackend(AdminClient({base!r}, {key!r}))
traffic = LabelLoop({url!r}, np.load({windows!r}))
run_rollout(backend, FOREVER, "healthy", {stable!r}, traffic)
"""


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_interrupted_gives_traffic_back(world, tmp_path, number):
    import numpy as np

    world.all_to_champion()
    np.save(tmp_path / "windows.npy", world.windows)
    code = INTERRUPTED.format(
        tests=os.path.dirname(__file__),
        base=world.server.base,
        key=world.server.admin_key,
        url=world.server.url,
        windows=str(tmp_path / "windows.npy"),
        stable=world.stable,
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 40
    while "healthy" not in world.backend.traffic():
        assert child.poll() is None and time.monotonic() < until, child.stderr.read()
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(number)
    _, err = child.communicate(timeout=20)
    assert child.returncode != 0 and "KeyboardInterrupt" in err
    assert world.backend.traffic() == {world.stable: 1.0}


def test_a_server_that_dies_is_an_error_that_says_so(world):
    world.all_to_champion()
    traffic = world.traffic()

    def dying(n):
        if "healthy" in world.backend.traffic():
            os.kill(world.server.pid, signal.SIGKILL)
            time.sleep(0.2)
        return traffic(n)

    with pytest.raises(ServiceError, match="came back with a label") as caught:
        run_rollout(world.backend, FOREVER, "healthy", world.stable, dying)
    assert "could NOT be given back" in caught.value.__notes__[0]
