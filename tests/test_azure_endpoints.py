"""Clusters and endpoints in Azure ML, by our commands and the real SDK in the local control plane: a deployment there
is a running `llmkit serve`, started by the script of azure/environments/serve."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
from azure_plane import Plane
from azure_plane.model import mock_model
from typer.testing import CliRunner

from llmkit.azureml.assets import ensure_environment
from llmkit.azureml.endpoint import EndpointBackend
from llmkit.azureml.workspace import connect
from llmkit.cli.azure import app
from llmkit.core.errors import LLMKitError
from llmkit.deployment.controller import begin_rollout
from llmkit.deployment.plan import Plan, Stage
from llmkit.deployment.rollout import label_plan, run_rollout
from llmkit.deployment.state import RolloutState
from llmkit.deployment.traffic import LabelLoop, drive
from llmkit.serving.process import ServerProcess

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of marshmallow, which the SDK uses
ROOT = Path(__file__).resolve().parents[1]
Azure = Callable[..., str]


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A control plane, which our commands and httpx find by the environment."""
    with (
        Plane(tmp_path_factory.mktemp("azure") / "plane", delay=0.05, blobs="stub") as running,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("LLMKIT_AZURE_CLOUD", str(running.cloud))
        patch.setenv("SSL_CERT_FILE", str(running.certificate))
        yield running


@pytest.fixture(autouse=True)
def calm(plane: Plane) -> Iterator[None]:
    """No fault outlives its test."""
    yield
    plane.faults.clear()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The declarations of azure/, as they are but for the engine and the machine, and two models."""
    home = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "azure/compute_configs", home / "azure/compute_configs")
    shutil.copytree(ROOT / "azure/deployment_configs", home / "azure/deployment_configs")
    for path in (home / "azure/deployment_configs/blue.yml", home / "azure/deployment_configs/green.yml"):
        spec = yaml.safe_load(path.read_text())
        spec["environment_variables"] |= {"LLMKIT_ENGINE": "mock"}
        path.write_text(yaml.safe_dump(spec | {"instance_type": "Standard_DS3_v2"}))
    mock_model(home / "model")
    mock_model(home / "short", max_length=16)
    return home


@pytest.fixture(scope="module")
def azure(plane: Plane, project: Path) -> Azure:
    """`llmkit azure WORDS...` in the project: what it prints, or the error that ends it, in one line."""

    def call(*words: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(project)
            done = CliRunner().invoke(app, words)
        if isinstance(done.exception, LLMKitError):
            assert "\n" not in str(done.exception), str(done.exception)
            return f"error: {done.exception}"
        if done.exception:
            raise done.exception
        return done.stdout

    return call


@pytest.fixture(scope="module")
def environment(plane: Plane) -> str:
    """The environment that deployments run, registered with the whole of its build context."""
    return ensure_environment(connect(), ROOT / "azure/environments/serve", say=lambda line: None)


@pytest.fixture(scope="module")
def served(plane: Plane, azure: Azure, environment: str) -> EndpointBackend:
    """The endpoint with blue and green, both `llmkit serve` with the mock engine."""
    assert azure("register", "model") == "azureml:llmkit:1\n"
    words = ("--model", "azureml:llmkit:1", "--environment", environment)
    assert azure("deploy", "blue", *words) == "llmkit made\nblue of llmkit is up\nblue gets all traffic\n"
    assert azure("deploy", "green", *words) == "green of llmkit is up\n"
    return EndpointBackend(connect(), "llmkit", patience=60.0, every=0.05)


@pytest.fixture
def backend(served: EndpointBackend) -> EndpointBackend:
    """The endpoint with all traffic to blue."""
    served.put({"blue": 100}, {})
    return served


def ask(backend: EndpointBackend, n: int, **options: Any) -> Counter[str]:
    """Who answered `n` requests."""
    replies = drive(backend.address(), ["def"] * n, api_key=backend.keys()[0], max_tokens=2, **options)
    assert {r.error for r in replies} == {""} and {r.tokens for r in replies} == {2}
    return Counter(r.revision for r in replies)


def test_traffic_is_split_by_the_weights(backend: EndpointBackend, azure: Azure) -> None:
    assert azure("traffic", "blue=80", "green=20") == "blue 80 %, green 20 %\n"
    assert backend.traffic() == {"blue": 0.8, "green": 0.2}
    assert "blue 80 %, green 20 %" in azure("status")
    found = ask(backend, 200)
    assert found["blue"] + found["green"] == 200 and 12 <= found["green"] <= 68  # five standard deviations


ASKED: dict[str, tuple[str, Any]] = {
    "a completion": ("completions", {"model": "llmkit", "prompt": "def", "max_tokens": 3, "seed": 1}),
    "a chat": ("chat/completions", {"model": "llmkit", "messages": [{"role": "user", "content": "x"}], "seed": 1}),
    "models": ("models", None),
    "no JSON": ("completions", b"{"),
    "no model": ("completions", {"prompt": "def"}),
    "an unknown model": ("completions", {"model": "nobody", "prompt": "def"}),
    "an unknown field": ("completions", {"model": "llmkit", "prompt": "def", "nonsense": 1}),
    "a wrong type": ("completions", {"model": "llmkit", "prompt": "def", "max_tokens": "three"}),
    "out of bounds": ("completions", {"model": "llmkit", "prompt": "def", "temperature": 9}),
    "too long": ("completions", {"model": "llmkit", "prompt": list(range(20, 220)), "max_tokens": 200}),
    "no messages": ("chat/completions", {"model": "llmkit", "messages": []}),
    "no such path": ("nowhere", {"model": "llmkit"}),
}
OWN = ("id", "created", "request_id")  # of one reply


@pytest.fixture(scope="module")
def here(project: Path) -> Iterator[str]:
    """`llmkit serve` on this machine, under the deployment's name: its address."""
    with ServerProcess({"blue": project / "model"}, engine="mock", slots=8) as server:
        yield server.url


@pytest.mark.parametrize("what", ASKED)
def test_the_endpoint_answers_as_llmkit_serve_does(backend: EndpointBackend, here: str, what: str) -> None:
    path, body = ASKED[what]
    head = {"authorization": f"Bearer {backend.keys()[0]}", "content-type": "application/json"}
    said = []
    for base in (backend.address(), here):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        reply = httpx.request("GET" if body is None else "POST", f"{base}/{path}", content=content, headers=head)
        said.append((reply.status_code, plain(reply.json())))
    assert said[0] == said[1]
    assert said[0][0] == (200 if what in ("a completion", "a chat", "models") else said[0][0])
    assert said[0][0] in (200, 400, 404, 422)


def plain(value: Any) -> Any:
    """A reply without what belongs to one reply alone."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in OWN}
    return [plain(v) for v in value] if isinstance(value, list) else value


def test_a_mirror_gets_copies_whose_answers_nobody_sees(backend: EndpointBackend, azure: Azure, plane: Plane) -> None:
    def asked() -> int:
        return sum("/v1/completions" in line for line in azure("logs", "green", "-n", "5000").splitlines())

    before = asked()
    assert azure("traffic", "blue=100", "--mirror", "green=50") == "blue 100 %\n"
    assert ask(backend, 40) == {"blue": 40}
    for thread in [t for t in plane.store.threads if t.name.startswith("mirror")]:
        thread.join(10)
    assert 4 <= asked() - before <= 36
    assert "has traffic of its own" in azure("traffic", "blue=100", "--mirror", "blue=10")
    assert azure("traffic", "blue=100", "--mirror", "green=0") == "blue 100 %\n"
    assert not backend.get().mirror_traffic


def test_keys_are_made_new_one_at_a_time(backend: EndpointBackend, azure: Azure) -> None:
    address, first, second = azure("keys").split()
    assert address == backend.address()
    new = azure("rotate").strip()
    assert new != second and azure("keys").split() == [address, first, new]
    ask = {"model": "llmkit", "prompt": "def", "max_tokens": 1}
    for key, status in ((first, 200), (new, 200), (second, 401), ("none", 401)):
        head = {"authorization": f"Bearer {key}"}
        assert httpx.post(f"{address}/completions", json=ask, headers=head).status_code == status


# A rollout: the judge of llmkit.deployment over the endpoint's weights.

RULES: dict[str, Any] = {"baseline": 40, "quantile": 0.3, "alpha": 0.05, "margin": 3.0, "extensions": 0}
PLAN = Plan(stages=[Stage(weight=0.5, max_requests=800)], **RULES)


@pytest.fixture
def labelled(backend: EndpointBackend) -> Iterator[LabelLoop]:
    """Windows of which the mock engine, which counts, gets three in ten wrong."""
    right = [list(range(i, i + 24)) for i in range(20, 90, 10)]
    wrong = [[i] * 24 for i in range(20, 50, 10)]
    loop = LabelLoop(backend.address(), np.array(right + wrong), api_key=backend.keys()[0], post=False)
    yield loop
    loop.close()


def test_a_rollout_promotes_a_healthy_green(backend: EndpointBackend, labelled: LabelLoop) -> None:
    result = run_rollout(backend, PLAN, "green", "blue", labelled)
    assert (result.verdict, backend.traffic()) == ("promote", {"green": 1.0}), result


CONTROLLER = """
import sys, numpy
from llmkit.azureml.endpoint import EndpointBackend
from llmkit.azureml.workspace import connect
from llmkit.deployment.controller import Controller, controlled
from llmkit.deployment.journal import Book
from llmkit.deployment.signals import LabelSignals
from llmkit.deployment.traffic import LabelLoop
book, backend = Book(sys.argv[1]), EndpointBackend(connect(), "llmkit", patience=60.0, every=0.05)
loop = LabelLoop(backend.address(), numpy.load(sys.argv[2]), api_key=backend.keys()[0], post=False)
with controlled(book):
    print(Controller(book, backend, LabelSignals(loop), timeout=60.0).run().outcome)
"""


def test_a_rollout_outlives_its_controller(backend: EndpointBackend, labelled: LabelLoop, tmp_path: Path) -> None:
    """kill -9 in the first stage; the next process goes on with the evidence that there is."""
    plan = label_plan(Plan(stages=[Stage(weight=0.2, max_requests=8000), Stage(weight=0.5, max_requests=800)], **RULES))
    state = RolloutState(alias="llmkit", canary="green", stable="blue", plan=plan.to_dict())
    book = begin_rollout(state, tmp_path, who="ada", why="a new model")
    np.save(tmp_path / "windows.npy", labelled.windows)
    line = [sys.executable, "-c", CONTROLLER, str(book.folder), str(tmp_path / "windows.npy")]
    env = {
        k: v for k, v in os.environ.items() if k != "AZUREML_CURRENT_CLOUD"
    }  # a new process has not met the plane yet
    first = subprocess.Popen(line, env=env)
    end = time.monotonic() + 60
    while not book.entries("look"):
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert backend.traffic() == {"blue": 0.8, "green": 0.2}
    looks = len(book.entries("look"))
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "promoted\n", done.stderr
    assert backend.traffic() == {"green": 1.0}
    seen = [e.data["traffic"]["weights"].get("green", 0.0) for e in book.entries("settled")]
    assert seen == [0.2, 0.5, 1.0] and len(book.entries("look")) > looks


def test_a_rollout_takes_a_broken_green_back(
    backend: EndpointBackend, labelled: LabelLoop, azure: Azure, environment: str
) -> None:
    """A model that refuses what the other one takes, in the deployment that is there: it is changed, not made twice."""
    assert azure("register", "short") == "azureml:llmkit:2\n"
    assert azure("deploy", "green", "--environment", environment) == "green of llmkit is up\n"  # llmkit@latest
    result = run_rollout(backend, PLAN, "green", "blue", labelled)
    assert (result.verdict, backend.traffic()) == ("rollback", {"blue": 1.0}), result
    assert result.requests < 400


# What goes wrong.

FAULTS: dict[str, list[dict[str, Any]]] = {
    "throttled": [{"method": "PUT", "status": 429, "retry_after": 1, "times": 2}],
    "updating": [{"method": "PUT", "status": 409, "message": "The endpoint is in state Updating", "times": 3}],
    "broken": [{"status": 500, "times": 1}, {"path": "*/deployments", "status": 503, "times": 2}],
    "cut": [{"method": "PUT", "status": 0}, {"method": "GET", "path": "*/onlineendpoints/llmkit", "status": 0}],
    "a lost answer": [{"method": "PUT", "status": 0, "applied": True}],
    "a lost operation": [{"path": "*/mfeoperation*", "status": 404, "times": 1}],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_what_passes_is_waited_for(backend: EndpointBackend, plane: Plane, faults: list[dict[str, Any]]) -> None:
    made = [plane.faults.add(**{"path": "*/onlineendpoints/*", **fault}) for fault in faults]
    backend.set_traffic({"blue": 0.9, "green": 0.1})
    assert {f.hit for f in made} != {0}
    plane.faults.clear()
    assert backend.traffic() == {"blue": 0.9, "green": 0.1}


def test_an_expired_token_is_renewed(backend: EndpointBackend, plane: Plane) -> None:
    before = len(plane.faults.log)
    plane.expire_tokens()
    backend.set_traffic({"blue": 0.9, "green": 0.1})
    assert backend.traffic() == {"blue": 0.9, "green": 0.1}
    plane.faults.add(status=401, code="ExpiredAuthenticationToken", message="The token expired", times=2)
    backend.set_traffic({"blue": 1.0})
    assert 401 in [status for *_, status in plane.faults.log[before:]]


def test_traffic_that_is_seen_later_is_waited_for(backend: EndpointBackend, plane: Plane) -> None:
    plane.store.lag.append(("*/onlineendpoints/llmkit", 0.4))
    before = len(plane.faults.log)
    try:
        backend.set_traffic({"blue": 0.7, "green": 0.3})
        assert backend.traffic() == {"blue": 0.7, "green": 0.3}
    finally:
        plane.store.lag.clear()
    assert len([call for call in plane.faults.log[before:] if call[0] == "PUT"]) <= 2  # it looks more than it asks


def test_a_deployment_is_made_through_faults(backend: EndpointBackend, plane: Plane, project: Path) -> None:
    """Another's change is under way, the service is busy, and the answer of the long operation is lost."""
    at = "*/deployments/green"
    busy = plane.faults.add(path=at, method="PUT", status=409, message="The deployment is in state Updating", times=2)
    slow = plane.faults.add(path=at, method="PUT", status=429, retry_after=1)
    lost = plane.faults.add(path="*/mfeoperation*", status=404, times=1)
    told: list[str] = []
    backend.deploy(project / "azure/deployment_configs/green.yml", told.append, environment=current(backend))
    assert (busy.hit, slow.hit, lost.hit) == (2, 1, 1) and told == ["green of llmkit is up"]
    assert backend.deployments()["green"].provisioning_state == "Succeeded"


def current(backend: EndpointBackend) -> str:
    """The environment of blue, as a file names it."""
    name, version = str(backend.deployments()["blue"].environment).split("/")[-3::2]
    return f"azureml:{name}:{version}"


def test_a_deployment_that_is_there_is_as_good(backend: EndpointBackend, plane: Plane, project: Path) -> None:
    """Created by another between our look and our call; and busy with another's change when we come."""
    folder, told = project / "azure/deployment_configs", []
    plane.faults.add(path="*/onlineendpoints/llmkit", method="GET", status=404, code="ResourceNotFound")
    refusal = {"code": "Conflict", "message": "Endpoint llmkit already exists", "status": 409}
    plane.faults.add(path="*/onlineendpoints/llmkit", method="PUT", **refusal)
    backend.make(folder / "endpoint.yml", told.append)
    assert told == ["llmkit made"]
    backend.make(folder / "endpoint.yml", told.append)
    assert told == ["llmkit made"]


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "no quota": (("deploy", "green"), {"instance_type": "Standard_NC96ads_A100_v4", "instance_count": 20}, "Quotas"),
    "no such size here": (("deploy", "green"), {"instance_type": "Standard_NC6s_v3"}, "choose a size that the region"),
    "a server that ends": (("deploy", "red"), {"environment_variables": {"LLMKIT_SLOTS": "none"}}, "its log ends: "),
    "no such model": (("deploy", "green", "--model", "azureml:llmkit:9"), {}, "was not found"),
    "no such environment": (("deploy", "green", "--environment", "azureml:nothing:1"), {}, "was not found"),
    "no such file": (("deploy", "gren"), {}, "did you mean 'green'?"),
    "no such deployment": (("traffic", "blue=90", "gren=10"), {}, "did you mean 'green'?"),
    "too little": (("traffic", "blue=90"), {}, "the shares make 90 %"),
    "parts of percents": (("traffic", "blue=97.5", "green=2.5"), {}, "is no share of the traffic"),
    "too much of a mirror": (("traffic", "blue=100", "--mirror", "green=60"), {}, "0 to 50 is possible"),
    "a name for a mirror": (("traffic", "blue=100", "--mirror", "green"), {}, "'green' is no share of the traffic"),
    "no such log": (("logs", "gren"), {}, "could not read the log of gren"),
    "no such key": (("rotate", "third"), {}, "there is no 'third' key"),
    "all of it": (("delete",), {}, "add --yes"),
    "traffic": (("delete", "blue"), {}, "blue gets 100 % of the traffic"),
    "no such endpoint": (("keys", "--endpoint", "other"), {}, "other"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_one_line(
    backend: EndpointBackend, azure: Azure, project: Path, environment: str, what: str
) -> None:
    words, over, said = REFUSED[what]
    before, files = backend.deployments(), project / "azure/deployment_configs"
    if over:
        spec = yaml.safe_load((files / "green.yml").read_text()) | over | {"name": words[1]}
        spec["environment"] = environment
        kept = (files / "green.yml").read_text()
        (files / f"{words[1]}.yml").write_text(yaml.safe_dump(spec))
    try:
        text = azure(*words)
    finally:
        if over:
            (files / f"{words[1]}.yml").unlink()
            (files / "green.yml").write_text(kept)
    assert text.startswith("error: ") and said in text, text
    assert backend.traffic() == {"blue": 1.0} and set(before) <= set(backend.deployments())
    if "red" in backend.deployments():
        assert azure("delete", "red") == "red of llmkit is gone\n"


def test_a_name_that_another_workspace_has(plane: Plane, azure: Azure, backend: EndpointBackend) -> None:
    plane.endpoints.elsewhere.add("taken")
    text = azure("deploy", "blue", "--endpoint", "taken")
    assert text.startswith("error: the endpoint taken already exists in another workspace") and "--endpoint" in text


def test_an_endpoint_is_deleted_with_what_is_behind_it(
    backend: EndpointBackend, azure: Azure, plane: Plane, environment: str
) -> None:
    """The last test with the endpoint; deleting what is not there is no error."""
    pids = [server.process.pid for server in plane.endpoints.servers.values() if server.process]
    for _ in range(2):
        assert azure("delete", "green") == "green of llmkit is gone\n"
    for _ in range(2):
        assert azure("delete", "--yes") == "llmkit is gone\n"
    assert backend.find() is None and len(pids) == 2 and not plane.endpoints.servers
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert "has no endpoint 'llmkit'" in azure("keys")


# Clusters.


def test_clusters_come_and_go_twice(azure: Azure) -> None:
    told = [azure("up", "gpu-spot", "cpu", "--no-environments") for _ in range(2)]
    assert told[0].count(" made; ") == 2 and told[1].count(" is as described; ") == 2
    assert "1.5 USD/h" in told[0]
    shown = azure("status")
    assert shown.count("succeeded") == 2 and shown.count("not there") == 2
    told = [azure("down", "gpu-spot", "cpu") for _ in range(2)]
    assert told == ["cpu taken away\ngpu-spot taken away\n", "cpu is not there\ngpu-spot is not there\n"]


def test_a_cluster_is_changed_where_it_can_be(azure: Azure, project: Path) -> None:
    path = project / "azure/compute_configs/cpu.yml"
    kept = path.read_text()
    assert " made; " in azure("up", "cpu", "--no-environments")
    try:
        path.write_text(yaml.safe_dump(yaml.safe_load(kept) | {"max_instances": 3}))
        assert "changed: max_instances" in azure("up", "cpu", "--no-environments")
        path.write_text(yaml.safe_dump(yaml.safe_load(kept) | {"size": "Standard_DS3_v2"}))
        assert "has size" in azure("up", "cpu", "--no-environments")
    finally:
        path.write_text(kept)
        azure("down", "cpu")


def test_what_is_wrong_with_a_cluster_is_one_line(azure: Azure, project: Path, plane: Plane) -> None:
    path = project / "azure/compute_configs/cpu.yml"
    kept = path.read_text()
    try:
        for over, said in (
            ({"size": "Standard_NC6s_v3"}, "choose a size that the region has"),
            ({"size": "Standard_ND96isr_H100_v5", "max_instances": 20}, "Quotas"),
            ({"max_instances": 0}, "max_instances"),
        ):
            path.write_text(yaml.safe_dump(yaml.safe_load(kept) | over))
            text = azure("up", "cpu", "--no-environments")
            assert text.startswith("error: ") and said in text, text
    finally:
        path.write_text(kept)
    assert "did you mean 'cpu'?" in azure("up", "cpus", "--no-environments")
    busy = {"path": "*/computes/cpu", "method": "PUT"}
    plane.faults.add(**busy, status=429, retry_after=1, times=4)
    plane.faults.add(**busy, status=409, message="The compute is being updated", times=2)
    assert "cpu made" in azure("up", "cpu", "--no-environments")
    assert azure("down", "cpu") == "cpu taken away\n"
