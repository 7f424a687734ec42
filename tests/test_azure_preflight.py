"""What the SDK lets through and Azure refuses is refused here, with file, key and remedy; good files are not."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from llmkit.azureml.command import encoded
from llmkit.azureml.preflight import preflight

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of marshmallow, which the SDK uses
ROOT = Path(__file__).resolve().parents[1]
SCHEMA = "https://azuremlschemas.azureedge.net/latest/{}.schema.json"
CELL = "n = 8  # number to halve\nrate = 0.5\nname = 'x'"


def schema(kind: str, /, **values: Any) -> dict[str, Any]:
    return {"$schema": SCHEMA.format(kind)} | values


STEP = {
    "type": "command",
    "command": "python e.py --model ${{inputs.model}}",
    "code": "./src",
    "environment": "azureml:train@latest",
    "inputs": {"model": "${{parent.jobs.train.outputs.model}}"},
}
TRAIN = {
    "type": "command",
    "component": "./component.yml",
    "inputs": {"data": "${{parent.inputs.corpus}}"},
    "outputs": {"model": "${{parent.outputs.model}}"},
}
GOOD: dict[str, dict[str, Any]] = {
    "job.yml": schema(
        "commandJob",
        name="halve-1",
        command="python -m llmkit.cli run halve.ipynb -p n 6 -p name ${{inputs.text}} --out ${{outputs.run}}",
        code="./src",
        environment="azureml:train@latest",
        compute="azureml:gpu-a100",
        inputs={"text": {"type": "uri_folder", "path": "./text"}, "rate": 0.5},
        outputs={"run": {"type": "uri_folder", "mode": "rw_mount"}},
        resources={"instance_count": 2, "shm_size": "16g"},
        distribution={"type": "pytorch", "process_count_per_instance": 1},
        limits={"timeout": 3600},
        environment_variables={"WHERE": "${{outputs.run}}"},
    ),
    "serverless.yml": schema(
        "commandJob",
        command="python t.py $[[--lr ${{inputs.lr}}]]",
        environment={"image": "mcr.microsoft.com/azureml/base:1"},
        inputs={"lr": 0.1},
        resources={"instance_type": "Standard_NC24ads_A100_v4"},
    ),
    "sweep.yml": schema(
        "sweepJob",
        type="sweep",
        compute="azureml:gpu-a100",
        sampling_algorithm="grid",
        objective={"goal": "minimize", "primary_metric": "loss"},
        search_space={"rate": {"type": "choice", "values": [0.1, 0.2]}},
        limits={"max_total_trials": 2, "max_concurrent_trials": 2, "timeout": 60},
        trial={
            "command": "papermill halve.ipynb out.ipynb -p rate ${{search_space.rate}}",
            "code": "./src",
            "environment": "azureml:train@latest",
        },
    ),
    "component.yml": schema(
        "commandComponent",
        name="train",
        type="command",
        version="1",
        command="python t.py --data ${{inputs.data}} --steps ${{inputs.steps}} --out ${{outputs.model}}",
        code="./src",
        environment="azureml:train@latest",
        inputs={"data": {"type": "uri_folder"}, "steps": {"type": "integer", "default": 3}},
        outputs={"model": {"type": "uri_folder"}},
    ),
    "pipeline.yml": schema(
        "pipelineJob",
        type="pipeline",
        settings={"default_compute": "azureml:gpu-a100"},
        inputs={"corpus": {"type": "uri_folder", "path": "azureml:corpus:1"}},
        outputs={"model": {"type": "uri_folder"}},
        jobs={"train": TRAIN, "evaluate": STEP},
    ),
    "cluster.yml": schema(
        "amlCompute",
        name="gpu-a100",
        type="amlcompute",
        size="Standard_ND96amsr_A100_v4",
        min_instances=0,
        max_instances=4,
        tier="low_priority",
        idle_time_before_scale_down=120,
    ),
    "environment.yml": schema("environment", name="train", build={"path": "./image"}),
    "image.yml": schema("environment", name="serve", image="pytorch/pytorch:2.13.0"),
    "endpoint.yml": schema(
        "managedOnlineEndpoint", name="llm", auth_mode="key", traffic={"blue": 100}, mirror_traffic={"green": 10}
    ),
    "blue.yml": schema(
        "managedOnlineDeployment",
        name="blue",
        endpoint_name="llm",
        model="azureml:m:1",
        instance_type="Standard_DS3_v2",
        instance_count=1,
        request_settings={"request_timeout_ms": 90_000, "max_concurrent_requests_per_instance": 8},
    ),
    "green.yml": schema(
        "managedOnlineDeployment",
        name="green",
        endpoint_name="llm",
        model="azureml:m:2",
        environment="azureml:serve:1",
        code_configuration={"code": "./src", "scoring_script": "score.py"},
        instance_type="Standard_NC24ads_A100_v4",
        instance_count=2,
    ),
}
RUN = "python -m llmkit.cli run halve.ipynb"
PER_NODE = "distribution.process_count_per_instance"
NONE_EACH = {"type": "pytorch", "process_count_per_instance": 0}
NO_WORKER = {"type": "tensorflow", "worker_count": 0}
UNKNOWN_VALUE = "papermill halve.ipynb o.ipynb -p rate ${{search_space.rates}}"

# cell of the table, file, key, value (None: the key is taken out), key that the problem names (empty: the same)
BAD: list[tuple[str, str, str, Any, str]] = [
    ("instance_count 0", "job.yml", "resources.instance_count", 0, ""),
    ("instance_count 0", "job.yml", "resources.instance_count", -1, ""),
    ("instance_count 0", "pipeline.yml", "jobs.train.resources", {"instance_count": 0},
     "jobs.train.resources.instance_count"),
    ("process_count 0", "job.yml", PER_NODE, 0, ""),
    ("process_count 0", "component.yml", "distribution", NONE_EACH, PER_NODE),
    ("process_count 0", "job.yml", "distribution", NO_WORKER, "distribution.worker_count"),
    ("no compute", "job.yml", "compute", None, ""),
    ("no compute", "serverless.yml", "resources", None, "compute"),
    ("no compute", "sweep.yml", "compute", None, ""),
    ("no compute", "pipeline.yml", "settings", None, "jobs.train.compute"),
    ("job name", "job.yml", "name", "halve it!", ""),
    ("job name", "job.yml", "name", "-halve", ""),
    ("job name", "pipeline.yml", "name", "x" * 256, ""),
    ("job name", "sweep.yml", "experiment_name", "my experiments", ""),
    ("shm_size", "job.yml", "resources.shm_size", "16 gigs", ""),
    ("shm_size", "job.yml", "resources.shm_size", "16gb", ""),
    ("shm_size", "sweep.yml", "trial.resources", {"shm_size": "lots"}, "trial.resources.shm_size"),
    ("timeout", "job.yml", "limits.timeout", -1, ""),
    ("timeout", "job.yml", "limits.timeout", 0, ""),
    ("timeout", "sweep.yml", "limits.trial_timeout", -60, ""),
    ("brackets", "serverless.yml", "command", "python t.py $[[--lr ${{inputs.lr}}", "command"),
    ("brackets", "serverless.yml", "command", "python t.py --lr ${{inputs.lr", "command"),
    ("brackets", "component.yml", "command", "python t.py $[[--in ${{inputs.data}} > ${{outputs.model}}", "command"),
    ("notebook", "job.yml", "command", "python -m llmkit.cli run ../outside.ipynb", "code"),
    ("notebook", "job.yml", "command", "papermill nowhere.ipynb out.ipynb", "code"),
    ("notebook", "job.yml", "code", None, "code"),
    ("notebook", "sweep.yml", "trial.code", "./text", "trial.code"),
    ("outputs", "job.yml", "command", f"{RUN} --out ${{{{outputs.rum}}}}", "command"),
    ("outputs", "component.yml", "command", "python t.py ${{outputs.out}}", "command"),
    ("outputs", "job.yml", "environment_variables.WHERE", "${{outputs.where}}", ""),
    ("outputs", "pipeline.yml", "jobs.evaluate.inputs.model", "${{parent.jobs.train.outputs.mdl}}", ""),
    ("outputs", "pipeline.yml", "jobs.train.outputs.model", "${{parent.outputs.models}}", ""),
    ("inputs", "job.yml", "command", f"{RUN} -p name ${{{{inputs.texts}}}}", "command"),
    ("inputs", "serverless.yml", "inputs", None, "command"),
    ("inputs", "sweep.yml", "trial.command", UNKNOWN_VALUE, "trial.command"),
    ("inputs", "pipeline.yml", "jobs.train.inputs.data", "${{parent.inputs.corpse}}", ""),
    ("inputs", "pipeline.yml", "jobs.evaluate.inputs.model", "${{parent.jobs.trian.outputs.model}}", ""),
    ("inputs", "pipeline.yml", "jobs.train.inputs", {"date": "${{parent.inputs.corpus}}"}, "jobs.train.inputs.date"),
    ("local input", "job.yml", "inputs.text.path", "./nowhere", ""),
    ("local input", "pipeline.yml", "inputs.corpus.path", "../nowhere/else.txt", ""),
    ("traffic", "endpoint.yml", "traffic", {"blue": 90}, "traffic"),
    ("traffic", "endpoint.yml", "traffic", {"blue": 50, "green": 40}, "traffic"),
    ("negative traffic", "endpoint.yml", "traffic", {"blue": 110, "green": -10}, "traffic.green"),
    ("negative traffic", "endpoint.yml", "traffic", {"blue": -1, "green": 101}, "traffic.blue"),
    ("unknown deployment", "endpoint.yml", "traffic", {"blue": 90, "gren": 10}, "traffic.gren"),
    ("unknown deployment", "endpoint.yml", "mirror_traffic", {"grene": 10}, "mirror_traffic.grene"),
    ("unknown deployment", "blue.yml", "endpoint_name", "llms", "endpoint_name"),
    ("mirror", "endpoint.yml", "mirror_traffic", {"green": 70}, "mirror_traffic.green"),
    ("mirror", "endpoint.yml", "mirror_traffic", {"green": 51}, "mirror_traffic.green"),
    ("two mirrors", "endpoint.yml", "mirror_traffic", {"green": 10, "blue": 10}, "mirror_traffic"),
    ("two mirrors", "endpoint.yml", "mirror_traffic", {"blue": 10}, "mirror_traffic.blue"),
    ("percents", "endpoint.yml", "traffic", {"blue": 97.5, "green": 2.5}, "traffic.blue"),
    ("percents", "endpoint.yml", "mirror_traffic", {"green": 2.5}, "mirror_traffic.green"),
    ("deployment's instances", "blue.yml", "instance_count", 0, ""),
    ("deployment's instances", "green.yml", "instance_count", -2, ""),
    ("no instances", "blue.yml", "instance_count", None, ""),
    ("no instances", "green.yml", "instance_count", None, ""),
    ("size", "blue.yml", "instance_type", "Standard_Banana", ""),
    ("size", "green.yml", "instance_type", "NC24", ""),
    ("size", "cluster.yml", "size", "Standard_Huge", ""),
    ("size", "serverless.yml", "resources.instance_type", "a100", ""),
    ("code alone", "green.yml", "environment", None, ""),
    ("code alone", "blue.yml", "code_configuration", {"code": "./src", "scoring_script": "s.py"}, "environment"),
    ("request timeout", "blue.yml", "request_settings.request_timeout_ms", 999_999, ""),
    ("request timeout", "green.yml", "request_settings", {"request_timeout_ms": 0},
     "request_settings.request_timeout_ms"),
    ("min over max", "cluster.yml", "min_instances", 5, ""),
    ("min over max", "cluster.yml", "max_instances", 0, ""),
    ("no size", "cluster.yml", "size", None, ""),
    ("no size", "cluster.yml", "size", "", ""),
    ("names", "cluster.yml", "name", "g" * 25, ""),
    ("names", "cluster.yml", "name", "my cluster", ""),
    ("names", "environment.yml", "name", "train image", ""),
    ("names", "image.yml", "name", "e" * 256, ""),
    ("image", "image.yml", "image", "My Image:1", ""),
    ("image", "image.yml", "image", "https://llm.azurecr.io/a:1", ""),
    ("image", "serverless.yml", "environment.image", "a::b", ""),
    ("unknown arguments", "job.yml", "resources.instances", 2, ""),
    ("unknown arguments", "job.yml", "distribution.process_count", 3, ""),
    ("tier", "cluster.yml", "tier", "spot", ""),
    ("tier", "cluster.yml", "tier", "cheap", ""),
    ("together", "job.yml", "compute", "azureml:gpu-a10", "compute"),
    ("together", "job.yml", "resources.instance_count", 8, ""),
    ("together", "job.yml", PER_NODE, 16, ""),
    ("together", "job.yml", "environment", "azureml:trian@latest", ""),
    ("parameters", "job.yml", "command", f"{RUN} -p m 3", "command"),
    ("parameters", "job.yml", "command", f"{RUN} -p n many", "command"),
    ("parameters", "job.yml", "command", f"{RUN} -b {encoded({'n': '3'})}", "command"),
    ("parameters", "job.yml", "command", f"{RUN} -f broken.txt", "command"),
    ("parameters", "job.yml", "command", "python -m llmkit.cli run used.ipynb", "command"),
    ("parameters", "job.yml", "command", "python -m llmkit.cli run bare.ipynb", "command"),
]  # fmt: skip
SWALLOWED = {"unknown arguments"}  # the SDK refuses these in YAML and swallows them in Python


def notebook(path: Path, tagged: bool = True, used: bool = False) -> None:
    cell = nbformat.v4.new_code_cell(CELL, outputs=[nbformat.v4.new_output("stream", text="4")] if used else [])
    cell.metadata["tags"] = ["parameters"] if tagged else []
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), path)


def files(folder: Path, changes: dict[str, dict[str, Any]] | None = None) -> Path:
    """Write the good files, some changed, and what they refer to."""
    for name in ("src", "text", "image"):
        (folder / name).mkdir()
    notebook(folder / "outside.ipynb")
    notebook(folder / "src" / "halve.ipynb")
    notebook(folder / "src" / "used.ipynb", used=True)
    notebook(folder / "src" / "bare.ipynb", tagged=False)
    (folder / "image" / "Dockerfile").write_text("FROM python:3.11\n")
    (folder / "src" / "broken.txt").write_text("n: [1\n")
    for name, data in (GOOD | (changes or {})).items():
        (folder / name).write_text(yaml.safe_dump(data, sort_keys=False))
    return folder


def changed(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one value changed; None takes the key out."""
    done = copy.deepcopy(data)
    *parts, last = key.split(".")
    inner = done
    for part in parts:
        inner = inner[part]
    if value is None:
        inner.pop(last)
    else:
        inner[last] = value
    return done


def test_good_files_are_let_through(tmp_path: Path) -> None:
    assert [str(p) for p in preflight([files(tmp_path)])] == []


@pytest.mark.parametrize("name", GOOD)
def test_good_files_are_let_through_one_by_one(tmp_path: Path, name: str) -> None:
    assert [str(p) for p in preflight([files(tmp_path) / name])] == []


@pytest.mark.parametrize(("cell", "name", "key", "value", "told"), BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_bad_files_are_refused(tmp_path: Path, cell: str, name: str, key: str, value: Any, told: str) -> None:
    """With the file and the key named, and a remedy; nothing else is said of that key's neighbours."""
    folder = files(tmp_path, {name: changed(GOOD[name], key, value)})
    problems = [p for p in preflight([folder], sdk=False) if Path(p.file).name == name]
    assert (told or key) in [p.key for p in problems], [str(p) for p in problems]
    assert all(p.what and p.remedy for p in problems)
    assert all("\n" not in str(p) for p in problems)


def test_every_cell_is_there_twice() -> None:
    cells = [b[0] for b in BAD]
    assert len(BAD) >= 60
    assert {c for c in cells if cells.count(c) < 2} == set()


def test_no_function_of_the_sdk_is_given_what_it_would_swallow() -> None:
    """`command(instances=2)`, `PyTorchDistribution(process_count=3)` are accepted and ignored: jobs are YAML here."""
    from llmkit.azureml import place, spec, submit

    for module in (place, spec, submit):
        text = inspect.getsource(module)
        assert "PyTorchDistribution(" not in text and "import command" not in text


def test_the_project_own_files_pass() -> None:
    assert [str(p) for p in preflight([ROOT / "azure"])] == []
