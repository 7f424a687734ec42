"""The workflow's way to production, its own lines against the local Azure ML; images are neither built nor pushed."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
from azure_plane import Plane

from llmkit.azureml.assets import register_model
from llmkit.azureml.endpoint import EndpointBackend
from llmkit.azureml.workspace import connect
from llmkit.cli.main import dispatch, subcommand
from llmkit.core.errors import ConfigError, ServiceError
from llmkit.core.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
FLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/deploy.yml").read_text(encoding="utf-8"))
ELSEWHERE = {"Room for CUDA", "Build for training", "Build for serving", "Push", "Install"}  # docker, az, the runner
IMAGE = "crllmkit.azurecr.io/llmkit-{name}@sha256:{digest}"
sys.path.insert(0, str(ROOT / "tools"))
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of marshmallow, which the SDK uses


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A workspace with one registered model."""
    home = tmp_path_factory.mktemp("release")
    with pytest.MonkeyPatch.context() as patch, Plane(home / "plane", delay=0.05, blobs="stub") as running:
        patch.setenv("LLMKIT_AZURE_CLOUD", str(running.cloud))
        tiny_model(home / "model")
        assert register_model(connect(), home / "model", "llmkit") == 1
        yield running


def fresh() -> dict[str, str]:
    """The environment without what the SDK leaves there for itself: a new process has not met the plane yet."""
    return {k: v for k, v in os.environ.items() if k != "AZUREML_CURRENT_CLOUD"}


class Runner:
    """As much of GitHub's runner as the jobs need: expressions, outputs, and bash as it is started there."""

    def __init__(self, plane: Plane, folder: Path, digest: str, model: str = "") -> None:
        self.plane, self.folder = plane, folder
        self.values = {"github.sha": "abc", "inputs.model": model, "vars.AZURE_REGISTRY": "crllmkit"}
        self.values |= {"vars.AZURE_SUBSCRIPTION_ID": plane.subscription, "vars.AZURE_RESOURCE_GROUP": plane.group}
        self.values |= {"vars.AZUREML_WORKSPACE_NAME": plane.workspace}
        start = ["/bin/sh", str(ROOT / "azure/environments/serve/start.sh")]
        for name in ("train", "serve"):
            image = IMAGE.format(name=name, digest=digest * 64)
            self.values[f"steps.push.outputs.{name}"] = image
            plane.images[image] = start

    def filled(self, text: str) -> str:
        """Text with the values of its expressions; one without a value is an error."""
        return re.sub(r"\$\{\{\s*([\w.-]+)\s*\}\}", lambda m: self.values[m[1]], str(text))

    def run(self, name: str) -> str:
        """Run the steps of a job that are ours; what they printed."""
        job, told = FLOW["jobs"][name], ""
        for step in job["steps"]:
            if "run" not in step or step["name"] in ELSEWHERE:
                continue
            told += self.step(step, job.get("env", {}))
        outputs = {k: self.filled(v) for k, v in job.get("outputs", {}).items()}
        self.values |= {f"needs.{name}.outputs.{k}": v for k, v in outputs.items()}
        return told

    def step(self, step: dict[str, Any], more: dict[str, str]) -> str:
        """Run one step."""
        env = {k: self.filled(v) for k, v in (FLOW["env"] | more | step.get("env", {})).items()}
        said = self.folder / "output"
        said.write_text("")
        env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(said)}
        line = ["bash", "--noprofile", "--norc", "-e", "-c", step["run"]]
        done = subprocess.run(line, cwd=ROOT, env=fresh() | env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{step['name']}: {done.stdout}{done.stderr}"
        pairs = dict(x.split("=", 1) for x in said.read_text().splitlines())
        self.values |= {f"steps.{step.get('id')}.outputs.{k}": v for k, v in pairs.items()}
        return done.stdout


def released(plane: Plane, folder: Path, digest: str, *jobs: str, model: str = "") -> tuple[Runner, str]:
    """The runner after these jobs of a commit, and what the last of them printed."""
    runner, told = Runner(plane, folder, digest, model), ""
    for job in jobs:
        told = runner.run(job)
    return runner, told


def test_a_commit_goes_to_production(plane: Plane, tmp_path: Path) -> None:
    """The first one: all traffic in staging and in production."""
    runner, told = released(plane, tmp_path, "a", "images", "staging", "production")
    assert "blue 100 %" in told
    staging, production = (EndpointBackend(connect(), n) for n in ("llmkit-staging", "llmkit"))
    assert staging.traffic() == {"blue": 1.0} == production.traffic()
    assert production.deployments()["blue"].model.endswith("/models/llmkit/versions/1")
    assert runner.values["needs.staging.outputs.model"] == "azureml:llmkit:1"


@pytest.mark.soak
def test_the_next_commit_goes_beside_it(plane: Plane, tmp_path: Path) -> None:
    """5 % of the traffic in production, then all; staging keeps one deployment."""
    staging, production = (EndpointBackend(connect(), n) for n in ("llmkit-staging", "llmkit"))
    for backend in (staging, production):
        backend.delete()
    released(plane, tmp_path, "a", "images", "staging", "production", "everyone")
    second, told = released(plane, tmp_path, "b", "images", "staging", "production", model="llmkit:1")
    assert "blue 95 %, green 5 %" in told
    assert production.traffic() == {"blue": 0.95, "green": 0.05}
    assert sorted(staging.deployments()) == ["green"] and staging.traffic() == {"green": 1.0}
    images = {d.environment.rpartition("/")[2] for d in production.deployments().values()}
    assert len(images) == 2, "the second commit's image is another version"
    assert "green 100 %" in second.run("everyone") and production.traffic() == {"green": 1.0}


def test_an_environment_names_its_image_by_digest(plane: Plane) -> None:
    from release import environment

    service, image = connect(), IMAGE.format(name="serve", digest="c" * 64)
    _, name, version = environment(service, "serve", image).split(":")
    found = service.client.environments.get(name, version)
    assert (found.name, found.image, found.build) == ("llmkit-serve", image, None)
    assert found.inference_config.scoring_route.port == 8000
    assert environment(service, "serve", image).endswith(version)
    for loose in ("crllmkit.azurecr.io/llmkit-serve:latest", image[:-1]):
        with pytest.raises(ConfigError, match="no image by digest; push it first"):
            environment(service, "serve", loose)


def spoken() -> list[list[str]]:
    """The lines of azure/README.md that call llmkit."""
    text = (ROOT / "azure/README.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    return [shlex.split(line) for line in re.findall(r"^(?:.*<\()?llmkit ([^)\n]+)", blocks, re.M)]


def options(words: list[str]) -> set[str]:
    """The options that a command has."""
    command = subcommand(words[0])
    command = command.commands[words[1]] if hasattr(command, "commands") else command
    return {o for p in command.params for o in p.opts}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["short", "whole"])
def test_the_readme_leads_to_an_endpoint_and_back(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its lines in their order; `make soak` trains, here a small model is registered in place of what would come."""
    model, told = tiny_model(tmp_path / "model"), {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LLMKIT_RUNS", str(tmp_path / "runs"))
    with Plane(tmp_path / "plane", delay=0.05, blobs="stub", mlflow=whole) as running:
        monkeypatch.setenv("LLMKIT_AZURE_CLOUD", str(running.cloud))
        for words in spoken():
            assert {w for w in words if w.startswith("--")} <= options(words), words
            if "register" in words if whole else words[0] in ("run", "pipeline"):
                continue
            line = [str(model) if w.endswith("/model") else w for w in words]
            assert dispatch(line) == 0, words
            told[" ".join(words)] = capsys.readouterr().out
    assert "16 files are good" in told["azure check"]
    assert "azureml:llmkit-serve:" in told["azure up cpu gpu-spot"] and "gpu-spot made" in told["azure up cpu gpu-spot"]
    assert "blue gets all traffic" in told["azure deploy blue"]
    address, *keys = told["azure keys"].split()
    assert address.endswith("/v1") and len(keys) == 2
    assert told["azure traffic blue=95 green=5"] == "blue 95 %, green 5 %\n"
    assert told["azure delete --yes"] == "llmkit is gone\n"
    assert "gpu-spot taken away" in told["azure down"]


class Stand:
    """An endpoint that notes what is asked of it."""

    def __init__(self, shares: dict[str, int], deployments: tuple[str, ...] = ()) -> None:
        self.name, self.now, self.made, self.done = "llmkit", shares, set(deployments), []

    def make(self, path: Path) -> None:
        self.done.append("make")

    def shares(self) -> dict[str, int]:
        return {n: s for n, s in self.now.items() if s}

    def put(self, traffic: dict[str, int]) -> None:
        assert sum(traffic.values()) == 100
        self.now = traffic

    def deploy(self, path: Path, **over: str) -> str:
        assert not self.now.get(path.stem), "people would meet a model that nobody has tried"
        self.made.add(path.stem)
        return path.stem

    def remove(self, name: str) -> None:
        assert not self.now.get(name)
        self.made.discard(name)


CASES = [
    ({}, 5, False, {"blue": 100}),
    ({"blue": 100}, 5, False, {"blue": 95, "green": 5}),
    ({"green": 100}, 5, False, {"green": 95, "blue": 5}),
    ({"blue": 95, "green": 5}, 10, False, {"blue": 90, "green": 10}),
    ({"blue": 50, "green": 50}, 5, False, {"green": 95, "blue": 5}),
    ({"blue": 100}, 100, True, {"green": 100}),
]


@pytest.mark.parametrize(("before", "share", "lone", "after"), CASES)
def test_who_gets_what(before: dict[str, int], share: int, lone: bool, after: dict[str, int]) -> None:
    from release import deploy

    stand = Stand(before, tuple(before))
    asked: list[str] = []
    deploy(stand, "azureml:llmkit:2", "azureml:llmkit-serve:b", share, lone, lambda _, name: asked.append(name))
    assert stand.shares() == after
    assert len(asked) == 1 and stand.made == {*after, *(() if lone else before)}


def test_what_does_not_answer_gets_nothing() -> None:
    from release import deploy, finish

    def refuse(backend: Any, name: str) -> None:
        raise ServiceError(f"{name} answers 500", "look at its log")

    stand = Stand({"blue": 95, "green": 5}, ("blue", "green"))
    with pytest.raises(ServiceError, match="green answers 500"):
        finish(stand, refuse)
    assert stand.shares() == {"blue": 95, "green": 5}
    with pytest.raises(ServiceError, match="green answers 500"):
        deploy(stand, "azureml:llmkit:2", "azureml:llmkit-serve:b", 5, asking=refuse)
    assert stand.shares() == {"blue": 100}


def test_a_question_is_put_past_the_shares(plane: Plane) -> None:
    """To the deployment that is meant: one that is not there does not answer."""
    from release import ask

    backend = EndpointBackend(connect(), "llmkit")
    if not (names := list(backend.deployments() if backend.find() else ())):
        pytest.skip("wants the endpoint that the workflow's test makes")
    before = plane.endpoints.fronts["llmkit"].counts[names[0]]
    ask(backend, names[0])
    assert plane.endpoints.fronts["llmkit"].counts[names[0]] == before + 1
    with pytest.raises(ServiceError, match=r"red of llmkit answers 404.*; the traffic stays; llmkit azure logs red"):
        ask(backend, "red")


def closure(names: list[str]) -> set[str]:
    """Installed packages by normalized name: these, and what they want."""
    found, todo = set[str](), list(names)
    while todo:
        name = normal(re.split(r"[\[<>=!~; (]", todo.pop())[0])
        if name not in found:
            found.add(name)
            with contextlib.suppress(PackageNotFoundError):  # for another system
                todo += [r for r in requires(name) or [] if "extra ==" not in r]
    return found


def normal(name: str) -> str:
    """A package's name as PyPI normalizes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_runner_installs_what_is_imported(plane: Plane) -> None:
    """With what the workflow installs, and without all else that is installed here, the script runs."""
    there = closure(FLOW["env"]["PACKAGES"].split())
    owners = packages_distributions()
    absent = [m for m, ds in owners.items() if m != "llmkit" and not {normal(d) for d in ds} & there]
    assert {"torch", "typer", "mlflow"} <= set(absent)
    image = IMAGE.format(name="serve", digest="d" * 64)
    calls = [["release.py", "model", "llmkit"], ["release.py", "environments", f"serve={image}"]]
    code = f"import runpy, sys\nsys.modules |= dict.fromkeys({absent})\nimport azure.identity, requests\n"
    code += f"for sys.argv[:] in {calls}:\n    try:\n        runpy.run_path('tools/release.py', run_name='__main__')\n"
    code += "    except SystemExit as e:\n        assert not e.code"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=fresh(), capture_output=True, text=True)
    assert re.fullmatch(r"azureml:llmkit:1\nserve=azureml:llmkit-serve:\w+\n", done.stdout), done.stderr
