#!/usr/bin/env python
"""Write the locks of the images in azure/environments/: what settings.ini asks for, in the lock's versions.

uv resolves for Linux on x86-64 with PyPI's own torch, whatever this machine has, and stays with the versions of
requirements.txt unless that is impossible; where it was, the new lock says so in its head.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "azure" / "environments"
CUDA = re.compile(r"triton|cuda-.*|nvidia-(?!ml-py).*")  # packages that only torch's build for GPUs needs


@dataclass(frozen=True)
class Image:
    """What goes into an image besides llmkit's own requirements."""

    extras: tuple[str, ...]
    also: tuple[str, ...]
    loose: tuple[str, ...] = ()  # packages whose bounds in settings.ini give way
    cuda: bool = True


IMAGES = {
    # azureml-mlflow wants an mlflow that is older than ours.
    "train": Image(("train", "serve", "monitor"), ("azureml-mlflow>=1.62", "setuptools", "wheel"), ("mlflow",)),
    "serve": Image(("serve", "monitor"), ("azure-monitor-opentelemetry", "setuptools", "wheel"), cuda=False),
}


def normal(requirement: str) -> str:
    """The package that a requirement names, as PyPI normalizes it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~;]", requirement)[0]).lower()


def wanted(image: Image) -> list[str]:
    """The requirements of an image, as settings.ini and the table above have them."""
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    keys = ["requirements", *(f"{extra}_requirements" for extra in image.extras)]
    found = [r for key in keys for r in ini["DEFAULT"][key].split()]
    return [normal(r) if normal(r) in image.loose else r for r in found] + list(image.also)


def pins(path: Path) -> dict[str, str]:
    """Version by normalized name of a file of pins."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"[\w.\-]+==", line))
    return {normal(line): line.partition("==")[2].strip() for line in lines}


def resolve(image: Image, uv: str, path: Path) -> list[str]:
    """The pins of an image, resolved at `path`, which holds the preferred versions."""
    shutil.copy(ROOT / "requirements.txt", path)
    command = [uv, "pip", "compile", "-", "--output-file", str(path), "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "--no-emit-package", "pip"]
    done = subprocess.run(command, input="\n".join(wanted(image)), capture_output=True, text=True, cwd=path.parent)
    if done.returncode:
        sys.exit(f"error: uv found no versions that fit together\n{done.stderr}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"[\w.\-]+==", line)]
    return [line for line in lines if image.cuda or not CUDA.fullmatch(normal(line))]


def differing(found: dict[str, str]) -> list[str]:
    """Packages that have another version than in the lock."""
    lock = pins(ROOT / "requirements.txt")
    return sorted(name for name, version in found.items() if lock.get(name, version) != version)


def write(name: str, uv: str) -> None:
    """Resolve one image and write its lock."""
    path = ENVIRONMENTS / name / "requirements.txt"
    lines = resolve(IMAGES[name], uv, path)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    other = " ".join(differing(pins(path))) or "none"
    head = (
        f"# The lock of the image llmkit-{name}, made by `make image-locks`; it is whole, install it with --no-deps.\n"
    )
    head += f"# Other versions than in requirements.txt: {other}\n"
    path.write_text(head + path.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(lines)} packages; other versions than in requirements.txt: {other}")


def main() -> None:
    """Write all locks."""
    uv = next(
        (u for u in (str(Path(sys.executable).with_name("uv")), shutil.which("uv")) if u and Path(u).exists()), ""
    )
    if not uv:
        sys.exit("error: uv is not installed; call `make image-locks`, which installs it")
    for name in IMAGES:
        write(name, uv)


if __name__ == "__main__":
    main()
