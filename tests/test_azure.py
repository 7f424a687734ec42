"""Jobs in Azure ML, sent by the real SDK to the local control plane, which runs them: once each, whatever happens."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nbformat
import pytest
from azure_plane import Plane

from llmkit.azureml.assets import ensure_data, ensure_environment, environment_name, register_model
from llmkit.azureml.compute import up
from llmkit.azureml.place import AzurePlace
from llmkit.azureml.preflight import sdk_load
from llmkit.azureml.submit import send, write_yaml, written
from llmkit.azureml.workspace import connect
from llmkit.core.errors import ConfigError, LLMKitError, RunError, ServiceError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of marshmallow, which the SDK uses
TRACKED = pytest.mark.parametrize("plane", [{"mlflow": True}], indirect=True, ids=["mlflow"])
ROOT = Path(__file__).resolve().parents[1]
CELL = "out = ''  # run folder\nlr = 0.1  # rate\nrevision = 'a'  # text\nnproc = 1\nnnodes = 1\nshared = ''"
WORK = """import os
from llmkit.core.run import Run

run = Run(out, "tiny", {"lr": lr, "revision": revision})
run.metric("loss", lr * 2)
if os.environ.get("APPLICATIONINSIGHTS_CONNECTION_STRING"):
    import time
    from llmkit.monitoring.requestlog import RequestRow
    from llmkit.monitoring.traces import telemetry_from

    telemetry = telemetry_from(os.environ)
    telemetry.record(RequestRow("r1", time.time(), alias="tiny", endpoint="/v1/completions"))
    telemetry.close()
print("node", os.environ.get("NODE_RANK", "0"), "of", nnodes, "lr", lr, "revision", revision)
run.finish()"""


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Plane]:
    """A control plane; with an MLflow run for every job where a test asks for it."""
    options = {"delay": 0.05, "blobs": "stub"} | getattr(request, "param", {})
    with Plane(tmp_path / "plane", **options) as running:
        monkeypatch.setenv("LLMKIT_AZURE_CLOUD", str(running.cloud))
        for name, value in running.wire.variables().items():  # the clients that are started here are watched, too
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with one job notebook, clusters and an environment."""
    home = tmp_path / "project"
    (home / "nbs").mkdir(parents=True)
    shutil.copytree(ROOT / "azure" / "compute_configs", home / "azure" / "compute_configs")
    (home / "azure" / "environments" / "train").mkdir(parents=True)
    for name in ("environment.yml", "Dockerfile"):
        source = ROOT / "azure" / "environments" / "train" / name
        shutil.copy(source, home / "azure" / "environments" / "train")
    cells = [nbformat.v4.new_code_cell(text) for text in (CELL, WORK)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), home / "nbs" / "tiny.ipynb")
    return home


@pytest.fixture
def place(plane: Plane, project: Path) -> AzurePlace:
    found = AzurePlace(connect(), project, say=lambda line: None, every=0.1)
    up(found.service, project, ["cpu", "gpu-spot"], say=lambda line: None)
    return found


def ended(place: AzurePlace, id: str, patience: float = 120.0) -> Any:
    """The row of a job that is over."""
    end = time.monotonic() + patience
    while (row := place.show(id)).active:
        assert time.monotonic() < end, f"{id} is still {row.state}"
        time.sleep(0.2)
    return row


def nothing(place: AzurePlace, project: Path) -> str:
    """Send a job that goes the way of all jobs, and does nothing: environment, code, job; its id."""
    target = place.target({"compute": "cpu"})
    spec = {"command": "true", "code": str(project), "compute": "azureml:cpu"}
    return place.post(spec | {"environment": environment_name(place.source(target))}, "nothing", target)


def made(place: AzurePlace) -> set[str]:
    """The names of all jobs that the workspace has."""
    return {row.id for row in place.list(1000)}


@pytest.fixture
def insights(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What Application Insights, which the environment names, is sent."""
    sent: list[dict[str, Any]] = []

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            rows = json.loads(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            sent.extend(rows)
            answer = json.dumps({"itemsReceived": len(rows), "itemsAccepted": len(rows), "errors": []}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *words: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Sink) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        words = f"InstrumentationKey=00000000-0000-0000-0000-000000000001;IngestionEndpoint={url};LiveEndpoint={url}"
        monkeypatch.setenv("APPLICATIONINSIGHTS_CONNECTION_STRING", words)
        yield sent
        server.shutdown()


@TRACKED
def test_a_job_runs_and_comes_back(
    place: AzurePlace, plane: Plane, project: Path, tmp_path: Path, insights: list[dict[str, Any]]
) -> None:
    params = {"lr": 0.3, "revision": "007"}
    id = place.submit(project / "nbs" / "tiny.ipynb", params, compute="cpu")
    assert place.submit(project / "nbs" / "tiny.ipynb", params, compute="cpu") == id
    assert made(place) == {id}
    log = list(place.logs(id, follow=True))
    row = place.show(id)
    assert row.state == "finished", log
    assert row.params == params | {"nproc": 1, "nnodes": 1}
    assert any("lr 0.3 revision 007" in line for line in log) and list(place.logs(id)) != []
    folder = place.fetch(id, tmp_path / "got")
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"] == {"loss": 0.6} and result["params"] == params
    assert (folder / "tiny.ipynb").exists() and (folder / "environment.txt").exists()
    assert result["mlflow_run_id"] == id and plane.tracking.metrics(id) == {"loss": 0.6}  # one id for both
    assert id in json.dumps(insights), "its traces do not name the run"
    assert {"RequestData", "MetricData"} <= {row["data"]["baseType"] for row in insights}
    assert [r.id for r in place.list(5)] == [id]
    assert place.submit(project / "nbs" / "tiny.ipynb", params, compute="cpu", label="again") != id


@TRACKED
@pytest.mark.timeout(300)
def test_two_nodes_train_with_torchrun(place: AzurePlace, project: Path, tmp_path: Path) -> None:
    """The training notebook as it is: one group of processes over both nodes, one model, a notebook a node."""
    job = Path(shutil.copy(ROOT / "nbs" / "jobs" / "train_model.ipynb", project / "nbs"))
    params = {"strategy": "ddp", "steps": 4, "sft_steps": 0, "warmup": 1, "precision": "fp32"}
    id = place.submit(job, params, compute="cpu", nodes=2)
    assert ended(place, id, 250).state == "finished", [line for line in place.logs(id) if "error" in line]
    folder = place.fetch(id, tmp_path / "got")
    for node in (folder, folder / "node-1"):
        assert (node / "train_model.ipynb").exists(), node
        result = json.loads((node / "result.json").read_text())
        assert result["params"]["nnodes"] == 2 and result["metrics"]["tokens_seen"] == 4 * 8 * 48
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("model.safetensors")] == ["model/model.safetensors"]


def test_what_is_followed_is_told_while_it_runs(place: AzurePlace, project: Path) -> None:
    told_of = project / "told"
    command = f"echo one; while [ ! -e {told_of} ]; do sleep 0.1; done; echo two"
    spec = {"command": command, "compute": "azureml:cpu", "environment": {"image": "python:3.11"}}
    id = send(place.service, spec, "talks", project, say=lambda line: None).name
    lines = []
    for line in place.logs(id, follow=True):
        lines.append(line)
        if line == "one":  # told while the job runs, which waits for this
            told_of.touch()
    assert (lines.count("one"), lines.count("two")) == (1, 1), lines
    assert list(place.logs(id)) == ["one", "two"]
    assert place.show(id).state == "finished"


def test_a_failed_job_is_a_new_attempt(place: AzurePlace, plane: Plane, project: Path) -> None:
    spec = {"command": "exit 3", "compute": "azureml:cpu", "environment": {"image": "python:3.11"}}
    first = send(place.service, spec, "fails", project, say=lambda line: None)
    assert ended(place, first.name).state == "failed"
    second = send(place.service, spec, "fails", project, say=lambda line: None)
    assert (second.name, second.new) == (f"{first.name}-2", True)


def test_cancel_waits(place: AzurePlace, project: Path) -> None:
    spec = {"command": "sleep 60", "compute": "azureml:cpu", "environment": {"image": "python:3.11"}}
    sent = send(place.service, spec, "sleeps", project, say=lambda line: None)
    place.cancel(sent.name)
    assert place.show(sent.name).state == "cancelled"
    with pytest.raises(RunError, match="is over: cancelled"):
        place.cancel(sent.name)


FAULTS: dict[str, list[dict[str, Any]]] = {
    "lost answer": [{"path": "*/jobs/*", "method": "PUT", "status": 0, "applied": True}],
    "lost answer of the environment": [{"path": "*/environments/*", "method": "PUT", "status": 0, "applied": True}],
    "throttled": [{"status": 429, "retry_after": 1, "times": 2}],
    "a token refused": [{"path": "*/jobs/*", "method": "PUT", "status": 401, "code": "ExpiredAuthenticationToken"}],
    "busy": [{"path": "*/jobs/*", "status": 503, "times": 2}],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_fault_neither_loses_nor_doubles_a_job(
    place: AzurePlace, plane: Plane, project: Path, faults: list[dict[str, Any]]
) -> None:
    for fault in faults:
        plane.faults.add(**fault)
    id = nothing(place, project)
    plane.faults.clear()
    assert made(place) == {id}
    assert nothing(place, project) == id


# What each phase of a submission asks the service for.
PHASES: dict[str, dict[str, str]] = {
    "looking for the environment": {"path": "*/environments/*", "method": "GET"},
    "registering it": {"path": "*/environments/*", "method": "PUT"},
    "looking for the job": {"path": "*/jobs/*", "method": "GET"},
    "asking where code goes": {"path": "*/startpendingupload", "method": "POST"},
    "uploading": {"path": "/llmkit*", "method": "PUT"},
    "registering the code": {"path": "*/codes/*", "method": "PUT"},
    "sending the job": {"path": "*/jobs/*", "method": "PUT"},
}


def gone(place: AzurePlace, plane: Plane, project: Path, seconds: float, without: str = "") -> None:
    """The service goes away in each phase of a submission, and comes back."""
    for number, (phase, calls) in enumerate((p, calls) for p, calls in PHASES.items() if p != without):
        (project / "nbs" / "other.py").write_text(f"x = {number}")  # another code: all is sent again
        with open(project / "azure" / "environments" / "train" / "Dockerfile", "a") as file:
            file.write(f"# {number}\n")
        known = made(place)
        fault = plane.faults.add(**calls, status=0, times=None, seconds=seconds)
        id = nothing(place, project)
        assert fault.hit, f"nothing was asked in the phase {phase}"
        plane.faults.clear()
        assert made(place) - known == {id}, phase


def test_a_service_gone_in_each_phase(place: AzurePlace, plane: Plane, project: Path) -> None:
    """A moment here; `make soak` takes the half minute, and the upload, which the SDK repeats after 15 seconds."""
    gone(place, plane, project, 0.2, without="uploading")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_service_gone_for_long_in_each_phase(place: AzurePlace, plane: Plane, project: Path) -> None:
    gone(place, plane, project, 30.0)


def test_a_token_that_expires_in_mid_upload_is_renewed(place: AzurePlace, plane: Plane, project: Path) -> None:
    def expire() -> None:
        while not upload.hit:
            time.sleep(0.005)
        plane.expire_tokens()

    upload = plane.faults.add(path="/llmkit*", method="PUT", status=200, delay=0.3)
    thread = threading.Thread(target=expire)
    thread.start()
    id = nothing(place, project)
    thread.join()
    assert upload.hit and made(place) == {id}


@pytest.mark.parametrize("plane", [{"sas_lifetime": 2.0}], indirect=True, ids=["2 s"])
def test_a_permission_to_upload_that_runs_out_is_asked_for_again(
    place: AzurePlace, plane: Plane, project: Path
) -> None:
    ensure_environment(place.service, project / "azure" / "environments" / "train", lambda line: None)
    upload = plane.faults.add(path="/llmkit*", method="PUT", status=200, delay=2.5)
    id = nothing(place, project)
    assert upload.hit and made(place) == {id}
    assert 403 in plane.faults.calls("PUT", "/llmkit*")


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["azure.ai.ml", "llmkit.azureml.place"])  # imported once, not by every client


def submit_alone(cloud: str, project: Path) -> None:
    """A client: what `killed_at` runs in a process of its own."""
    os.environ["LLMKIT_AZURE_CLOUD"] = cloud
    nothing(AzurePlace(home=project, say=lambda line: None), project)


def killed_at(plane: Plane, project: Path, call: int, applied: bool, **which: str) -> bool:
    """Kill a client while its call number `call` is under way, or answered; whether it got that far."""
    fault = plane.faults.add(status=0, after=call, delay=0.0 if applied else 0.5, applied=applied, **which)
    client = FORKS.Process(target=submit_alone, args=(str(plane.cloud), project))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AZUREML_CURRENT_CLOUD", raising=False)  # of this process: elsewhere the SDK cannot start with it
        client.start()
    while client.is_alive() and not fault.hit:
        time.sleep(0.002)
    client.kill()
    client.join()
    plane.faults.clear()
    return bool(fault.hit)


@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", [1, 5, 9, 13, -1])  # -1: the one that makes the job
def test_a_killed_client_can_be_run_again(
    place: AzurePlace, plane: Plane, project: Path, call: int, applied: bool
) -> None:
    """kill -9 between any two calls; `make soak` kills at each of them."""
    which = {"path": "*/jobs/*", "method": "PUT"} if call < 0 else {}
    assert killed_at(plane, project, call, applied, **which)
    assert made(place) <= {id := nothing(place, project)}
    assert made(place) == {id}


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_client_killed_at_every_call(place: AzurePlace, plane: Plane, project: Path) -> None:
    for applied in (False, True):
        for call in range(60):
            (project / "nbs" / "other.py").write_text(f"x = {call}{applied}")  # another code: another job
            known = made(place)
            reached = killed_at(plane, project, call, applied)
            id = nothing(place, project)
            assert made(place) - known == {id}
            if not reached:
                break
        assert call > 10


def test_code_goes_without_what_is_ignored(place: AzurePlace, project: Path) -> None:
    (project / ".gitignore").write_text("*.log\nruns/\n")
    (project / ".amlignore").write_text("notes.txt\n")
    (project / "runs").mkdir()
    for name in ("a.log", "notes.txt", "runs/b.txt", "nbs/c.py"):
        (project / name).write_text("x" * 1000)
    told: list[str] = []
    place.say = told.append
    spec = {"command": "find . -type f | sort", "code": ".", "compute": "azureml:cpu"}
    id = send(place.service, spec | {"environment": {"image": "python:3.11"}}, "lists", project, say=told.append).name
    assert ended(place, id).state == "finished"
    files = list(place.logs(id))
    assert "./nbs/c.py" in files and "./nbs/tiny.ipynb" in files
    assert not {"./a.log", "./notes.txt", "./runs/b.txt", "./.gitignore"} & set(files)
    assert told[0] == f"code: {len(files)} files, 0.0 MB from project"
    (project / "big.bin").write_bytes(b"x" * 2_000_000)
    with pytest.raises(ConfigError, match=r"is 2.0 MB, over 1 MB: big.bin \(2.0 MB\)"):
        place.submit(project / "nbs" / "tiny.ipynb", {}, compute="cpu", code_limit=1.0)
    assert made(place) == {id}


def test_what_is_wrong_is_one_line(place: AzurePlace, plane: Plane, project: Path, tmp_path: Path) -> None:
    job = project / "nbs" / "tiny.ipynb"
    bare = AzurePlace(place.service, project / "nbs", say=lambda line: None)  # without files of clusters
    environment = ensure_environment(place.service, project / "azure" / "environments" / "train", lambda line: None)
    untagged, used = (project / "nbs" / f"{name}.ipynb" for name in ("untagged", "used"))
    book = nbformat.read(job, 4)
    book.cells[1].outputs = [nbformat.v4.new_output("stream", text="old")]
    nbformat.write(book, used)
    book.cells = book.cells[1:]
    nbformat.write(book, untagged)
    cases: list[tuple[Any, str]] = [
        (lambda: place.submit(job, {}, compute="gpu-a10"), "did you mean"),
        (lambda: place.submit(job, {"lrr": 1}, compute="cpu"), "no parameter 'lrr'"),
        (lambda: place.submit(job, {}, compute="cpu", gpus=2), "has 0 GPUs"),
        (lambda: bare.submit(job, {}, compute="nowhere", environment=environment), "nowhere"),
        (lambda: bare.submit(job, {}, compute="cpu", environment="azureml:none:1"), "environments/none/versions/1"),
        (lambda: bare.submit(job, {}, compute="serverless:Standard_NC24s_v3", environment=environment), "is not"),
        (lambda: place.submit(untagged, {}, compute="cpu"), "no cell tagged 'parameters'"),
        (lambda: place.submit(used, {}, compute="cpu"), "holds the outputs of another run"),
        (lambda: place.send_file(project / "nowhere.yml"), "nowhere.yml"),
        (lambda: place.show("train-404"), "has no job 'train-404'"),
        (lambda: list(place.logs("train-404")), "has no job 'train-404'"),
        (lambda: place.cancel("train-404"), "has no job 'train-404'"),
        (lambda: place.fetch("train-404", tmp_path / "x"), "has no job 'train-404'"),
        (lambda: up(place.service, project, ["gpu-h100", "gpu-a100"], print), "Quotas"),
    ]
    for call, text in cases:
        with pytest.raises(LLMKitError) as error:
            call()
        assert text in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert made(place) == set()


def test_a_workspace_that_is_none(plane: Plane) -> None:
    with pytest.raises(LLMKitError, match=r"could not list the jobs: .*other-ws"):
        AzurePlace(connect({"workspace": "other-ws"})).list()


def test_a_token_of_another_tenant(plane: Plane) -> None:
    said = json.loads(plane.cloud.read_text())
    plane.cloud.write_text(json.dumps(said | {"token": plane.identity.token(tenant="22222222-" + "2" * 27)}))
    with pytest.raises(ServiceError, match="the credential is of another tenant: az login --tenant"):
        AzurePlace(connect(patience=1.0)).list()


def test_a_service_that_is_away(plane: Plane) -> None:
    found = connect(patience=2.0)
    plane.faults.add(status=0, times=None)
    with pytest.raises(ServiceError, match="Azure does not answer"):
        AzurePlace(found).list()


def test_no_credential(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DefaultAzureCredential with nothing to find: one line."""
    for name in list(os.environ):
        if name.startswith(("AZURE_", "AZUREML_", "IDENTITY_", "MSI_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("LLMKIT_AZURE_CLOUD", raising=False)
    monkeypatch.setenv("PATH", str(project))  # no az
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "AzureCliCredential")
    names = {"subscription": "00000000-1111-2222-3333-444444444444", "resource_group": "rg", "workspace": "ws-llm"}
    with pytest.raises(LLMKitError, match="no credential for Azure; az login"):
        AzurePlace(connect(names, start=project, patience=0.0)).list()


def llmkit(project: Path, *words: str, timeout: float = 120) -> tuple[int, str]:
    """Exit code and output of the command, called in the project."""
    line = [sys.executable, "-m", "llmkit.cli", *words]
    places = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    kept = {k: v for k, v in os.environ.items() if k != "AZUREML_CURRENT_CLOUD"}  # of this process
    env = kept | {"PYTHONPATH": places, "COLUMNS": "200"}
    done = subprocess.run(line, cwd=project, env=env, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


@TRACKED
def test_the_command_line(place: AzurePlace, project: Path) -> None:
    """The same verbs as for jobs of this machine."""
    code, text = llmkit(project, "run", "nbs/tiny.ipynb", "-p", "lr", "0.3", "--on", "azureml", "--compute", "cpu")
    assert code == 0 and "lr 0.3 revision a" in text, text
    (id,) = made(place)
    code, text = llmkit(project, "jobs", "show", id)
    assert code == 0 and "finished" in text and "lr 0.3" in text, text
    code, text = llmkit(project, "jobs", "fetch", id, "got")
    assert code == 0 and (project / "got" / "result.json").exists(), text
    code, text = llmkit(project, "jobs", "list", "--on", "azureml")
    assert code == 0 and id in text, text
    code, text = llmkit(project, "run", "nbs/tiny.ipynb", "-p", "lrr", "1", "--on", "azureml", "--compute", "cpu")
    assert code == 2 and "no parameter 'lrr'; did you mean 'lr'?" in text and text.count("\n") == 1, text


@TRACKED
def test_a_sweep_is_one_job_with_trials(place: AzurePlace, project: Path) -> None:
    job = project / "nbs" / "tiny.ipynb"
    options = {"compute": "cpu", "sweep": {"lr": [0.1, 0.2]}, "parallel": 2}
    id = place.submit(job, {"revision": "b"}, **options)
    assert place.submit(job, {"revision": "b"}, **options) == id
    assert ended(place, id).state == "finished", list(place.logs(id))
    with pytest.raises(ConfigError, match="lr = 'x'"):
        place.submit(job, {}, compute="cpu", sweep={"lr": [0.1, "x"]})


LINE = {
    "$schema": "https://azuremlschemas.azureedge.net/latest/pipelineJob.schema.json",
    "type": "pipeline",
    "settings": {"default_compute": "azureml:cpu"},
    "outputs": {"text": {"type": "uri_folder"}},
    "jobs": {
        "write": {
            "type": "command",
            "command": "echo words > ${{outputs.text}}/a.txt",
            "code": "../nbs",
            "environment": {"image": "python:3.11"},
            "outputs": {"text": {"type": "uri_folder"}},
        },
        "count": {
            "type": "command",
            "command": "wc -c < ${{inputs.text}}/a.txt > ${{outputs.text}}/b.txt",
            "environment": {"image": "python:3.11"},
            "inputs": {"text": "${{parent.jobs.write.outputs.text}}"},
            "outputs": {"text": "${{parent.outputs.text}}"},
        },
    },
}


def test_a_pipeline_and_a_schedule_from_files(place: AzurePlace, project: Path, tmp_path: Path) -> None:
    (project / "jobs").mkdir()
    line = project / "jobs" / "line.yml"
    line.write_text(json.dumps(LINE))
    id = place.send_file(line)
    assert place.send_file(line) == id and made(place) == {id}
    assert ended(place, id).state == "finished", list(place.logs(id))
    assert sorted(line.split(";")[0] for line in place.logs(id)) == ["count: Completed", "write: Completed"]
    found = place.fetch(id, tmp_path / "got")
    assert [p.read_text().strip() for p in found.rglob("b.txt")] == ["6"]
    weekly = project / "jobs" / "weekly.yml"
    trigger = {"type": "cron", "expression": "0 4 * * 1"}
    weekly.write_text(json.dumps({"name": "weekly", "trigger": trigger, "create_job": "./line.yml"}))
    for _ in range(2):
        assert place.send_file(weekly) == "weekly"
    names = place.service.call("list the schedules", lambda c: [s.name for s in c.schedules.list()])
    assert names == ["weekly"]


@pytest.mark.parametrize("name", ["train", "evaluate", "optimize", "sweep", "train_to_register"])
def test_a_file_is_the_same_job_when_it_is_loaded_written_and_loaded(tmp_path: Path, name: str) -> None:
    path = ROOT / "azure" / "jobs" / f"{name}.yml"
    kind = {"sweep": "sweep", "train_to_register": "pipeline"}.get(name, "command")
    first = written(sdk_load(path, kind))
    assert written(sdk_load(write_yaml(first, tmp_path / "job.yml"), kind)) == first


def test_assets_are_registered_once(place: AzurePlace, plane: Plane, tmp_path: Path) -> None:
    """Data and models are versions by content: the same again is the same version, and nothing goes up."""
    model, text = tmp_path / "model", tmp_path / "text"
    for folder, name in ((model, "config.json"), (text, "a.txt")):
        folder.mkdir()
        (folder / name).write_text("{}")
    (model / "llmkit.json").write_text(json.dumps({"base": "tiny", "metrics": {"perplexity": 9.5}}))
    for _ in range(2):
        assert register_model(place.service, model, "llmkit") == 1
        data = ensure_data(place.service, "text", text)
    tags = place.service.call("read the model", lambda c: c.models.get("llmkit", "1").tags)
    assert tags["metric.perplexity"] == "9.5" and tags["base"] == "tiny"
    sent = len(plane.faults.calls("PUT", "/llmkit*"))
    register_model(place.service, model, "llmkit")
    ensure_data(place.service, "text", text)
    assert len(plane.faults.calls("PUT", "/llmkit*")) == sent
    (model / "config.json").write_text('{"new": 1}')
    (text / "a.txt").write_text("other")
    assert register_model(place.service, model, "llmkit") == 2
    assert ensure_data(place.service, "text", text) != data


SMALL = {
    "min_bytes": 0, "max_bytes": 400_000, "vocab_size": 512, "fim_examples": 400, "hidden_size": 64, "layers": 2,
    "intermediate_size": 96, "steps": 30, "sft_steps": 10, "length": 48, "windows": 8, "window_tokens": 33,
    "answers": 8, "max_tokens": 8, "holes": 16, "prompts": 24, "prompt_tokens": 16, "rounds": 1,
    "bounds": "smoke",
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(900)
@TRACKED
def test_the_pipeline_that_is_written_down(plane: Plane, tmp_path: Path) -> None:
    """`llmkit pipeline azure/jobs/train_to_register.yml`, with small numbers: five jobs, and a model with a version."""
    text = (ROOT / "azure" / "jobs" / "train_to_register.yml").read_text().replace("../..", str(ROOT))
    for name, value in SMALL.items():
        text, found = re.subn(rf"-p {name} \S+", f"-p {name} {value}", text)
        assert found, name
    (tmp_path / "line.yml").write_text(text)
    assert llmkit(ROOT, "azure", "up", "cpu", "gpu-spot")[0] == 0
    code, told = llmkit(ROOT, "pipeline", str(tmp_path / "line.yml"), "--on", "azureml", timeout=800)
    assert code == 0, told
    (id,) = made(AzurePlace(connect(), ROOT))
    children = connect().call("list the steps", lambda c: [j.display_name for j in c.jobs.list(parent_job_name=id)])
    stages = ("prepare_data", "train_model", "evaluate_model", "register_model", "optimize_model")
    assert sorted(children) == sorted(stages)
    folder = connect().call("read the model", lambda c: c.models.get("llmkit", "1")).path
    assert folder
