"""Clusters and endpoints in Azure ML, made by the real SDK in the local control plane."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from azure_plane import Plane

from llmkit.azureml.assets import ensure_environment
from llmkit.azureml.compute import down, status, up
from llmkit.azureml.endpoint import EndpointBackend
from llmkit.azureml.workspace import connect
from llmkit.core.errors import ConfigError
from llmkit.deployment.rollout import move_traffic

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of marshmallow, which the SDK uses
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plane]:
    """A control plane that answers everything."""
    with Plane(tmp_path / "plane", delay=0.05, blobs="stub") as running:
        monkeypatch.setenv("LLMKIT_AZURE_CLOUD", str(running.cloud))
        yield running


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the files of the clusters."""
    home = tmp_path / "project"
    shutil.copytree(ROOT / "azure" / "compute_configs", home / "azure" / "compute_configs")
    return home


def test_clusters_twice(plane: Plane, project: Path) -> None:
    service, told = connect(), []
    for _ in range(2):
        up(service, project, ["gpu-spot"], told.append)
    assert ["made" in line for line in told] == [True, False]
    assert next(row for row in status(service, project) if row["cluster"] == "gpu-spot")["state"] == "succeeded"
    for _ in range(2):
        down(service, project, ["gpu-spot"], told.append)
    assert told[-2:] == ["gpu-spot taken away", "gpu-spot is not there"]


@pytest.fixture
def endpoint(plane: Plane, tmp_path: Path) -> Iterator[tuple[EndpointBackend, Path]]:
    """An endpoint whose deployments are small servers that say their name."""
    image = tmp_path / "image"
    image.mkdir()
    (image / "serve.py").write_text(SERVER)
    lines = ["FROM python:3.11", "COPY serve.py /opt/serve.py", 'CMD ["python", "/opt/serve.py"]']
    (image / "Dockerfile").write_text("\n".join(lines))
    routes = {f"{kind}_route": {"port": 8000, "path": "/"} for kind in ("liveness", "readiness", "scoring")}
    spec = {"name": "serve", "build": {"path": "."}, "inference_config": routes}
    (image / "environment.yml").write_text(json.dumps(spec))
    (tmp_path / "endpoint.yml").write_text("name: llmkit\nauth_mode: key\n")
    service = connect()
    environment = ensure_environment(service, image, say=lambda line: None)
    for name in ("blue", "green"):
        said = {"name": name, "endpoint_name": "llmkit", "environment": environment, "instance_count": 1}
        said |= {"instance_type": "Standard_DS3_v2", "environment_variables": {"WHO": name}}
        said |= {"readiness_probe": {"period": 1, "failure_threshold": 20}}
        (tmp_path / f"{name}.yml").write_text(json.dumps(said))
    found = EndpointBackend(service, "llmkit", patience=60.0, every=0.1)
    yield found, tmp_path
    found.delete()


SERVER = """import os
from http.server import BaseHTTPRequestHandler, HTTPServer

class Says(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["WHO"].encode())

    do_POST = do_GET

HTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8000"))), Says).serve_forever()
"""


def test_blue_and_green(endpoint: tuple[EndpointBackend, Path], plane: Plane) -> None:
    """Made twice without complaint, traffic set and read back, mirrored, keys rotated, deleted."""
    backend, folder = endpoint
    for _ in range(2):
        backend.make(folder / "endpoint.yml", say=lambda line: None)
        backend.deploy(folder / "blue.yml", say=lambda line: None)
    backend.deploy(folder / "green.yml", say=lambda line: None)
    move_traffic(backend, {"blue": 1.0})
    backend.mirror("green", 10)
    assert backend.traffic() == {"blue": 1.0}
    busy = {"method": "PUT", "status": 409, "message": "The endpoint is Updating", "times": 2}
    plane.faults.add(path="*/onlineendpoints/llmkit", **busy)
    move_traffic(backend, {"blue": 0.95, "green": 0.05})
    assert backend.traffic() == {"blue": 0.95, "green": 0.05}
    first = backend.keys()
    assert backend.rotate("secondary") != first[1] and backend.keys()[0] == first[0]
    with pytest.raises(ConfigError, match="green gets 5 % of the traffic"):
        backend.remove("green")
    move_traffic(backend, {"blue": 1.0})
    backend.remove("green")
    assert sorted(backend.deployments()) == ["blue"]
    assert isinstance(backend.logs("blue"), list)
