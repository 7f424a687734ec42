#!/usr/bin/env python
"""Print an environment of Azure ML with a finished image in place of what it would be built from.

python tools/pin_image.py azure/environments/serve/environment.yml REGISTRY/llmkit-serve@sha256:... > serve.yml
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml


def pinned(path: Path, image: str) -> str:
    """The environment at `path` with `image`, as YAML."""
    if not re.fullmatch(r"[\w.\-]+(:\d+)?/[\w./\-]+@sha256:[0-9a-f]{64}", image):
        sys.exit(f"error: {image!r} names no image by digest; push it first, and give REGISTRY/NAME@sha256:...")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if found.pop("build", None) is None:
        sys.exit(f"error: {path} builds no image")
    return yaml.safe_dump(found | {"image": image}, sort_keys=False)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: pin_image.py ENVIRONMENT.yml IMAGE")
    print(pinned(Path(sys.argv[1]), sys.argv[2]), end="")
