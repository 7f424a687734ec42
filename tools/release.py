#!/usr/bin/env python
"""What a workflow does with Azure ML after the images are pushed; each command prints what the next one wants.

tools/release.py environments serve=REGISTRY/NAME@sha256:...  register images: serve=azureml:llmkit-serve:VERSION
tools/release.py model llmkit                                 its latest version: azureml:llmkit:VERSION
tools/release.py deploy ENDPOINT MODEL ENVIRONMENT SHARE      put it beside the old one, ask it, give it a share
tools/release.py finish ENDPOINT                              give it the rest, too

The workspace is found as `llmkit azure` finds it.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llmkit.azureml.assets import ensure_environment  # noqa: E402
from llmkit.azureml.endpoint import EndpointBackend  # noqa: E402
from llmkit.azureml.workspace import Service, connect  # noqa: E402
from llmkit.core.errors import ConfigError, LLMKitError, ServiceError  # noqa: E402

CONFIGS = ROOT / "azure" / "deployment_configs"


def pinned(path: Path, image: str) -> str:
    """The environment at `path` with a finished image in place of what it would be built from, as YAML."""
    if not re.fullmatch(r"[\w.\-]+(:\d+)?/[\w./\-]+@sha256:[0-9a-f]{64}", image):
        raise ConfigError(f"{image!r} names no image by digest", "push it first, and give REGISTRY/NAME@sha256:...")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    found.pop("build")
    return yaml.safe_dump(found | {"image": image}, sort_keys=False)


def environment(service: Service, name: str, image: str) -> str:
    """Register the environment azure/environments/NAME with a pushed image: azureml:NAME:VERSION."""
    text = pinned(ROOT / "azure" / "environments" / name / "environment.yml", image)
    with tempfile.TemporaryDirectory(prefix="llmkit-release-") as folder:
        path = Path(folder) / "environment.yml"
        path.write_text(text, encoding="utf-8")
        return ensure_environment(service, path)


def latest(service: Service, name: str) -> str:
    """The latest version of a registered model."""
    found = service.call(f"look for the model {name}", lambda c: c.models.get(name, label="latest"))
    return f"azureml:{name}:{found.version}"


def turns(shares: dict[str, int]) -> tuple[str, str]:
    """Which of blue and green gets the new model, and which one stays as it is."""
    return ("green", "blue") if shares.get("blue", 0) > shares.get("green", 0) else ("blue", "green")


def ask(backend: EndpointBackend, deployment: str) -> None:
    """Ask one deployment for a completion, past the shares; `ServiceError` if none comes."""
    import requests

    url = f"{backend.address()}/completions"
    headers = {"authorization": f"Bearer {backend.keys()[0]}", "azureml-model-deployment": deployment}
    body = {"model": "llmkit", "prompt": "def", "max_tokens": 4}
    reply = requests.post(url, json=body, headers=headers, timeout=170)
    if '"choices"' not in reply.text:
        raise ServiceError(
            f"{deployment} of {backend.name} answers {reply.status_code}: {reply.text[:200]}; the traffic stays",
            f"llmkit azure logs {deployment} --endpoint {backend.name}",
        )


def deploy(
    backend: EndpointBackend,
    model: str,
    environment: str,
    share: int,  # percent; the first deployment of an endpoint gets all
    lone: bool = False,  # take the other deployment away afterwards
    asking: Callable[[Any, str], None] = ask,
) -> str:
    """Put a model into the deployment that has less traffic, try it, and give it its share: the shares then."""
    backend.make(CONFIGS / "endpoint.yml")
    shares = backend.shares()
    new, old = turns(shares)
    if shares.get(new):  # of a rollout that was not finished: nobody may meet what is about to change
        backend.put({old: 100})
    backend.deploy(CONFIGS / f"{new}.yml", model=model, environment=environment)
    asking(backend, new)
    backend.put({new: share, old: 100 - share} if shares.get(old) else {new: 100})
    if lone:
        backend.remove(old)
    return told(backend)


def finish(backend: EndpointBackend, asking: Callable[[Any, str], None] = ask) -> str:
    """Give all traffic to the deployment that has less, if it still answers: the shares then."""
    shares = backend.shares()
    new, _ = turns(shares)
    if shares.get(new):  # else nothing is under way: the first deployment has all
        asking(backend, new)
        backend.put({new: 100})
    return told(backend)


def told(backend: EndpointBackend) -> str:
    """The shares in words."""
    return ", ".join(f"{name} {share} %" for name, share in sorted(backend.shares().items()))


def main(words: list[str] | None = None) -> int:
    """The exit code of one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("environments").add_argument("images", nargs="+", metavar="NAME=IMAGE")
    commands.add_parser("model").add_argument("name")
    commands.add_parser("finish").add_argument("endpoint")
    one = commands.add_parser("deploy")
    for argument in ("endpoint", "model", "environment"):
        one.add_argument(argument)
    one.add_argument("share", type=int, choices=range(101), metavar="SHARE")
    one.add_argument("--lone", action="store_true", help="take the other deployment away afterwards")
    given = parser.parse_args(words)
    try:
        service = connect()
        if given.command == "environments":
            for name, _, image in (pair.partition("=") for pair in given.images):
                print(f"{name}={environment(service, name, image)}")
        elif given.command == "model":
            print(latest(service, given.name))
        elif given.command == "finish":
            print(finish(EndpointBackend(service, given.endpoint)))
        else:
            backend = EndpointBackend(service, given.endpoint)
            print(deploy(backend, given.model, given.environment, given.share, given.lone))
    except LLMKitError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
