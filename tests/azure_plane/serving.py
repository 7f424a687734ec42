"""The server of a deployment: the command of its image's Dockerfile, with the model mounted and the port mapped."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .limits import bad, seconds
from .web import ArmError

if TYPE_CHECKING:
    from .plane import Plane

ROOT = Path(__file__).resolve().parents[2]
MOUNT = "/var/azureml-app/azureml-models"


@dataclass
class Image:
    """What a Dockerfile's last stage says: what is started, with which variables, and where its files come from."""

    words: list[str]
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # path in the image -> path in the context


def dockerfile(text: str) -> Image:
    """Read a Dockerfile as far as a server that is not in a container needs it."""
    text = re.sub(r"\\\s*\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M))
    found: dict[str, list[str]] = {"ENTRYPOINT": [], "CMD": []}
    image = Image([])
    for word, rest in re.findall(r"^\s*([A-Za-z]+)\s+(.*?)\s*$", text, flags=re.M):
        if word.upper() == "FROM":
            found, image = {"ENTRYPOINT": [], "CMD": []}, Image([])
        elif word.upper() in found:
            found[word.upper()] = json.loads(rest) if rest.startswith("[") else ["/bin/sh", "-c", rest]
        elif word.upper() == "ENV":
            pairs = shlex.split(rest) if "=" in rest.split()[0] else [rest.replace(" ", "=", 1)]
            image.env |= dict(pair.split("=", 1) for pair in pairs)
        elif word.upper() in ("COPY", "ADD"):
            *sources, target = [part for part in shlex.split(rest) if not part.startswith("--")]
            for source in sources:
                below = target.endswith("/") or len(sources) > 1
                image.files[f"{target.rstrip('/')}/{Path(source).name}" if below else target] = source
    image.words = [*found["ENTRYPOINT"], *found["CMD"]]
    return image


class ServerProcess:
    """One deployment's process; a deployment of several instances has one process here too."""

    def __init__(self, plane: Plane, endpoint: str, name: str, properties: dict[str, Any]) -> None:
        self.plane, self.endpoint, self.name, self.properties = plane, endpoint, name, properties
        self.environment = plane.assets.find(properties["environmentId"], "environments")["properties"]
        self.folder = plane.home / "endpoints" / endpoint / name
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]

    def route(self, kind: str) -> tuple[str, int]:
        """Path and port of a route of the inference config: scoringRoute, livenessRoute, readinessRoute."""
        route = (self.environment.get("inferenceConfig") or {}).get(kind) or {}
        return str(route.get("path") or "/"), int(route.get("port") or 0)

    def image(self) -> Image:
        """What the environment's image starts."""
        if build := self.environment.get("build"):
            context = self.plane.home / "contexts" / hashlib.sha256(build["contextUri"].encode()).hexdigest()[:12]
            with self.plane.store.lock:  # an image is built once
                if not context.exists():
                    self.plane.blobs.download(*self.plane.blobs.place(build["contextUri"]), context)
            path = context / (build.get("dockerfilePath") or "Dockerfile")
            if not path.exists():
                raise ArmError(400, "ImageBuildFailed", f"the build context has no {path.name}")
            image = dockerfile(path.read_text())
            lacking = [
                source for source in image.files.values() if "*" not in source and not (context / source).exists()
            ]
            if lacking:
                raise ArmError(400, "ImageBuildFailed", f"COPY: not in the build context: {', '.join(lacking)}")
            image.files = {there: str(context / source) for there, source in image.files.items()}
            return image
        words = self.plane.images.get(self.environment["image"])
        if words is None:
            raise ArmError(400, "ImagePullError", f"image {self.environment['image']} was not found")
        return Image(list(words))

    def mount(self) -> dict[str, str]:
        """Bring the model; the names that its place has in the container -> where it is here."""
        if not self.properties.get("model"):
            return {}
        found = self.plane.assets.find(self.properties["model"], "models")
        asset, version = re.findall(r"/models/([^/]+)/versions/([^/]+)$", found["id"])[0]
        here = self.folder / "models"
        container, path = self.plane.blobs.place(found["properties"]["modelUri"])
        target = here / asset / version / Path(path.rstrip("/")).name
        if not target.exists() and not self.plane.blobs.download(container, path, target):
            raise ArmError(400, "ModelNotFound", f"nothing lies at {found['properties']['modelUri']}")
        there = self.properties.get("modelMountPath") or MOUNT
        return {there: str(here), "AZUREML_MODEL_DIR": str(here / asset / version)}

    def start(self) -> None:
        """Start the process, and wait until it says that it is ready."""
        image = self.image()
        env = dict(image.env)
        if not image.words:
            raise ArmError(400, "ContainerStartFailed", "the image starts nothing: it has neither ENTRYPOINT nor CMD")
        places = self.mount()
        model = places.pop("AZUREML_MODEL_DIR", "")
        places |= image.files
        env |= {"AZUREML_MODEL_DIR": model} if model else {}
        env |= {k: str(v) for k, v in (self.properties.get("environmentVariables") or {}).items()}
        env |= {"AZUREML_ENDPOINT_NAME": self.endpoint, "AZUREML_DEPLOYMENT_NAME": self.name}
        _, port = self.route("scoringRoute")

        def local(text: str) -> str:
            for there in sorted(places, key=len, reverse=True):
                text = re.sub(rf"(?<![\w./-]){re.escape(there)}(?![\w.-])", places[there], text)
            return text

        def mapped(text: str) -> str:  # 8000, --port=8000, 0.0.0.0:8000: where a port may stand
            return re.sub(rf"(^|[:=\s]){port}(?=$|[\s/])", rf"\g<1>{self.port}", text) if port else text

        kept = ("HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
        base = {key: os.environ[key] for key in kept if key in os.environ} | self.plane.wire.variables()
        env = base | {k: local(mapped(v) if "PORT" in k else v) for k, v in env.items() if k != "PATH"}
        env |= {"HOST": "127.0.0.1", "PORT": str(self.port)}  # the other half of the mapping: for scripts in the image
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        self.folder.mkdir(parents=True, exist_ok=True)
        words = [local(mapped(word)) for word in image.words]
        with (self.folder / "server.log").open("ab") as log:
            try:
                self.process = subprocess.Popen(
                    words,
                    cwd=self.folder,
                    env=env,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as e:
                raise ArmError(400, "ContainerStartFailed", f"{shlex.join(words)}: {e}") from None
        try:
            self.ready()
        except ArmError:
            self.close()
            raise

    def ready(self) -> None:
        """Ask the readiness route until it answers 200."""
        probe = self.properties.get("readinessProbe") or {}
        allowed = (seconds(probe.get("period")) or 10) * int(probe.get("failureThreshold") or 30)
        until = time.monotonic() + min(allowed, self.plane.start_timeout)
        path, _ = self.route("readinessRoute")
        while time.monotonic() < until and not self.plane.store.closed.is_set():
            if self.process is None or self.process.poll() is not None:
                code = self.process.returncode if self.process else None
                raise bad(
                    f"The container exited with code {code}. Its last lines:\n{self.log()[-2000:]}", "ContainerCrashed"
                )
            if self.ask(path) == 200:
                return
            time.sleep(0.05)
        raise bad(
            f"GET {path} was not answered with 200 in time. Its last lines:\n{self.log()[-2000:]}",
            "ReadinessProbeFailed",
        )

    def ask(self, path: str) -> int:
        """The status of a GET; 0 without an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def log(self) -> str:
        """What the process has written."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """End the process and its children."""
        if self.process is None:
            return
        for how, wait in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(wait)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.process.wait()
