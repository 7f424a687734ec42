"""The declarations in azure/: every file loads, and what one says about another, or about llmkit, is so.

Nothing here talks to Azure, and none of it has run on a subscription.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.core.errors import LLMKitError

ROOT = Path(__file__).resolve().parents[1]
AZURE, WORKFLOWS = ROOT / "azure", ROOT / ".github" / "workflows"
TOOLS = ROOT / ".venv-azure" / "bin"  # other people's checkers: `make declarations`
FOLDERS = ["compute_configs", "deployment_configs", "environments", "infra", "jobs"]
sys.path.insert(0, str(ROOT / "tools"))


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


COMPUTES = sorted((AZURE / "compute_configs").glob("*.yml"))
DEPLOYMENTS = [AZURE / "deployment_configs" / f"{n}.yml" for n in ("blue", "green")]
ENVIRONMENTS = sorted((AZURE / "environments").glob("*/environment.yml"))
JOBS = sorted((AZURE / "jobs").glob("*.yml"))
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*:Warning:marshmallow", "ignore:.*arshmallow"
)
ids = {"ids": lambda p: str(p.relative_to(AZURE))}


def test_the_folders_hold_declarations_and_no_package() -> None:
    """An `azure/__init__.py` would hide the SDK from whoever starts Python here."""
    assert not list(AZURE.rglob("*.py"))
    assert set(FOLDERS) <= {p.name for p in AZURE.iterdir()}


# What the SDK says


@pytest.fixture(scope="module")
def load() -> dict[str, Callable[[Path], Any]]:
    """The SDK's own readers, by the name of what they read; they take seconds to import."""
    from azure.ai.ml import load_compute, load_environment, load_job, load_online_deployment, load_online_endpoint
    from azure.ai.ml.entities._load_functions import load_schedule

    found = {"compute": load_compute, "environment": load_environment, "job": load_job, "schedule": load_schedule}
    return found | {"deployment": load_online_deployment, "endpoint": load_online_endpoint}


@pytest.mark.parametrize("path", COMPUTES, **ids)
def test_a_cluster_costs_nothing_while_idle_and_has_no_public_address(path: Path, load: dict) -> None:
    compute = load["compute"](path)
    assert (compute.min_instances, compute.enable_node_public_ip, compute.ssh_public_access_enabled) == (
        0,
        False,
        False,
    )
    assert compute.max_instances >= 1 and 120 <= compute.idle_time_before_scale_down <= 1800
    assert compute.identity.type == "user_assigned"
    assert re.fullmatch(r"[a-z][a-z0-9-]{2,23}", compute.name)
    price = yaml.safe_load(compute.tags["llmkit"])
    assert price["price_per_hour"] > 0 and price["currency"] == "USD" and price["source"]
    assert re.fullmatch(r"20\d\d-\d\d", str(price["as_of"]))
    assert len(compute.tags["llmkit"]) <= 256  # Azure's limit


def test_there_are_clusters_for_cpu_a100_h100_and_spot() -> None:
    found = {p.stem: read(p) for p in COMPUTES}
    assert {"cpu", "a100", "h100", "spot"} <= set(found)
    assert "A100" in found["a100"]["size"] and "H100" in found["h100"]["size"]
    assert {n: c["tier"] == "low_priority" for n, c in found.items()} == {n: n == "spot" for n in found}


@pytest.mark.parametrize("path", DEPLOYMENTS, **ids)
def test_a_deployment_fits_the_server_that_it_runs(path: Path, load: dict) -> None:
    deployment = load["deployment"](path)
    endpoint = load["endpoint"](AZURE / "deployment_configs" / "endpoint.yml")
    assert (deployment.name, deployment.endpoint_name) == (path.stem, endpoint.name)
    variables = deployment.environment_variables
    holds = int(variables["LLMKIT_SLOTS"]) + int(variables["LLMKIT_QUEUE"])
    assert deployment.request_settings.max_concurrent_requests_per_instance == holds
    start = (AZURE / "environments/serve/start.sh").read_text(encoding="utf-8")
    assert set(variables) <= set(re.findall(r"\$\{(LLMKIT_\w+)", start)), "start.sh ignores a variable"
    given_up = float(re.search(r"LLMKIT_TIMEOUT:-(\d+)", start)[1]) * 1000  # type: ignore[index]
    assert given_up < deployment.request_settings.request_timeout_ms <= 180_000  # the service's limit
    assert deployment.environment.removeprefix("azureml:").partition("@")[0] in known("environments")
    for probe in (deployment.liveness_probe, deployment.readiness_probe):
        assert probe.initial_delay + probe.period * probe.failure_threshold >= 300, "a large model takes minutes"


def test_blue_and_green_differ_in_name_alone() -> None:
    blue, green = (read(p) for p in DEPLOYMENTS)
    for deployment in (blue, green):  # the server says in every reply who it is, and a rollout counts by that
        assert deployment["environment_variables"].pop("LLMKIT_REVISION") == deployment["name"]
    assert blue | {"name": "green"} == green


def test_probes_and_requests_reach_the_server() -> None:
    """The routes of the environment are paths that the server answers without a key, at the port that it listens on."""
    from llmkit.serving.openapi import TABLE

    config = read(AZURE / "environments/serve/environment.yml")["inference_config"]
    free = {p.path for p in TABLE if not p.key}
    assert config["liveness_route"]["path"] in free and config["readiness_route"]["path"] in free
    assert config["scoring_route"]["path"] == "/"  # else only one path of the API would be reached
    start = (AZURE / "environments/serve/start.sh").read_text(encoding="utf-8")
    port = int(re.search(r"PORT:-(\d+)", start)[1])  # type: ignore[index]
    assert {route["port"] for route in config.values()} == {port}
    assert f"EXPOSE {port}" in (AZURE / "environments/serve/Dockerfile").read_text(encoding="utf-8")


def test_start_serves_the_mounted_model(tmp_path: Path) -> None:
    """start.sh finds the model folder below the mount, and starts a server with options that `llmkit serve` knows."""
    from llmkit.cli.main import subcommand
    from llmkit.cli.serve import ENV

    model = tmp_path / "mount" / "llmkit" / "model"
    (model / "int4").mkdir(parents=True)
    for folder in (model / "int4", model):
        (folder / "config.json").write_text("{}")
    fake = tmp_path / "bin" / "llmkit"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    fake.chmod(0o755)
    env = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "AZUREML_MODEL_DIR": str(tmp_path / "mount")}
    env |= read(DEPLOYMENTS[1])["environment_variables"]
    script = ["/bin/sh", AZURE / "environments/serve/start.sh"]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    words = done.stdout.splitlines()
    assert words[:2] == ["serve", f"green={model}"], done.stderr
    options = {o for p in subcommand("serve").params for o in p.opts}
    assert {w for w in words if w.startswith("--")} <= options and "--gateway" in words
    assert not ENV.keys() & set(read(DEPLOYMENTS[0])["environment_variables"])
    shutil.rmtree(model)
    for broken, word in (({}, "no config.json"), ({"AZUREML_MODEL_DIR": ""}, "the deployment names none")):
        failed = subprocess.run(script, env=env | broken, capture_output=True, text=True)
        assert failed.returncode and word in failed.stderr


def test_autoscale_rules_go_both_ways_within_what_azure_knows() -> None:
    scale = read(AZURE / "deployment_configs/autoscale.yml")
    assert 1 <= scale["min_instances"] < scale["max_instances"]
    metrics = {
        "deployment": {"CpuUtilizationPercentage", "GpuUtilizationPercentage"},
        "endpoint": {"RequestLatency_P95"},
    }
    for rule in scale["rules"]:
        assert rule["metric"] in metrics[rule["of"]]
        assert rule["operator"] == {"Increase": "GreaterThan", "Decrease": "LessThan"}[rule["direction"]]
        assert all(re.fullmatch(r"PT\d+M", rule[k]) for k in ("window", "cooldown")) and rule["by"] >= 1
    assert {r["direction"] for r in scale["rules"]} == {"Increase", "Decrease"}
    used = set(re.findall(r"\b(?:rules|rule)\.(\w+)", (AZURE / "infra/autoscale.bicep").read_text(encoding="utf-8")))
    assert used == {*scale, *(k for rule in scale["rules"] for k in rule)}


# Images


@pytest.mark.parametrize("path", ENVIRONMENTS, **ids)
def test_an_environment_builds_from_a_dockerfile_and_a_lock_that_are_there(path: Path, load: dict) -> None:
    environment = load["environment"](path)
    assert environment.name == f"llmkit-{path.parent.name}"
    context = (path.parent / environment.build.path).resolve()
    dockerfile = context / environment.build.dockerfile_path
    assert dockerfile == path.parent / "Dockerfile"
    copied = re.findall(r"^COPY (.+) \S+$", dockerfile.read_text(encoding="utf-8"), re.M)
    sources = [word for words in copied for word in words.split()]
    assert sources and all((context / s).exists() for s in sources), sources


@pytest.mark.parametrize("name", ["train", "serve"])
def test_a_lock_of_an_image_holds_what_it_needs_in_the_versions_of_ours(name: str) -> None:
    from image_locks import CUDA, ENVIRONMENTS, IMAGES, differing, normal, pins, wanted

    path = ENVIRONMENTS / name / "requirements.txt"
    lines = [x for x in path.read_text(encoding="utf-8").splitlines() if not x.startswith("#")]
    assert [x for x in lines if not re.fullmatch(r"[\w.\-]+==[\w.!]+", x)] == []
    found = pins(path)
    assert len(found) == len(lines)
    missing = {normal(r) for r in wanted(IMAGES[name])} - set(found)
    assert not {m for m in missing if IMAGES[name].cuda or not CUDA.fullmatch(m)}, "run make image-locks"
    told = re.search(r"^# Other versions than in requirements.txt: (.*)$", path.read_text(encoding="utf-8"), re.M)
    assert told and ("none" if not differing(found) else " ".join(differing(found))) == told[1], "run make image-locks"
    assert found["torch"] == pins(ROOT / "requirements.txt")["torch"]
    assert ("azureml-mlflow" in found) == (name == "train")
    assert any(CUDA.fullmatch(n) for n in found) == IMAGES[name].cuda


def test_our_own_lock_stays_free_of_azureml_mlflow() -> None:
    """It holds mlflow and azure-storage-blob back."""
    from image_locks import pins

    assert "azureml-mlflow" not in pins(ROOT / "requirements.txt")


# Jobs


def known(what: str) -> set[str]:
    """The names that the files in a folder of azure/ give."""
    pattern = "*/environment.yml" if what == "environments" else "*.yml"
    return {read(p).get("name", "") for p in (AZURE / what).glob(pattern)}


def commands(data: dict, path: str = "") -> Iterator[tuple[str, dict]]:
    """The places with a command in a job, each with the inputs and outputs that it sees."""
    if "command" in data:
        yield path or "job", data
    if "trial" in data:
        both = data["trial"] | {k: data.get(k, {}) for k in ("inputs", "outputs", "search_space")}
        yield "trial", both
    for name, step in data.get("jobs", {}).items():
        yield from commands(step, name)


def passed(command: str) -> dict[str, str]:
    """Parameters that the call of a notebook in a command is given."""
    return {n: v.strip("'") for n, v in re.findall(r"\s-p (\w+) ('[^']*'|\S+)", command)}


def job_problems(data: dict) -> list[str]:
    """What a job says that is not so: notebooks, parameters, inputs, outputs, steps, clusters, environments."""
    from llmkit.runner.inspect import check

    wrong = []
    jobs = data.get("jobs", {})
    for name, inner in commands(data):
        text = inner["command"]
        call = r"python -m llmkit\.cli run (\S+\.ipynb) --out \$\{\{outputs\.run\}\}( --node \$NODE_RANK)?"
        book = re.search(call, text)
        if not book or not (ROOT / book[1]).is_file():
            wrong.append(f"{name}: runs no notebook that exists")
            continue
        for kind in ("inputs", "outputs", "search_space"):
            used = set(re.findall(r"\$\{\{%s\.(\w+)\}\}" % kind, text))  # noqa: UP031
            wrong += [f"{name}: {kind}.{u} is not defined" for u in sorted(used - set(inner.get(kind, {})))]
            wrong += [f"{name}: {kind}.{u} is used nowhere" for u in sorted(set(inner.get(kind, {})) - used)]
        values = {}
        for parameter, value in passed(text).items():
            for given in re.findall(r"\$\{\{inputs\.(\w+)\}\}", value):
                fixed = inner.get("inputs", {}).get(given)
                fixed = data.get("inputs", {}).get(given) if isinstance(fixed, str) and "parent." in fixed else fixed
                value = value.replace(f"${{{{inputs.{given}}}}}", "x" if isinstance(fixed, dict) else str(fixed))
            for given in re.findall(r"\$\{\{search_space\.(\w+)\}\}", value):  # its first value stands for all
                fixed = inner.get("search_space", {}).get(given, {}).get("values", ["?"])[0]
                value = value.replace(f"${{{{search_space.{given}}}}}", str(fixed))
            values[parameter] = value.replace("$AZUREML_NODE_COUNT", "1")
        try:
            check(ROOT / book[1], values, text=True)
        except LLMKitError as e:
            wrong.append(f"{name}: {e}")
        many = inner.get("distribution") is not None
        if many != bool(book[2]):
            wrong.append(f"{name}: one folder for many nodes" if many else f"{name}: has one node")
        compute = inner.get("compute") or data.get("compute") or data.get("settings", {}).get("default_compute", "")
        for value, what in ((compute, "compute_configs"), (inner.get("environment", ""), "environments")):
            if value.removeprefix("azureml:").partition("@")[0] not in known(what):
                wrong.append(f"{name}: {value!r} is not in azure/{what}")
        if (AZURE / "jobs" / inner.get("code", "")).resolve() != ROOT:
            wrong.append(f"{name}: code is not the root of the repository")
    for name, kind, given in re.findall(r"\$\{\{parent\.jobs\.(\w+)\.(\w+)\.(\w+)\}\}", json.dumps(jobs)):
        if given not in jobs.get(name, {}).get(kind, {}):
            wrong.append(f"parent.jobs.{name}.{kind}.{given} is not defined")
    for kind, given in re.findall(r"\$\{\{parent\.(inputs|outputs)\.(\w+)\}\}", json.dumps(jobs)):
        if given not in data.get(kind, {}):
            wrong.append(f"parent.{kind}.{given} is not defined")
    return wrong


@pytest.mark.parametrize("path", [p for p in JOBS if p.stem != "schedule"], **ids)
def test_a_job_loads_and_all_that_it_names_is_there(path: Path, load: dict) -> None:
    job = load["job"](path)
    assert job.experiment_name == "llmkit"
    assert job_problems(read(path)) == []


def test_the_schedule_runs_the_pipeline(load: dict) -> None:
    schedule = load["schedule"](AZURE / "jobs" / "schedule.yml")
    assert schedule.create_job.display_name == "train_to_register"


BREAKS: list[tuple[str, Callable[[str], str], str]] = [
    ("train", lambda s: s.replace("train_model.ipynb", "train_modle.ipynb"), "runs no notebook"),
    ("train", lambda s: s.replace("-p steps", "-p step"), "no parameter 'step'"),
    ("train", lambda s: s.replace("steps: 20000", "steps: fast"), "steps"),
    ("train", lambda s: s.replace("steps: 20000", "steps: -1"), "steps"),
    ("train", lambda s: s.replace(" --node $NODE_RANK", ""), "one folder for many nodes"),
    ("evaluate", lambda s: s.replace("llmkit.cli run", "llmkit.cli rum"), "runs no notebook"),
    ("train", lambda s: s.replace("strategy: ddp", "strategy: dpp"), "strategy"),
    ("train", lambda s: s.replace("gpu-a100", "gpu-a200"), "not in azure/compute_configs"),
    ("train", lambda s: s.replace("llmkit-train@", "llmkit-trian@"), "not in azure/environments"),
    ("train", lambda s: s.replace("code: ../..", "code: .."), "not the root"),
    ("evaluate", lambda s: s.replace("{inputs.bounds}", "{inputs.bound}"), "inputs.bound is not defined"),
    ("evaluate", lambda s: s.replace("bounds: strict", "bounds: tight"), "bounds"),
    ("optimize", lambda s: s.replace("  run:\n", "  rnu:\n"), "outputs.run is not defined"),
    ("sweep", lambda s: s.replace("-p lr ${{search_space.lr}}", ""), "search_space.lr is used nowhere"),
    ("sweep", lambda s: s.replace("[0.0075,", "[-1,"), "lr"),
    ("train_to_register", lambda s: s.replace("prepare.outputs.run", "prepare.outputs.ran"), "prepare.outputs.ran"),
    ("train_to_register", lambda s: s.replace("jobs.train.", "jobs.trian."), "jobs.trian.outputs.run"),
    ("train_to_register", lambda s: s.replace("parent.inputs.seed", "parent.inputs.sed"), "parent.inputs.sed"),
]


@pytest.mark.parametrize(("name", "damage", "word"), BREAKS)
def test_the_checks_of_jobs_see_what_is_wrong(name: str, damage: Callable[[str], str], word: str) -> None:
    text = (AZURE / "jobs" / f"{name}.yml").read_text(encoding="utf-8")
    assert damage(text) != text
    try:
        found = "\n".join(job_problems(yaml.safe_load(damage(text))))
    except ValueError as e:
        found = str(e)
    assert word in found


# Infrastructure


def test_every_symbol_of_the_templates_exists_and_is_used() -> None:
    from bicep import problems

    assert problems(AZURE / "infra") == []


WALKS: list[tuple[str, Callable[[str], str], str]] = [
    ("main.bicep", lambda s: s.replace("    storageId: storage.outputs.id\n", "", 1), "lacks its parameter storageId"),
    ("main.bicep", lambda s: s.replace("    logDays: logDays", "    logDay: logDays"), "no parameter logDay"),
    ("main.bicep", lambda s: s.replace("modules/vault.bicep", "modules/volt.bicep"), "which does not exist"),
    ("main.bicep", lambda s: s.replace("registry.outputs.server", "registry.outputs.sever"), "no output sever"),
    ("main.bicep", lambda s: s.replace("budget > 0", "budgt > 0"), "budgt is declared nowhere"),
    ("main.bicep", lambda s: s + "\nparam extra string = ''\n", "param extra is used nowhere"),
    ("main.bicep", lambda s: s + "\nvar name = 1\n", "name is declared twice"),
    ("main.bicep", lambda s: s.replace("uniqueString(", "uniqString("), "no function uniqString()"),
    ("main.bicep", lambda s: s.replace("@minValue(0)", "@minimum(0)"), "no decorator @minimum"),
    ("modules/roles.bicep", lambda s: s.replace("scope: vault", "scope: volt"), "volt is declared nowhere"),
    ("modules/identities.bicep", lambda s: s.replace("id-${name}-compute", "id-${nmae}-compute"), "nmae is declared"),
    ("autoscale.bicep", lambda s: s.replace("autoscale.yml'", "autoscal.yml'"), "autoscal.yml does not exist"),
    ("main.bicepparam", lambda s: s.replace("./main.bicep", "./mian.bicep"), "names no template"),
    ("main.bicepparam", lambda s: s + "\nparam colour = 'red'\n", "no parameter colour"),
]


@pytest.mark.parametrize(("name", "damage", "word"), WALKS)
def test_the_walk_sees_what_is_wrong(name: str, damage: Callable[[str], str], word: str, tmp_path: Path) -> None:
    from bicep import problems

    shutil.copytree(AZURE, tmp_path / "azure")
    path = tmp_path / "azure" / "infra" / name
    text = path.read_text(encoding="utf-8")
    assert damage(text) != text
    path.write_text(damage(text), encoding="utf-8")
    assert word in "\n".join(problems(tmp_path / "azure" / "infra"))


def test_roles_are_given_on_single_resources() -> None:
    """Least privilege: every assignment has a scope, none the whole group, and nobody may give roles away."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in (AZURE / "infra").rglob("*.bicep"))
    assignments = re.findall(r"^resource (\w+) 'Microsoft\.Authorization/roleAssignments.*?\n\}\]?$", text, re.M | re.S)
    scopes = re.findall(r"roleAssignments@[^\n]*(?:\n  [a-z]\w*\.?\w*\n?)*?.*?^  scope: (\w+)$", text, re.M | re.S)
    assert len(assignments) == len(scopes) >= 18
    assert "8e3af657-a8ff-443c-a75c-2fe8c4bcb635" not in text  # Owner
    assert "18d7d88d-d35e-4fb5-a5c3-7773c20a72d9" not in text  # User Access Administrator
    roles = (AZURE / "infra/modules/roles.bicep").read_text(encoding="utf-8")
    for who in ("computePrincipalId", "endpointPrincipalId", "workflowPrincipalId"):
        given = re.findall(rf"principalId: {who}\n.*?role\.(\w+)\)", roles, re.S)
        assert "contributor" not in given, who


CLOSED = {
    "storage": ("allowSharedKeyAccess: false", "allowBlobPublicAccess: false", "minimumTlsVersion: 'TLS1_2'"),
    "registry": ("adminUserEnabled: false", "anonymousPullEnabled: false"),
    "vault": ("enableRbacAuthorization: true", "enablePurgeProtection: true"),
    "workspace": ("systemDatastoresAuthMode: 'identity'", "isolationMode: 'AllowInternetOutbound'", "'UserAssigned'"),
}


@pytest.mark.parametrize("name", CLOSED)
def test_nothing_opens_with_a_key_and_all_can_be_closed(name: str) -> None:
    text = (AZURE / f"infra/modules/{name}.bicep").read_text(encoding="utf-8")
    assert all(line in text for line in (*CLOSED[name], "publicNetworkAccess: publicAccess"))


def test_files_name_the_identities_that_the_templates_make() -> None:
    made = set(re.findall(r"name: '(id-\$\{name\}-\w+)'", (AZURE / "infra/modules/identities.bicep").read_text()))
    named = [re.findall(r"userAssignedIdentities/([\w-]+)", p.read_text()) for p in AZURE.rglob("*.yml")]
    assert {n for found in named for n in found} == {"id-llmkit-compute", "id-llmkit-endpoint"}
    assert {n.replace("${name}", "llmkit") for n in made} >= {"id-llmkit-compute", "id-llmkit-endpoint"}


# The workflow


def test_the_workflow_asks_before_production_and_keeps_no_secret() -> None:
    text = (WORKFLOWS / "deploy.yml").read_text(encoding="utf-8")
    flow = read(WORKFLOWS / "deploy.yml")
    jobs = flow["jobs"]
    assert "secrets" not in text and flow["permissions"] == {}
    order = ["test", "images", "staging", "production", "everyone"]
    assert list(jobs) == order and [jobs[n]["needs"] for n in order[1:]] == order[:-1]
    logged_in = {n for n, job in jobs.items() if any("azure/login" in s.get("uses", "") for s in job.get("steps", []))}
    assert logged_in == set(order[1:])
    for name in logged_in:
        assert (
            jobs[name]["environment"] == name.replace("everyone", "production")
            and jobs[name]["permissions"]["id-token"] == "write"
        )
    trusted = re.search(r"var environments = \[(.*?)\]", (AZURE / "infra/modules/identities.bicep").read_text(), re.S)
    assert trusted and set(re.findall(r"'(\w+)'", trusted[1])) == {jobs[n]["environment"] for n in logged_in}
    # What a person typed reaches a shell through the environment alone.
    runs = [s["run"] for job in jobs.values() for s in job.get("steps", []) if "run" in s]
    assert not [r for r in runs if re.search(r"\$\{\{\s*(inputs|github\.event|needs)", r)]


def test_the_workflow_calls_what_is_there() -> None:
    text = (WORKFLOWS / "deploy.yml").read_text(encoding="utf-8")
    for path in re.findall(r"(?:tools|azure)/[\w./$-]+\.(?:py|sh|yml)|azure/environments/\w+/?\w*", text):
        for image in ("train", "serve"):
            assert (ROOT / path.replace("$image", image)).exists(), path
    called = re.search(r"uses: \./(\S+)", text)
    triggers = read(ROOT / called[1])[True]  # type: ignore[index]  # YAML reads `on` as true
    assert "workflow_call" in triggers
    pinned = re.findall(r"uses: ([\w./-]+)@(\S+)", text + (WORKFLOWS / "ci.yml").read_text(encoding="utf-8"))
    assert pinned and all(re.fullmatch(r"[0-9a-f]{40}", version) for _, version in pinned), pinned


# What people read


def test_the_readme_names_files_and_commands_that_exist() -> None:
    from llmkit.cli.main import COMMANDS

    text = (AZURE / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"(?:azure|tools|nbs|\.github)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^(?:\$ )?llmkit (\w+)", text, re.M):
        assert name in COMMANDS, name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_readme_can_be_pasted() -> None:
    text = (AZURE / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    assert len(blocks) > 8
    for block in blocks:
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, f"{done.stderr}\n{block}"


def test_the_readme_prices_are_those_of_the_files() -> None:
    text = (AZURE / "README.md").read_text(encoding="utf-8")
    assert "round figure" in text
    for path in [*COMPUTES, *DEPLOYMENTS]:
        data = read(path)
        price = yaml.safe_load(data["tags"]["llmkit"])["price_per_hour"]
        size = data.get("size") or data["instance_type"]
        assert re.search(rf"{size}.*\| {price:g} \|", text), f"{path.name}: {size} at {price:g}"


# Other people's tools


def tool(name: str) -> Path:
    """A checker of `make declarations`; without it the test is skipped."""
    path = TOOLS / name
    if not path.exists():
        pytest.skip(f"{name} is not installed: `make declarations` installs it and runs these tests")
    return path


def test_bicep_parses() -> None:
    code = "import sys, pathlib, pycep\nfor f in sys.argv[1:]:\n"
    code += "    pycep.BicepParser().parse(text=pathlib.Path(f).read_text())"
    files = sorted((AZURE / "infra").rglob("*.bicep"))
    done = subprocess.run([tool("python"), "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_checkov_finds_nothing() -> None:
    """What is skipped says why, beside the resource that it concerns."""
    command = [tool("checkov"), "-d", AZURE, "--framework", "bicep", "--framework", "dockerfile", "-o", "json"]
    env = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run([*command, "--skip-download", "--quiet"], capture_output=True, text=True, env=env)
    reports = json.loads(done.stdout)
    reports = reports if isinstance(reports, list) else [reports]
    assert sum(r["summary"]["passed"] for r in reports) > 10, done.stderr[-2000:]
    failed = [(c["check_id"], c["file_path"]) for r in reports for c in r["results"]["failed_checks"]]
    assert failed == []


def test_dockerfiles_are_clean() -> None:
    done = subprocess.run([tool("hadolint"), *AZURE.rglob("Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_workflows_fit_githubs_schema_and_have_no_known_weakness() -> None:
    files = sorted(WORKFLOWS.glob("*.yml"))
    schema = [tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", *files]
    for command in (schema, [tool("zizmor"), "--offline", "--min-severity", "medium", *files]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
