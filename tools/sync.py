#!/usr/bin/env python
"""Check that llmkit/ is what the notebooks export, that the notebooks are clean, and that README.md is the index.

Works on a copy: nothing in the tree is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def files(folder: Path, suffix: str) -> dict[str, bytes]:
    """Content of the files with `suffix` under `folder`, by path."""
    found = (p for p in folder.rglob(f"*{suffix}") if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts))
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def differences(here: dict[str, bytes], fresh: dict[str, bytes], verb: str) -> list[str]:
    """A line for each file that is missing, left over or different."""
    lines = []
    for name in sorted(here.keys() | fresh.keys()):
        if name not in here:
            lines.append(f"{name} is missing; {verb}")
        elif name not in fresh:
            lines.append(f"{name} comes from no notebook; delete it")
        elif here[name] != fresh[name]:
            lines.append(f"{name} differs; {verb}")
    return lines


def problems() -> list[str]:
    """What is out of sync, a line each."""
    with tempfile.TemporaryDirectory(prefix="llmkit-sync-") as name:
        copy = Path(name)
        shutil.copy(ROOT / "settings.ini", copy)
        shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        # This interpreter's own llmkit stays what it is; the copy is only exported.
        env = os.environ | {"PYTHONPATH": ""}
        env.pop("COVERAGE_PROCESS_CONFIG", None)
        for command in ("nbdev_clean", "nbdev_export"):
            done = subprocess.run([BIN / command], cwd=copy, env=env, capture_output=True, text=True)
            if done.returncode:
                return [f"{command} failed: {done.stderr.strip()}"]
        found = differences(files(ROOT / "llmkit", ".py"), files(copy / "llmkit", ".py"), "run nbdev_export")
        found += differences(files(ROOT / "nbs", ".ipynb"), files(copy / "nbs", ".ipynb"), "run nbdev_clean")
    readme = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    return found + [line for line in (readme.stdout + readme.stderr).splitlines() if readme.returncode]


def main() -> int:
    """Print what is out of sync."""
    found = problems()
    print("\n".join(found) if found else "package, notebooks and README are in sync")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
