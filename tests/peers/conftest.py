"""One server for all suites here, started by the product's own interpreter; this environment has no llmkit."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before anything imports transformers: nothing here is downloaded, and two cores are shared with the server.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("LLMKIT_PYTHON", str(ROOT / ".venv/bin/python"))
LENGTHS = {"tiny": 2048, "short": 256}
MAKE = f"""
from llmkit.core.tiny import tiny_model
for name, length in {LENGTHS}.items():
    tiny_model(name, max_length=length)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("tiny")
get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
"""
KEY, ADMIN_KEY = "a-key-of-a-client", "the-key-of-the-administrator"
START_S = 180.0


@dataclass
class Served:
    """A running server: its address without `/v1`, and the folder of the model it serves."""

    base: str
    folder: Path
    key: str = KEY
    admin_key: str = ADMIN_KEY

    @property
    def url(self) -> str:
        """The address that clients are given."""
        return f"{self.base}/v1"


def environment() -> dict[str, str]:
    """The environment of the product's interpreter."""
    keys = {"LLMKIT_API_KEY": KEY, "LLMKIT_ADMIN_KEY": ADMIN_KEY}
    return os.environ | keys | {"PYTHONPATH": str(ROOT)}


def wait(process: subprocess.Popen[bytes], printed: Path) -> str:
    """The address in the ready line; fails with what the server printed if there is none."""
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        if found := re.search(r"^llmkit: ready, .* at (http://\S+)/v1 ", printed.read_text(), re.MULTILINE):
            return found[1]
        time.sleep(0.05)
    pytest.fail(f"the server did not start:\n{printed.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two models of random weights: `tiny`, and `short`, which a reply fills in no time."""
    home = tmp_path_factory.mktemp("served")
    words = [PYTHON, "-m", "llmkit.cli", "serve"]
    subprocess.run([PYTHON, "-c", MAKE], cwd=home, env=environment(), check=True)
    words += [f"{name}={home / name}" for name in LENGTHS]
    words += ["--variant", "torch", "--threads", "1", "--port", "0", "--log", str(home / "log.db"), "--exit-with-stdin"]
    with (home / "printed").open("wb") as out:
        pipes = {"stdin": subprocess.PIPE, "stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(words, env=environment(), **pipes)
    try:
        yield Served(wait(process, home / "printed"), home / "tiny")
        assert process.poll() is None, f"the server is gone:\n{(home / 'printed').read_text()[-4000:]}"
    finally:
        process.terminate()
        process.wait(60)
