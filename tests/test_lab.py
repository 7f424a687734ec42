"""JupyterLab, in a real browser: a job notebook is opened, run from top to bottom, and shows its result."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import MISSING, PROGRAM, Browser, wait
from conftest import ROOT

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=MISSING)
TOKEN = secrets.token_hex(16)
# What the page knows of the notebook that is open. Cells out of sight are not drawn, so the text comes from the model.
PANEL = "window.jupyterapp.shell.currentWidget"
OUTPUTS = f"{PANEL}.content.widgets.flatMap(c => c.model.outputs ? c.model.outputs.toJSON() : [])"
RUN = "window.ran = null; window.jupyterapp.commands.execute('notebook:run-all-cells').then(ok => {window.ran = [ok]});"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """JupyterLab as `make lab` starts it, on a folder with a copy of the job notebooks; its address."""
    shutil.copytree(ROOT / "nbs" / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "jupyterlab", str(tmp_path / "jobs"), "--no-browser", "--ip=127.0.0.1"]
    words += [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"]
    words += ["--allow-root", "--LabApp.expose_app_in_browser=True"]
    words += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    homes = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    homes |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "s"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "w")}
    with open(tmp_path / "lab.log", "w") as log:
        process = subprocess.Popen(words, env=os.environ | homes, cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait(lambda: answers(f"http://127.0.0.1:{port}/api"), 60, "JupyterLab to start")
        yield f"http://127.0.0.1:{port}/lab"
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    """Whether a server answers."""
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


JOBS = sorted(path.stem for path in (ROOT / "nbs" / "jobs").glob("*.ipynb"))
REST = [pytest.param(name, marks=pytest.mark.soak) for name in JOBS if name != "train_model"]


@pytest.mark.parametrize("name", ["train_model", *REST])
def test_a_job_notebook_in_jupyterlab(lab: str, tmp_path: Path, name: str) -> None:
    """It opens with a kernel, every cell runs in less than a minute, none shows an error, the result is on the page."""
    with Browser(tmp_path / "profile") as page:
        page.go(f"{lab}/tree/{name}.ipynb?token={TOKEN}")
        page.until(f"window.jupyterapp && {PANEL}?.sessionContext?.session?.kernel?.status === 'idle'", 90)
        page.js(RUN)
        page.until(f"window.ran && {PANEL}.sessionContext.session.kernel.status === 'idle'", 60)
        page.screenshot(tmp_path / "top.png")
        outputs = page.js(OUTPUTS)
        assert [o for o in outputs if o["output_type"] == "error"] == []
        assert page.js("window.ran[0]") is True
        assert not page.js(f"{PANEL}.content.widgets.some(c => c.model.type === 'code' && !c.model.executionCount)")
        page.js(f"{PANEL}.content.activeCellIndex = {PANEL}.content.widgets.length - 1")
        last = outputs[-1].get("text") or outputs[-1]["data"]["text/plain"]
        page.until(f"document.body.innerText.includes({json.dumps(''.join(last).splitlines()[-1])})", 10)
        if name == "train_model":
            page.until(
                "[...document.querySelectorAll('.jp-OutputArea-output img')].some(i => i.naturalWidth > 200)", 10
            )
        page.screenshot(tmp_path / "end.png")
