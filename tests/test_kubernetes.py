"""Rollouts on objects of Kubernetes, over HTTPS against a strict API server; real kubectl where there is one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kube_plane import Cluster as Plane
from kube_plane import check

from llmkit.core.errors import ConfigError, MissingError, ServiceError
from llmkit.deployment.backend import move_traffic
from llmkit.deployment.controller import Controller
from llmkit.deployment.journal import Book
from llmkit.deployment.kubernetes import Access, Cluster, read_kubeconfig
from llmkit.deployment.objects import (
    KNATIVE,
    KnativeBackend,
    KServeBackend,
    ObjectBackend,
    RouteBackend,
    http_route,
    inference_service,
)
from llmkit.deployment.plan import Plan
from llmkit.deployment.signals import Look
from llmkit.deployment.state import RolloutState
from llmkit.deployment.windows import Window


def accepted(thing: dict[str, Any]) -> dict[str, Any]:
    """What a gateway writes."""
    seen = {"type": "Accepted", "status": "True", "observedGeneration": thing["metadata"]["generation"]}
    return {"parents": [{"parentRef": thing["spec"]["parentRefs"][0], "conditions": [seen]}]}


def predicted(thing: dict[str, Any]) -> dict[str, Any]:
    """What KServe writes for its second revision."""
    share = thing["spec"]["predictor"].get("canaryTrafficPercent")
    split = {"llm-2": 100} if share is None else {"llm-2": share, "llm-1": 100 - share}
    traffic = [{"revisionName": n, "percent": p} for n, p in split.items()]
    rolled = "llm-2" if share is None else "llm-1"
    predictor = {"latestReadyRevision": "llm-2", "latestRolledoutRevision": rolled, "traffic": traffic}
    return {"observedGeneration": thing["metadata"]["generation"], "components": {"predictor": predictor}}


def routed(thing: dict[str, Any]) -> dict[str, Any]:
    """What Knative writes."""
    return {"observedGeneration": thing["metadata"]["generation"], "traffic": thing["spec"]["traffic"]}


IMAGE = "registry/llmkit-serve@sha256:" + "0" * 64
SERVICE = {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": "llm", "namespace": "llm"}}
SERVICE |= {"spec": {"traffic": [{"revisionName": "llm-1", "percent": 100}]}}
SPLIT = {"llm-1": 1.0, "llm-2": 0.0}
OBJECTS: dict[str, tuple[type[ObjectBackend], str, dict[str, Any], Any]] = {
    "httproute": (
        RouteBackend,
        "httproutes",
        http_route("llm", "g", SPLIT, namespace="llm"),
        accepted,
    ),
    "kserve": (
        KServeBackend,
        "inferenceservices",
        inference_service("llm", IMAGE, "p://m", "llm", canary=0),
        predicted,
    ),
    "knative": (KnativeBackend, "services", SERVICE, routed),
}


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    """An API server with one object of each kind."""
    made = Plane(tmp_path)
    for _, plural, thing, follow in OBJECTS.values():
        made.add(plural, thing, follow)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(params=OBJECTS)
def backend(plane: Plane, request: pytest.FixtureRequest) -> Iterator[ObjectBackend]:
    """An object as a back end, found by its kubeconfig."""
    with Cluster(read_kubeconfig(plane.kubeconfig)) as cluster:
        yield OBJECTS[request.param][0](cluster, "llm")


def move(backend: ObjectBackend, *split: float) -> dict[str, float]:
    """Move the traffic; what is then in force."""
    move_traffic(backend, dict(zip(("llm-1", "llm-2"), split, strict=True)), every=0.01)
    return backend.traffic()


def test_traffic_is_moved_and_read_back(backend: ObjectBackend, plane: Plane) -> None:
    assert backend.traffic() == {"llm-1": 1.0}
    assert move(backend, 0.95, 0.05) == {"llm-1": 0.95, "llm-2": 0.05}
    asked = [c for c in plane.log if c[0] == "PATCH"]
    assert move(backend, 0.95, 0.05) and len([c for c in plane.log if c[0] == "PATCH"]) == len(asked) + 1
    assert move(backend, 1.0, 0.0) == {"llm-1": 1.0}
    assert move(backend, 0.0, 1.0) == {"llm-2": 1.0}


def test_what_was_asked_is_not_yet_in_force(backend: ObjectBackend, plane: Plane) -> None:
    plane.lag = 0.3
    backend.set_traffic({"llm-1": 0.5, "llm-2": 0.5})
    with pytest.raises(ServiceError, match="the cluster is at change 1 of 2"):
        backend.traffic()
    time.sleep(0.35)
    assert backend.traffic() == {"llm-1": 0.5, "llm-2": 0.5}


def test_a_change_of_somebody_else_stays(plane: Plane) -> None:
    """Between our read and our patch another rule comes into the route: the patch is refused, and made anew."""
    path = next(p for p in plane.things if "httproutes" in p)
    other = {"backendRefs": [{"name": "docs", "port": 80, "weight": 1}]}

    def meanwhile(method: str) -> int:
        if method == "PATCH" and len(plane.things[path]["spec"]["rules"]) == 1:
            plane.things[path]["spec"]["rules"].append(other)
            plane.touch(path, 0.0)
        return 0

    plane.before = meanwhile
    with Cluster(read_kubeconfig(plane.kubeconfig)) as cluster:
        assert move(RouteBackend(cluster, "llm"), 0.75, 0.25) == {"llm-1": 0.75, "llm-2": 0.25}
    assert plane.things[path]["spec"]["rules"][1] == other
    assert [s for m, s in plane.log if m == "PATCH"] == [409, 200]


def test_what_is_not_ours_stays(plane: Plane) -> None:
    """Two services of one name are two revisions; filters, other rules and tags stay, there and back."""
    head = [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x-arm", "value": "1"}]}}]
    refs = [{"name": "llm", "namespace": n, "port": 80, "weight": w} for n, w in (("blue", 100), ("green", 0))]
    route = http_route("two", "g", SPLIT, namespace="llm")
    route["spec"]["rules"] = [{"backendRefs": [refs[0] | {"filters": head}, refs[1]]}, {"backendRefs": refs}]
    traffic = [{"tag": "now", "revisionName": "llm-1", "percent": 100}, {"tag": "newest", "latestRevision": True}]
    service = SERVICE | {"metadata": {"name": "two", "namespace": "llm"}, "spec": {"traffic": traffic}}
    paths = [plane.add("httproutes", route, accepted), plane.add("services", service, routed)]
    with Cluster(read_kubeconfig(plane.kubeconfig)) as cluster:
        backends = [(RouteBackend(cluster, "two"), "blue/llm", "green/llm")]
        backends += [(KnativeBackend(cluster, "two"), "llm-1", "llm-2")]  # type: ignore[list-item]
        for backend, old, new in backends:
            for split in ({old: 0.8, new: 0.2}, {new: 1.0}, {old: 1.0}):
                move_traffic(backend, split, every=0.01)
                assert backend.traffic() == split
    after = [plane.things[p]["spec"] for p in paths]
    assert after[0] == route["spec"]
    assert after[1] == {"traffic": [traffic[0], traffic[1] | {"percent": 0}]}


def test_what_the_cluster_refuses(backend: ObjectBackend, plane: Plane) -> None:
    knows = not isinstance(backend, KnativeBackend)  # Knative itself knows which revisions there are
    with pytest.raises(ConfigError, match="llm-9") if knows else contextlib.nullcontext():
        backend.set_traffic({"llm-1": 0.5, "llm-9": 0.5})
    with pytest.raises(ConfigError, match="whole percents"):
        backend.set_traffic({"llm-1": 0.995, "llm-2": 0.005})
    with pytest.raises(MissingError, match="not found; apply the object first"):
        type(backend)(backend.cluster, "other").traffic()
    access = backend.cluster.access
    stranger = Cluster(Access(access.server, "guessed", access.authority))
    with stranger, pytest.raises(ServiceError, match="Unauthorized"):
        stranger.get(backend.kind, "llm", "llm")
    with pytest.raises(ConfigError, match="415"):
        backend.cluster.call("PATCH", backend.kind.path("llm", "llm"), {"spec": {}}, "application/json")
    with Cluster(Access(access.server, access.token)) as unknown, pytest.raises(ServiceError, match="certificate"):
        unknown.get(backend.kind, "llm", "llm")


class Same:
    """Signals that are always the same."""

    every = 0.0

    def __init__(self, window: Window) -> None:
        self.window = window

    def measure(self, state: RolloutState) -> Any:
        return list(Plan.from_dict(state.plan).gates)

    def begin(self, state: RolloutState) -> dict[str, float]:
        return {}

    def look(self, state: RolloutState, book: Book) -> Look:
        return Look({"errors": self.window}, requests=self.window.total)


@pytest.mark.parametrize("bad", [10, 40], ids=["healthy", "broken"])
def test_a_rollout_through_failures(backend: ObjectBackend, plane: Plane, tmp_path: Path, bad: int) -> None:
    """A controller a step, so each one is killed after each step; a third of all calls fails."""
    dice = random.Random(0)
    plane.before = lambda method: 503 if dice.random() < 1 / 3 else 0
    stages = [{"traffic": 20, "max_requests": 40_000}, {"traffic": 50, "max_requests": 40_000}, {"traffic": 100}]
    plan = Plan.from_dict({"stages": stages, "gates": ["errors"], "ratio_alpha": 1e-9})
    state = RolloutState(alias="llm", canary="llm-2", stable="llm-1", plan=plan.to_dict())
    Book.create(tmp_path / "r", state, "ada", "").close()
    for _ in range(600):
        book = Book(tmp_path / "r")
        now = book.read()
        share = now.weight() if now.phase == "stage" else 0.5
        signals = Same(Window(round(100 * share), round(100 - 100 * share), round(bad * share), round(10 - 10 * share)))
        now = Controller(book, backend, signals, tries=8, timeout=1.0).step()
        book.close()
        if now.phase == "done":
            break
    plane.before = lambda method: 0
    outcome, winner = ("promoted", "llm-2") if bad == 10 else ("rolled_back", "llm-1")
    assert (now.outcome, backend.traffic()) == (outcome, {winner: 1.0}), str(now)


def test_manifests_are_of_their_types() -> None:
    for _, _, thing, _ in OBJECTS.values():
        check(thing)
    check(http_route("llm", "public", {"a": 0.5, "b": 0.5}, hosts=("llm.example.org",)))
    check(inference_service("llm", IMAGE, "pvc://m", gpus=1))
    for wrong in (http_route("Llm", "g", {"a": 1.0}), http_route("llm", "g", {"a": 1.0}, port=0)):
        with pytest.raises(ValueError):
            check(wrong)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kubectl_sees_what_we_did(plane: Plane) -> None:
    with Cluster(read_kubeconfig(plane.kubeconfig)) as cluster:
        move(KnativeBackend(cluster, "llm"), 0.7, 0.3)
    path = KNATIVE.path("llm", "llm")
    env = os.environ | {"KUBECONFIG": str(plane.kubeconfig)}
    done = subprocess.run(["kubectl", "get", "--raw", path], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert [t["percent"] for t in json.loads(done.stdout)["status"]["traffic"]] == [70, 30]
