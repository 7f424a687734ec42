"""The images of azure/environments/, built by buildah without a daemon and without a registry, and run.

The base image of the Dockerfiles lies in a registry that is not asked here. In its place stands a Debian of the same
release, made by debootstrap: the same Python, the same commands.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIRROR = os.environ.get("LLMKIT_DEBIAN", "http://deb.debian.org/debian")
pytestmark = pytest.mark.soak


@dataclass
class Buildah:
    """buildah with a store of its own."""

    home: Path

    @property
    def words(self) -> list[str | Path]:
        """How a command begins."""
        return ["buildah", "--storage-driver", "vfs", "--root", self.home / "store", "--runroot", self.home / "run"]

    def __call__(self, *words: str | Path) -> str:
        """The output of one command; a failure shows its last lines."""
        done = subprocess.run([*self.words, *words], capture_output=True, text=True)
        assert done.returncode == 0, f"buildah {words[0]}: {(done.stdout + done.stderr)[-3000:]}"
        return done.stdout.strip()


def pip_settings(folder: Path) -> list[str | Path]:
    """Options of `buildah bud` that give pip inside what pip has outside: its settings, and the files they name."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    files: set[Path] = set()
    for line in said.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.removeprefix("global.").removeprefix(":env:.")
        if "." in name or name in ("config-file", "constraint"):
            continue
        value = value.strip("'").replace("\\n", " ")
        settings[name] = value
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():  # an index beside its files: the folder of both
                files.add(path.parent if word.startswith("file://") else path)
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{n} = {v}\n" for n, v in settings.items()))
    mounts = [f"{folder / 'pip.conf'}:/etc/pip.conf:ro", *(f"{f}:{f}:ro" for f in sorted(files))]
    return [word for mount in mounts for word in ("--volume", mount)]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """buildah, with the base image in its store."""
    missing = [tool for tool in ("buildah", "debootstrap") if not shutil.which(tool)]
    if missing or os.geteuid():
        pytest.skip(f"wants root, and Debian's {' and '.join(missing or ['buildah'])}")
    home = tmp_path_factory.mktemp("images")
    found = Buildah(home)
    command = ["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm"]
    made = subprocess.run([*command, home / "debian", MIRROR], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no Debian from {MIRROR}: {(made.stdout + made.stderr)[-300:]}")
    base = found("from", "scratch")
    found("add", base, home / "debian", "/")
    found("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", base)
    found("commit", "--rm", base, "llmkit-base")
    shutil.rmtree(home / "debian")
    yield found
    shutil.rmtree(home, ignore_errors=True)


def build(buildah: Buildah, name: str, context: Path) -> str:
    """The image of an environment, from its own Dockerfile."""
    dockerfile = ROOT / "azure" / "environments" / name / "Dockerfile"
    words: list[str | Path] = ["bud", "--isolation", "chroot", "--build-arg", "BASE=localhost/llmkit-base"]
    words += ["--build-arg", "TORCH_INDEX=https://pypi.org/simple"] if name == "serve" else []
    words += pip_settings(buildah.home)
    buildah(*words, "--file", dockerfile, "--tag", f"llmkit-{name}", context)
    return f"localhost/llmkit-{name}"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url: str, body: dict | None = None) -> tuple[int, str]:
    """Status and text of a reply."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except URLError as e:
        return getattr(e, "code", 0), str(e)


@contextmanager
def served(buildah: Buildah, image: str, model: Path) -> Iterator[str]:
    """The address of a container that was started as Azure ML does it, the folder `model` below a mount."""
    port = free_port()
    container = buildah("from", image)
    inner = f"AZUREML_MODEL_DIR=/mount HOST=127.0.0.1 PORT={port} LLMKIT_REVISION=blue sh /opt/llmkit/start.sh"
    volume = ["--volume", f"{model}:/mount/llmkit/model:ro"]
    command = [*buildah.words, "run", "--isolation", "chroot", *volume, container, "--", "sh", "-c", inner]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while ask(f"{url}/readyz")[0] != 200 and time.monotonic() < end and server.poll() is None:
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        output = server.communicate(timeout=60)[0]
        print(output[-2000:])
    assert buildah("run", "--isolation", "chroot", container, "--", "id", "-u") == "1000"


@pytest.mark.timeout(3000)
def test_the_serving_image_answers(buildah: Buildah, tmp_path: Path) -> None:
    """Built, and started as Azure ML does it: probes, then a completion and a chat without a key."""
    from llmkit.core.tiny import tiny_model

    model = tiny_model(tmp_path / "model")
    for path in (tmp_path, model, *model.iterdir()):
        path.chmod(0o755)  # the server's user is not ours, and a mount in Azure can be read by all
    with served(buildah, build(buildah, "serve", ROOT), model) as url:
        for path in ("health", "livez", "readyz"):
            status, text = ask(f"{url}/{path}")
            assert status == 200, text
        asked = {"model": "llmkit", "max_tokens": 4}
        status, text = ask(f"{url}/v1/completions", asked | {"prompt": "a"})
        assert status == 200, text
        assert json.loads(text)["usage"]["completion_tokens"] >= 1 and json.loads(text)["system_fingerprint"] == "blue"
        status, text = ask(f"{url}/v1/chat/completions", asked | {"messages": [{"role": "user", "content": "add"}]})
        assert status == 200, text
        assert json.loads(text)["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.timeout(3000)
def test_the_training_image_runs_a_job(buildah: Buildah) -> None:
    """Its packages fit together, and a job's command, as the files in azure/jobs have it, trains in it."""
    container = buildah("from", build(buildah, "train", ROOT / "azure" / "environments" / "train"))
    inside = ["run", "--isolation", "chroot", "--volume", f"{ROOT}:/code:ro", "--workingdir", "/code"]
    inside += ["--env", "LLMKIT_RUNS=/tmp/runs", container, "--"]
    assert "no broken" in buildah(*inside, "pip", "check").lower()
    code = "import trl, peft, azureml.mlflow, onnxruntime_genai, evidently, mlflow; print(mlflow.__version__)"
    assert buildah(*inside, "python", "-c", code).startswith("3.")
    job = ["python", "-m", "llmkit.cli", "run", "nbs/jobs/train_model.ipynb", "--out", "/tmp/out", "-p", "steps", "5"]
    buildah(*inside, *job)
    assert json.loads(buildah(*inside, "cat", "/tmp/out/result.json"))["status"] == "finished"
