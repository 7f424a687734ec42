#!/usr/bin/env python
"""Write requirements.txt, the lock: what is installed in this environment, exact, and nothing of this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HEADER = """\
# The lock: one environment that holds the whole product, exact versions, made by `make lock`.
# Install with `make install`, or `pip install -r requirements.txt && pip install --no-deps -e .`
# torch is the CPU or the CUDA build, as the index has it; triton is the version that the CUDA build asks for.
# onnxruntime-gpu never belongs beside onnxruntime: the two overwrite each other's files. For a GPU, replace the one by
# the other (extra `gpu`).
"""


def main() -> None:
    """Freeze, drop llmkit itself and local version labels, write."""
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True
    )
    pins = [re.sub(r"\+\w+$", "", line) for line in frozen.stdout.splitlines() if re.match(r"[\w.\-]+==", line)]
    own = ("llmkit", "pip")
    pins = sorted((p for p in pins if p.partition("==")[0].lower() not in own), key=str.lower)
    Path(__file__).resolve().parents[1].joinpath("requirements.txt").write_text(HEADER + "\n".join(pins) + "\n")
    print(f"requirements.txt: {len(pins)} packages")


if __name__ == "__main__":
    main()
