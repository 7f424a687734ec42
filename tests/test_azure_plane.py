"""The local Azure ML of the tests, driven by the real SDK: what it runs, what it refuses, how it fails."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
from azure.ai.ml import MLClient, Output, PyTorchDistribution, command, load_job
from azure.ai.ml.entities import (
    AmlCompute,
    Environment,
    JobSchedule,
    ManagedOnlineDeployment,
    ManagedOnlineEndpoint,
    Model,
    OnlineRequestSettings,
    ProbeSettings,
    RecurrenceTrigger,
)
from azure.ai.ml.entities._assets.environment import BuildContext
from azure.ai.ml.sweep import Choice
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ResourceNotFoundError
from azure_plane import Plane, client
from azure_plane.model import mock_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of marshmallow, which the SDK uses

MAIN = """
import json, os, pathlib, sys
out = pathlib.Path(sys.argv[1])
out.mkdir(exist_ok=True)
rank = os.environ.get("NODE_RANK", "0")
print("rank", rank, "says hello")
(out / f"node-{rank}.json").write_text(json.dumps({"env": dict(os.environ), "args": sys.argv[2:], "cwd": os.getcwd()}))
"""
SERVE = """#!/bin/sh
exec llmkit serve "revision=$AZUREML_MODEL_DIR/model" --host "${HOST:-0.0.0.0}" --port "${PORT:-8000}" --engine mock \\
  --slots "$SLOTS"
"""


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    with Plane(tmp_path_factory.mktemp("azure") / "plane", delay=0.05) as plane:
        yield plane


@pytest.fixture(scope="module")
def ml(plane) -> MLClient:
    made = client(plane.cloud)
    made.compute.begin_create_or_update(AmlCompute(name="cpu", size="Standard_DS3_v2", max_instances=2)).result()
    return made


@pytest.fixture(autouse=True)
def calm(request):
    """No fault outlives its test."""
    yield
    if "plane" in request.fixturenames:
        plane = request.getfixturevalue("plane")
        plane.faults.clear()
        plane.store.lag.clear()


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "main.py").write_text(MAIN)
    return folder


@pytest.fixture
def job(code):
    def make(words: str = "python main.py ${{outputs.run}}", **options):
        given = {"environment": Environment(image="llmkit/train:1"), "compute": "cpu", "code": str(code)}
        given |= {"outputs": {"run": Output(type="uri_folder")}, "experiment_name": "tests"}
        return command(command=words, **(given | options))

    return make


def wait(ml: MLClient, name: str, seconds: float = 30.0) -> str:
    """How a job ended."""
    until = time.monotonic() + seconds
    while (status := ml.jobs.get(name).status) not in ("Completed", "Failed", "Canceled"):
        assert time.monotonic() < until, f"{name} is still {status}"
        time.sleep(0.05)
    return status


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends; one that init has yet to collect counts as ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def result(ml: MLClient, name: str, folder: Path, node: int = 0) -> dict:
    """What a node of a job wrote, downloaded."""
    ml.jobs.download(name, download_path=folder, all=True)
    return json.loads((folder / f"named-outputs/run/node-{node}.json").read_text())


def test_a_job_runs_and_its_outputs_come_back(plane, ml, job, tmp_path):
    made = ml.jobs.create_or_update(job("python main.py ${{outputs.run}} --lr ${{inputs.lr}}", inputs={"lr": 0.1}))
    assert wait(ml, made.name) == "Completed"
    assert plane.jobs.history[made.name] == ["NotStarted", "Preparing", "Queued", "Running", "Finalizing", "Completed"]
    said = result(ml, made.name, tmp_path)
    env = said["env"]
    assert said["args"] == ["--lr", "0.1"]
    assert (env["AZUREML_RUN_ID"], env["MLFLOW_RUN_ID"], env["AZUREML_NODE_COUNT"]) == (made.name, made.name, "1")
    assert env["AZUREML_EXPERIMENT_NAME"] == "tests" and env["MLFLOW_TRACKING_URI"].startswith("sqlite:")
    assert "LLMKIT_AZURE_CLOUD" not in env and "NODE_RANK" not in env
    assert Path(said["cwd"]) != Path.cwd() and plane.home in Path(said["cwd"]).parents
    assert (tmp_path / "artifacts/user_logs/std_log.txt").read_text() == "rank 0 says hello\n"


def test_an_output_with_a_name_is_the_next_version(ml, job):
    for version in ("1", "2"):
        made = ml.jobs.create_or_update(job(outputs={"run": Output(type="custom_model", name="made")}))
        assert wait(ml, made.name) == "Completed"
        assert ml.models.get("made", label="latest").version == version


def test_the_same_code_is_not_uploaded_again(plane, ml, job):
    first = ml.jobs.create_or_update(job())
    before = len(plane.faults.log)
    second = ml.jobs.create_or_update(job())
    calls = plane.faults.log[before:]
    assert not [path for method, path, _ in calls if method == "PUT" and "blob.core" in path]
    assert {wait(ml, j.name) for j in (first, second)} == {"Completed"}


def test_two_nodes_start_together_with_a_rank_each(ml, job, tmp_path):
    options = {"instance_count": 2, "distribution": PyTorchDistribution(process_count_per_instance=1)}
    made = ml.jobs.create_or_update(job(**options))
    assert wait(ml, made.name) == "Completed"
    nodes = [result(ml, made.name, tmp_path, n) for n in (0, 1)]
    for rank, node in enumerate(nodes):
        env = node["env"]
        assert (env["NODE_RANK"], env["RANK"], env["WORLD_SIZE"], env["AZUREML_NODE_COUNT"]) == (str(rank),) * 2 + (
            "2",
        ) * 2
    assert len({(n["env"]["MASTER_ADDR"], n["env"]["MASTER_PORT"]) for n in nodes}) == 1
    assert nodes[0]["cwd"] != nodes[1]["cwd"]
    assert (tmp_path / "artifacts/user_logs/std_log_process_1.txt").read_text() == "rank 1 says hello\n"


def test_a_failure_is_told_with_its_log(plane, ml, job, capsys):
    made = ml.jobs.create_or_update(job("echo about to fail; exit 3"))
    assert wait(ml, made.name) == "Failed"
    with pytest.raises(Exception, match="exited with status code 3"):
        ml.jobs.stream(made.name)
    assert "exited with status code 3" in plane.jobs.errors[made.name]


def test_a_job_is_cancelled_with_its_children(ml, job, tmp_path):
    pid = tmp_path / "pid"
    made = ml.jobs.create_or_update(job(f"sleep 600 & echo $! > {pid}; wait"))
    while not pid.exists() or not pid.read_text().strip():
        time.sleep(0.02)
    ml.jobs.begin_cancel(made.name).result()
    assert wait(ml, made.name) == "Canceled"
    assert gone(int(pid.read_text()))


def test_a_preempted_job_is_queued_again(plane, ml, job, tmp_path):
    words = f"echo go >> {tmp_path}/starts; trap 'echo term >> {tmp_path}/starts; exit 1' TERM; "
    words += f"[ $(grep -c go {tmp_path}/starts) = 2 ] || (sleep 600 & wait)"
    made = ml.jobs.create_or_update(job(words))
    while not (tmp_path / "starts").exists():
        time.sleep(0.02)
    assert plane.executor.preempt(made.name)
    assert wait(ml, made.name) == "Completed"
    assert (tmp_path / "starts").read_text().splitlines().count("go") == 2
    assert plane.jobs.history[made.name].count("Queued") == 2


def test_a_timeout_ends_a_job(ml, job):
    made = job("sleep 600")
    made.set_limits(timeout=1)
    assert wait(ml, ml.jobs.create_or_update(made).name) == "Canceled"


def test_nodes_are_taken_and_given_back(plane, ml, job, tmp_path):
    both = {"instance_count": 2, "distribution": PyTorchDistribution(process_count_per_instance=1)}
    first = ml.jobs.create_or_update(job(f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done", **both))
    second = ml.jobs.create_or_update(job("true", name="waits-for-nodes"))
    time.sleep(0.3)
    assert ml.jobs.get(second.name).status == "Queued"
    (tmp_path / "go").touch()
    assert [wait(ml, j.name) for j in (first, second)] == ["Completed", "Completed"]


PIPELINE = """
type: pipeline
settings: {default_compute: azureml:cpu}
inputs: {text: hello}
outputs: {last: {type: uri_folder}}
jobs:
  make:
    type: command
    command: echo ${{inputs.text}} > ${{outputs.made}}/a.txt
    environment: {image: "llmkit/train:1"}
    inputs: {text: "${{parent.inputs.text}}"}
    outputs: {made: {type: uri_folder}}
  use:
    type: command
    command: tr a-z A-Z < ${{inputs.made}}/a.txt > ${{outputs.used}}/b.txt
    environment: {image: "llmkit/train:1"}
    inputs: {made: "${{parent.jobs.make.outputs.made}}"}
    outputs: {used: "${{parent.outputs.last}}"}
"""


def test_a_pipeline_hands_on_what_it_makes(ml, tmp_path):
    (tmp_path / "pipeline.yml").write_text(PIPELINE)
    made = ml.jobs.create_or_update(load_job(tmp_path / "pipeline.yml"), experiment_name="tests")
    assert wait(ml, made.name) == "Completed"
    ml.jobs.download(made.name, download_path=tmp_path, output_name="last")
    assert (tmp_path / "named-outputs/last/b.txt").read_text() == "HELLO\n"
    assert {c.name: c.status for c in ml.jobs.list(parent_job_name=made.name)} == {
        f"{made.name}-{n}": "Completed" for n in ("make", "use")
    }


def test_a_failed_node_ends_its_pipeline(plane, ml, tmp_path):
    (tmp_path / "pipeline.yml").write_text(PIPELINE.replace("echo", "false; exit 1; echo"))
    made = ml.jobs.create_or_update(load_job(tmp_path / "pipeline.yml"))
    assert wait(ml, made.name) == "Failed"
    assert plane.jobs.errors[made.name] == "make: Failed, use: NotStarted"
    assert f"{made.name}-use" not in plane.jobs.history


TRIAL = """
import mlflow, sys
with mlflow.start_run():
    mlflow.log_metric("loss", (float(sys.argv[1]) - 0.3) ** 2)
"""


def test_a_sweep_keeps_its_best_trial_by_what_mlflow_has(plane, ml, job, tmp_path, monkeypatch):
    (tmp_path / "trial.py").write_text(TRIAL)
    monkeypatch.setattr(plane.tracking, "on", True)
    options = {"inputs": {"lr": 0.1}, "outputs": {}, "environment_variables": {"MLFLOW_DISABLE_TELEMETRY": "true"}}
    trial = job("python trial.py ${{inputs.lr}}", code=str(tmp_path), **options)
    sweep = trial(lr=Choice([0.1, 0.3])).sweep(
        sampling_algorithm="grid", primary_metric="loss", goal="minimize", compute="cpu"
    )
    sweep.set_limits(max_total_trials=4, max_concurrent_trials=2)
    made = ml.jobs.create_or_update(sweep, experiment_name="tests")
    assert wait(ml, made.name, 60) == "Completed"
    assert ml.jobs.get(made.name).properties["best_child_run_id"] == f"{made.name}_1"
    assert plane.tracking.metrics(f"{made.name}_0") == {"loss": pytest.approx(0.04)}


def test_a_job_can_be_scheduled_and_triggered(ml, tmp_path):
    (tmp_path / "pipeline.yml").write_text(PIPELINE)
    trigger = RecurrenceTrigger(frequency="day", interval=1)
    plan = JobSchedule(name="nightly", trigger=trigger, create_job=load_job(tmp_path / "pipeline.yml"))
    assert ml.schedules.begin_create_or_update(plan).result().is_enabled
    assert [s.name for s in ml.schedules.list()] == ["nightly"]
    assert wait(ml, ml.schedules.trigger("nightly").job_name) == "Completed"
    with pytest.raises(HttpResponseError, match="Disable it"):
        ml.schedules.begin_delete("nightly").result()
    ml.schedules.begin_disable("nightly").result()
    ml.schedules.begin_delete("nightly").result()


def test_computes_come_change_and_go(ml):
    made = ml.compute.begin_create_or_update(
        AmlCompute(name="gone-soon", size="Standard_DS3_v2", max_instances=1)
    ).result()
    assert (made.provisioning_state, made.min_instances) == ("Succeeded", 0)
    assert "gone-soon" in {c.name for c in ml.compute.list()}
    changed = AmlCompute(name="gone-soon", size="Standard_DS3_v2", max_instances=3)
    assert ml.compute.begin_create_or_update(changed).result().max_instances == 3
    ml.compute.begin_delete("gone-soon").wait()
    with pytest.raises(ResourceNotFoundError):
        ml.compute.get("gone-soon")


def test_models_and_data_keep_their_versions(ml, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    made = [ml.models.create_or_update(Model(name="tiny", path=str(tmp_path / "model"))) for _ in range(2)]
    assert [m.version for m in made] == ["1", "2"]
    assert ml.models.get("tiny", label="latest").version == "2"
    ml.models.download("tiny", "2", download_path=tmp_path / "back")
    assert (tmp_path / "back/tiny/model/config.json").read_text() == "{}"


REFUSED = {
    "job name": (dict(name="no spaces"), "job name"),
    "no such compute": (dict(compute="nowhere"), "nowhere"),
    "too many nodes": (dict(instance_count=3), "at most 2"),
    "no nodes": (dict(instance_count=0), "instanceCount 0"),
    "shared memory": (dict(shm_size="16 gigs"), "shmSize"),
    "image": (dict(environment=Environment(image="Not An Image")), "image reference"),
    "unknown output": (dict(words="echo ${{outputs.nothing}}"), "no such output"),
    "unbalanced": (dict(words="echo $[[ --x"), "unbalanced"),
    "too many tags": (dict(tags={f"t{i}": "x" for i in range(51)}), "51 tags"),
    "long tag": (dict(tags={"t": "x" * 257}), "tag 't'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_azure_refuses_is_refused(plane, ml, job, what):
    options, said = REFUSED[what]
    before = set(plane.jobs.history)
    with pytest.raises(Exception, match=said):
        ml.jobs.create_or_update(job(**options))
    assert set(plane.jobs.history) == before


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(name="a"), "compute name"),
        (dict(name="x" * 33), "compute name"),
        (dict(size="Standard_Nonsense"), "not supported in location"),
        (dict(min_instances=3, max_instances=2), "no range"),
        (dict(size="Standard_ND96isr_H100_v5", max_instances=20), "quota"),
    ],
)
def test_computes_that_azure_refuses(ml, options, said):
    with pytest.raises(HttpResponseError, match=said):
        ml.compute.begin_create_or_update(AmlCompute(**({"name": "bad-one", "size": "Standard_DS3_v2"} | options)))


def test_a_name_is_taken_once(plane, ml, job):
    ml.jobs.create_or_update(job("true", name="taken"))
    ml.jobs.create_or_update(job("true", name="taken"))  # the same again changes nothing
    with pytest.raises(HttpResponseError, match=r"already exists.*command cannot be changed"):
        ml.jobs.create_or_update(job("false", name="taken"))
    assert wait(ml, "taken") == "Completed"
    assert plane.jobs.history["taken"].count("Running") == 1


def test_busy_and_broken_services_are_asked_again(plane, ml, job):
    plane.faults.add(path="*/jobs/patient", method="PUT", status=429, times=2, retry_after=0.05)
    plane.faults.add(path="*/environments/*", status=503, times=1, retry_after=0.05)
    ml.jobs.create_or_update(job("true", name="patient"))
    assert plane.faults.calls("PUT", "*/jobs/patient") == [429, 429, 201]
    assert wait(ml, "patient") == "Completed"


def test_an_answer_that_is_lost_leaves_one_job(plane, ml, job):
    plane.faults.add(path="*/jobs/once", method="PUT", status=0, applied=True)
    ml.jobs.create_or_update(job("true", name="once"))
    assert plane.faults.calls("PUT", "*/jobs/once") == [0, 200]
    assert wait(ml, "once") == "Completed"
    assert plane.jobs.history["once"].count("Running") == 1


def test_a_service_that_is_gone_for_a_while(plane, ml):
    plane.faults.add(path="*/jobs", status=503, times=None, seconds=0.3, retry_after=0.1)
    assert list(ml.jobs.list())
    assert 503 in plane.faults.calls("GET", "*/jobs")


def test_changes_are_seen_later_if_the_plane_lags(plane, ml, job):
    plane.store.lag.append(("/jobs/late", 0.3))
    ml.jobs.create_or_update(job("true", name="late"))
    with pytest.raises(ResourceNotFoundError):
        ml.jobs.get("late")
    time.sleep(0.35)
    assert ml.jobs.get("late").name == "late"


def test_tokens_expire_and_tenants_differ(plane, ml):
    old = json.loads(plane.cloud.read_text())["token"]
    url = f"{plane.url}{plane.root}/jobs?api-version=2024-10-01"
    with httpx.Client(verify=str(plane.certificate)) as http:

        def ask(token: str) -> tuple[int, str]:
            reply = http.get(url, headers={"Authorization": f"Bearer {token}"})
            return reply.status_code, reply.json().get("error", {}).get("code", "")

        assert ask(old) == (200, "")
        time.sleep(0.01)
        plane.expire_tokens()
        assert ask(old) == (401, "ExpiredAuthenticationToken")
        assert ask(plane.identity.token(lifetime=-1)) == (401, "ExpiredAuthenticationToken")
        assert ask(plane.identity.token(tenant="somebody-elses")) == (401, "InvalidAuthenticationTokenTenant")
        assert ask("nonsense") == (401, "InvalidAuthenticationToken")
        assert http.get(url).status_code == 401
    assert list(ml.jobs.list())  # the credential reads the fresh token


def test_an_upload_may_outlive_its_permission(plane, ml, job, tmp_path, monkeypatch):
    (tmp_path / "new.py").write_text("print(1)")
    monkeypatch.setattr(plane, "sas_lifetime", -1)
    with pytest.raises(ClientAuthenticationError):
        ml.jobs.create_or_update(job(code=str(tmp_path)))
    monkeypatch.undo()
    assert wait(ml, ml.jobs.create_or_update(job("python new.py", code=str(tmp_path))).name) == "Completed"


def test_workspaces_that_are_not_there(plane, monkeypatch):
    said = json.loads(plane.cloud.read_text())
    token = {"Authorization": f"Bearer {said['token']}"}
    for wrong, code_ in (
        (plane.subscription, "SubscriptionNotFound"),
        (plane.group, "ResourceGroupNotFound"),
        (plane.workspace, "ResourceNotFound"),
    ):
        url = plane.url + plane.root.replace(wrong, "other") + "?api-version=2024-10-01"
        reply = httpx.get(url, headers=token, verify=str(plane.certificate))
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, code_)


@pytest.fixture(scope="module")
def endpoint(plane, ml, tmp_path_factory):
    """An endpoint with two deployments of a real server, blue and green."""
    base = tmp_path_factory.mktemp("endpoint")
    mock_model(base / "model")
    (base / "image").mkdir()
    (base / "image/start.sh").write_text(SERVE)
    lines = [
        "FROM python:3.11",
        "COPY start.sh /opt/llmkit/start.sh",
        "ENV SLOTS=2",
        'CMD ["/bin/sh", "/opt/llmkit/start.sh"]',
    ]
    (base / "image/Dockerfile").write_text("\n".join(lines))
    model = ml.models.create_or_update(Model(name="served", path=str(base / "model")))
    routes = {
        f"{kind}_route": {"port": 8000, "path": path}
        for kind, path in (("liveness", "/livez"), ("readiness", "/readyz"), ("scoring", "/v1/completions"))
    }
    environment = Environment(name="serve", build=BuildContext(path=str(base / "image")), inference_config=routes)
    environment = ml.environments.create_or_update(environment)
    ml.online_endpoints.begin_create_or_update(ManagedOnlineEndpoint(name="llmkit-test", auth_mode="key")).result()

    def deploy(name: str, **options):
        given = {"model": model, "environment": environment, "instance_type": "Standard_DS3_v2", "instance_count": 1}
        given |= {
            "request_settings": OnlineRequestSettings(request_timeout_ms=20_000, max_concurrent_requests_per_instance=8)
        }
        given |= {"readiness_probe": ProbeSettings(period=1, failure_threshold=30)}
        made = ManagedOnlineDeployment(name=name, endpoint_name="llmkit-test", **(given | options))
        return ml.online_deployments.begin_create_or_update(made)

    pollers = [deploy(name) for name in ("blue", "green")]
    assert {p.result().provisioning_state for p in pollers} == {"Succeeded"}
    return deploy


def shares(ml: MLClient, live: dict[str, int], mirror: dict[str, int] | None = None) -> None:
    """Set the traffic of the endpoint."""
    found = ml.online_endpoints.get("llmkit-test")
    found.traffic, found.mirror_traffic = live, mirror or {}
    ml.online_endpoints.begin_create_or_update(found).result()


def test_a_deployment_is_a_server_that_answers(plane, ml, endpoint, tmp_path):
    shares(ml, {"blue": 100})
    ask = {"model": "llmkit", "prompt": "def", "max_tokens": 3}
    (tmp_path / "ask.json").write_text(json.dumps(ask))
    said = json.loads(ml.online_endpoints.invoke("llmkit-test", request_file=str(tmp_path / "ask.json")))
    assert said["object"] == "text_completion" and said["usage"]["completion_tokens"] == 3
    assert "llmkit: ready" in ml.online_deployments.get_logs("blue", "llmkit-test", 100)
    found = ml.online_endpoints.get("llmkit-test")
    keys = ml.online_endpoints.get_keys("llmkit-test")
    with httpx.Client(verify=str(plane.certificate)) as http:
        head = {"Authorization": f"Bearer {keys.secondary_key}"}
        reply = http.post(found.scoring_uri, json=ask, headers=head | {"azureml-model-deployment": "green"})
        assert (reply.status_code, reply.headers["azureml-model-deployment"]) == (200, "green")
        assert http.post(found.scoring_uri, json=ask).status_code == 401
        with http.stream("POST", found.scoring_uri, json=ask | {"stream": True}, headers=head) as reply:
            assert "data: [DONE]" in list(reply.iter_lines())
        ml.online_endpoints.begin_regenerate_keys("llmkit-test", key_type="secondary").result()
        assert http.post(found.scoring_uri, json=ask, headers=head).status_code == 401


def test_traffic_is_split_and_mirrored(plane, ml, endpoint):
    shares(ml, {"blue": 75, "green": 25})
    assert ml.online_endpoints.get("llmkit-test").traffic == {"blue": 75, "green": 25}
    front = plane.endpoints.fronts["llmkit-test"]
    head = {"Authorization": f"Bearer {ml.online_endpoints.get_keys('llmkit-test').primary_key}"}
    with httpx.Client(verify=str(plane.certificate), base_url=front.url, headers=head) as http:
        front.counts.clear()
        assert {http.get("/v1/models").status_code for _ in range(80)} == {200}
        assert front.counts["blue"] + front.counts["green"] == 80 and 8 <= front.counts["green"] <= 32
        shares(ml, {"blue": 100}, {"green": 50})
        front.counts.clear()
        assert {http.get("/v1/models").status_code for _ in range(40)} == {200}
        assert front.counts == {"blue": 40}
        for thread in [t for t in plane.store.threads if t.name.startswith("mirror")]:
            thread.join(5)
        assert 8 <= front.mirrored["green"] <= 32


@pytest.mark.parametrize(
    "live, mirror, said",
    [
        ({"blue": 60}, {}, "must be 0 or 100"),
        ({"red": 100}, {}, "does not have"),
        ({"blue": 100}, {"green": 60}, "50 % at most"),
        ({"blue": 50, "green": 50}, {"green": 10}, "not both"),
    ],
)
def test_traffic_that_azure_refuses(ml, endpoint, live, mirror, said):
    with pytest.raises(HttpResponseError, match=said):
        shares(ml, live, mirror)


def test_deployments_that_azure_refuses_or_cannot_start(plane, ml, endpoint):
    for options, said in (
        ({"instance_count": 0}, "0 instances"),
        ({"instance_type": "Standard_Nonsense"}, "not supported"),
        ({"instance_count": 50, "instance_type": "Standard_ND96isr_H100_v5"}, "quota"),
        ({"request_settings": OnlineRequestSettings(request_timeout_ms=999_999)}, "180 seconds"),
    ):
        with pytest.raises(HttpResponseError, match=said):
            endpoint("red", **options)
    with pytest.raises(HttpResponseError, match="exited with code"):
        endpoint("red", environment_variables={"SLOTS": "none"}).result()
    ml.online_deployments.begin_delete("red", "llmkit-test").wait()
    shares(ml, {"blue": 100})
    with pytest.raises(HttpResponseError, match="live traffic"):
        ml.online_deployments.begin_delete("blue", "llmkit-test")


def test_an_endpoint_that_is_updating_refuses(plane, ml, endpoint, monkeypatch):
    monkeypatch.setattr(plane.store, "delay", 0.5)
    found = ml.online_endpoints.get("llmkit-test")
    poller = ml.online_endpoints.begin_create_or_update(found)
    with pytest.raises(HttpResponseError, match="is in state Updating"):
        ml.online_endpoints.begin_create_or_update(found)
    poller.result()


def test_an_endpoint_goes_with_its_servers(plane, ml, endpoint):
    pids = [s.process.pid for key, s in plane.endpoints.servers.items() if key[0] == "llmkit-test"]
    assert len(pids) == 2
    ml.online_endpoints.begin_delete("llmkit-test").wait()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(ResourceNotFoundError):
        ml.online_endpoints.get("llmkit-test")


def test_the_plane_is_a_process_too(tmp_path):
    words = [
        sys.executable,
        str(Path(__file__).parent / "azure_plane/serve.py"),
        "--home",
        str(tmp_path / "p"),
        "--blobs",
        "stub",
    ]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        word, path = process.stdout.readline().split()
        said = json.loads(Path(path).read_text())
        with httpx.Client(verify=said["certificate"], base_url=said["control"]) as http:
            assert word == "ready" and http.post("/faults", json={"path": "*", "times": 1}).status_code == 204
            assert http.post("/faults", json={"nonsense": 1}).status_code == 400
            where = said["cloud_metadata"]["resource_manager"] + "subscriptions/x?api-version=1"
            assert [http.get(where).status_code for _ in range(2)] == [503, 401]
            assert http.get("/calls").json()["calls"] == [
                ["GET", "/subscriptions/x", 503],
                ["GET", "/subscriptions/x", 401],
            ]
        process.stdin.close()
        assert process.wait(10) == 0


def test_nothing_but_loopback_was_talked_to(plane, ml, job, tmp_path):
    """Last in the file: this process, the jobs' and the servers' processes wrote down every connection.

    Every plane looks at that log when it is closed, so that each test with a plane proves it of itself.
    """
    assert len(plane.wire.lines()) > 100 and plane.wire.foreign() == []
    words = """python -c "import socket; socket.gethostbyname('nowhere.invalid')" || true"""
    assert wait(ml, ml.jobs.create_or_update(job(words)).name) == "Completed"
    assert plane.wire.foreign() == [("socket.gethostbyname", "nowhere.invalid")]
    other = Plane(tmp_path / "plane", blobs="stub")
    with socket.socket() as unsent, contextlib.suppress(OSError):
        unsent.settimeout(0.01)
        unsent.connect(("192.0.2.1", 443))  # an address of no machine
    with pytest.raises(AssertionError, match=r"192\.0\.2\.1"):
        other.close()
    plane.wire.forget()
