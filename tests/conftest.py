"""What the tests share: the command line as a process, and job notebooks of a few lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Processes of a test share two cores; a thread pool in each of them only gets in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started in the background of a script, or under nohup, we would ignore Ctrl-C or a terminal that goes away, and so
# would every process that the tests interrupt.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


def pytest_configure(config: pytest.Config) -> None:
    """Markers of this suite."""
    config.addinivalue_line("markers", "soak: takes over a minute; `make soak` runs it, `make test` does not")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave soak tests out unless they are asked for."""
    if "soak" not in (config.option.markexpr or ""):
        dropped = [i for i in items if i.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [i for i in items if i not in dropped]


@dataclass
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


def command(*words: str | Path) -> list[str]:
    """The words of `llmkit ...` in this interpreter."""
    return [sys.executable, "-m", "llmkit.cli", *map(str, words)]


@pytest.fixture
def llmkit(tmp_path: Path) -> Callable[..., Done]:
    """Call `llmkit` in the temporary folder."""

    def call(*words: str | Path, **env: str) -> Done:
        done = subprocess.run(
            command(*words),
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "200"} | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """Write a job notebook: its name, its parameter cell, its other cells."""
    import nbformat

    def write(name: str, parameters: str, *cells: str) -> Path:
        made = [nbformat.v4.new_code_cell(c) for c in (parameters, *cells)]
        made[0].metadata["tags"] = ["parameters"]
        kernel = {"name": "python3", "display_name": "python3", "language": "python"}
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel}), path)
        return path

    return write
