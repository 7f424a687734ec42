"""Jobs in Azure ML, sent by the real SDK to the local control plane, which runs them: once each, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from azure_plane import Plane

from llmkit.azureml.compute import up
from llmkit.azureml.place import AzurePlace
from llmkit.azureml.submit import send
from llmkit.azureml.workspace import connect
from llmkit.core.errors import ConfigError, LLMKitError, RunError, ServiceError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of marshmallow, which the SDK uses
TRACKED = pytest.mark.parametrize("plane", [True], indirect=True, ids=["mlflow"])
ROOT = Path(__file__).resolve().parents[1]
CELL = "out = ''  # run folder\nlr = 0.1  # rate\nrevision = 'a'  # text\nnproc = 1\nnnodes = 1\nshared = ''"
WORK = """import os
from llmkit.core.run import Run

run = Run(out, "tiny", {"lr": lr, "revision": revision})
run.metric("loss", lr * 2)
print("node", os.environ.get("NODE_RANK", "0"), "of", nnodes, "lr", lr, "revision", revision)
run.finish()"""


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Plane]:
    """A control plane; with an MLflow run for every job where a test asks for it."""
    tracked = getattr(request, "param", False)
    with Plane(tmp_path / "plane", delay=0.05, blobs="stub", mlflow=tracked) as running:
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
    found = AzurePlace(connect(), project, say=lambda line: None)
    up(found.service, project, ["cpu", "gpu-spot"], say=lambda line: None)
    return found


def ended(place: AzurePlace, id: str, patience: float = 120.0) -> Any:
    """The row of a job that is over."""
    end = time.monotonic() + patience
    while (row := place.show(id)).active:
        assert time.monotonic() < end, f"{id} is still {row.state}"
        time.sleep(0.2)
    return row


def made(place: AzurePlace) -> set[str]:
    """The names of all jobs that the workspace has."""
    return {row.id for row in place.list(1000)}


@TRACKED
def test_a_job_runs_and_comes_back(place: AzurePlace, plane: Plane, project: Path, tmp_path: Path) -> None:
    params = {"lr": 0.3, "revision": "007"}
    id = place.submit(project / "nbs" / "tiny.ipynb", params, compute="cpu")
    assert place.submit(project / "nbs" / "tiny.ipynb", params, compute="cpu") == id
    assert made(place) == {id}
    row = ended(place, id)
    log = list(place.logs(id))
    assert row.state == "finished", log
    assert row.params == params | {"nproc": 1, "nnodes": 1}
    assert any("lr 0.3 revision 007" in line for line in log)
    folder = place.fetch(id, tmp_path / "got")
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"] == {"loss": 0.6} and result["params"] == params
    assert (folder / "tiny.ipynb").exists() and (folder / "environment.txt").exists()
    assert result["mlflow_run_id"] == id and plane.tracking.metrics(id) == {"loss": 0.6}  # one id for both
    assert [r.id for r in place.list(5)] == [id]
    assert place.submit(project / "nbs" / "tiny.ipynb", params, compute="cpu", label="again") != id


@TRACKED
def test_two_nodes_leave_a_folder_each(place: AzurePlace, project: Path, tmp_path: Path) -> None:
    id = place.submit(project / "nbs" / "tiny.ipynb", {}, compute="cpu", nodes=2)
    assert ended(place, id).state == "finished", list(place.logs(id))
    folder = place.fetch(id, tmp_path / "got")
    assert (folder / "tiny.ipynb").exists() and (folder / "node-1" / "tiny.ipynb").exists()


@TRACKED
def test_what_is_followed_is_told_to_its_end(place: AzurePlace, project: Path) -> None:
    id = place.submit(project / "nbs" / "tiny.ipynb", {"lr": 0.4}, compute="cpu")
    lines = list(place.logs(id, follow=True))
    assert any("lr 0.4" in line for line in lines), lines
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
    "throttled": [{"status": 429, "retry_after": 1, "times": 6}],
    "gone for a while": [{"status": 0, "times": None, "seconds": 4.0}],
    "busy": [{"path": "*/jobs/*", "status": 503, "times": 4}],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_fault_neither_loses_nor_doubles_a_job(
    place: AzurePlace, plane: Plane, project: Path, faults: list[dict[str, Any]]
) -> None:
    for fault in faults:
        plane.faults.add(**fault)
    id = place.submit(project / "nbs" / "tiny.ipynb", {"lr": 0.2}, compute="cpu")
    plane.faults.clear()
    assert made(place) == {id}
    assert place.submit(project / "nbs" / "tiny.ipynb", {"lr": 0.2}, compute="cpu") == id


def test_an_expired_token_is_renewed(place: AzurePlace, plane: Plane, project: Path) -> None:
    assert place.list() == []
    plane.expire_tokens()
    id = place.submit(project / "nbs" / "tiny.ipynb", {"lr": 0.2}, compute="cpu")
    assert made(place) == {id}


SEND = """import sys
from pathlib import Path
from llmkit.azureml.place import AzurePlace
home = Path(sys.argv[1])
print(AzurePlace(home=home, say=lambda line: None).submit(home / "nbs" / "tiny.ipynb", {"lr": 0.5}, compute="cpu"))
"""


def variables() -> dict[str, str]:
    """The environment of a client of its own: without the cloud that the SDK has left in ours."""
    places = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    kept = {k: v for k, v in os.environ.items() if k != "AZUREML_CURRENT_CLOUD"}
    return kept | {"PYTHONPATH": places, "COLUMNS": "200"}


def killed_at(plane: Plane, project: Path, call: int, applied: bool) -> bool:
    """Kill a client while its call number `call` is under way; whether it got that far."""
    plane.faults.add(status=0, after=call, delay=0.0 if applied else 3.0, applied=applied)
    before = len(plane.faults.log)
    fault = plane.faults.active[-1]
    line = [sys.executable, "-c", SEND, str(project)]
    with subprocess.Popen(line, env=variables(), stdout=subprocess.PIPE) as client:
        while client.poll() is None and not fault.hit:
            time.sleep(0.01)
        client.send_signal(signal.SIGKILL)
    plane.faults.clear()
    assert len(plane.faults.log) >= before
    return bool(fault.hit)


@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", range(0, 24, 6))
def test_a_killed_client_can_be_run_again(
    place: AzurePlace, plane: Plane, project: Path, call: int, applied: bool
) -> None:
    """kill -9 between any two calls; `make soak` kills at each of them."""
    killed_at(plane, project, call, applied)
    id = place.submit(project / "nbs" / "tiny.ipynb", {"lr": 0.5}, compute="cpu")
    assert made(place) == {id}


@pytest.mark.soak
def test_a_client_killed_at_every_call(place: AzurePlace, plane: Plane, project: Path) -> None:
    for applied in (False, True):
        for call in range(60):
            (project / "nbs" / "other.py").write_text(f"x = {call}{applied}")  # another code: another job
            known = made(place)
            reached = killed_at(plane, project, call, applied)
            id = place.submit(project / "nbs" / "tiny.ipynb", {"lr": 0.5}, compute="cpu")
            assert made(place) - known == {id}
            if not reached:
                break


def test_what_is_wrong_is_one_line(place: AzurePlace, plane: Plane, project: Path, tmp_path: Path) -> None:
    job = project / "nbs" / "tiny.ipynb"
    bare = AzurePlace(place.service, tmp_path, say=lambda line: None)  # without files of clusters
    cases: list[tuple[Any, str]] = [
        (lambda: place.submit(job, {}, compute="gpu-a10"), "did you mean"),
        (lambda: place.submit(job, {"lrr": 1}, compute="cpu"), "no parameter 'lrr'"),
        (lambda: place.submit(job, {}, compute="cpu", gpus=2), "has 0 GPUs"),
        (lambda: bare.submit(job, {}, compute="nowhere", environment="azureml:a:1"), "nowhere"),
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


def llmkit(project: Path, *words: str) -> tuple[int, str]:
    """Exit code and output of the command, called in the project."""
    line = [sys.executable, "-m", "llmkit.cli", *words]
    done = subprocess.run(line, cwd=project, env=variables(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@TRACKED
def test_the_command_line(plane: Plane, project: Path) -> None:
    """The same verbs as for jobs of this machine."""
    code, text = llmkit(project, "azure", "up", "cpu")
    assert code == 0 and "cpu made" in text and "USD/h" in text, text
    code, text = llmkit(project, "run", "nbs/tiny.ipynb", "-p", "lr", "0.3", "--on", "azureml", "--compute", "cpu")
    assert code == 0 and "lr 0.3 revision a" in text, text
    id = next(iter(made(AzurePlace(connect(), project))))
    code, text = llmkit(project, "jobs", "show", id)
    assert code == 0 and "finished" in text and "lr 0.3" in text, text
    code, text = llmkit(project, "jobs", "fetch", id, "got")
    assert code == 0 and (project / "got" / "result.json").exists(), text
    code, text = llmkit(project, "jobs", "list", "--on", "azureml")
    assert code == 0 and id in text, text
    code, text = llmkit(project, "azure", "status")
    assert code == 0 and "succeeded" in text, text
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
    found = place.fetch(id, tmp_path / "got")
    assert [p.read_text().strip() for p in found.rglob("b.txt")] == ["6"]
    weekly = project / "jobs" / "weekly.yml"
    trigger = {"type": "cron", "expression": "0 4 * * 1"}
    weekly.write_text(json.dumps({"name": "weekly", "trigger": trigger, "create_job": "./line.yml"}))
    for _ in range(2):
        assert place.send_file(weekly) == "weekly"
    names = place.service.call("list the schedules", lambda c: [s.name for s in c.schedules.list()])
    assert names == ["weekly"]
