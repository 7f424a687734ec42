#!/usr/bin/env python
"""Run notebooks as tests, and count what their exported cells cover as lines of the package.

    python tools/nbtest.py [-j 2] [PART_OF_PATH ...]

Like nbdev_test, which it honours (`#| eval: false`, the flags of settings.ini, `skip_exec`, `.notest`): each notebook
is executed from top to bottom in a process of its own, in its own folder, with the code of its exported cells. But
nbdev_test compiles that code under a name of the cell, so a coverage tool never sees llmkit/x.py run. Here an exported
cell is compiled under the name of its module, at the lines where the export put it.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"^# %% .*\.ipynb #(\w+)$")


def module_of(cells: list[Any]) -> Path | None:
    """The module that a notebook exports to, from its `#| default_exp` cell."""
    for cell in cells:
        if found := re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.M):
            return ROOT / "llmkit" / f"{found[1].replace('.', '/')}.py"
    return None


def bodies(module: Path) -> dict[str, tuple[int, list[str]]]:
    """For each exported cell's id, the line before its text in `module`, and that text without directives."""
    found: dict[str, tuple[int, list[str]]] = {}
    lines: list[str] | None = None
    for number, line in enumerate(module.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("# %% "):
            marker = MARKER.match(line)
            lines = None
            if marker:
                lines = []
                found[marker[1]] = (number, lines)
        elif lines is not None:
            if not lines and (line.startswith("#|") or not line.strip()):
                found[marker[1]] = (number, lines)  # type: ignore[index]
            else:
                lines.append(line)
    return found


def places(cells: list[Any], module: Path | None) -> dict[str, tuple[str, int]]:
    """For each exported cell's id, the module's file and how many lines precede the cell there.

    A cell whose text differs from the module's (apart from imports, which nbdev makes relative) is left out.
    """
    if module is None or not module.exists():
        return {}
    exported, found = bodies(module), {}
    for cell in cells:
        offset, body = exported.get(cell["id"], (0, []))
        own = [line for line in "".join(cell["source"]).splitlines() if not line.startswith("#|")]
        blank = next((i for i, line in enumerate(own) if line.strip()), 0)
        own = own[blank:]
        same = len(own) <= len(body) and all(a == b or "import" in a for a, b in zip(own, body, strict=False))
        if body and same:
            found[cell["id"]] = (str(module), offset - blank)
    return found


def execute(path: Path) -> int:
    """Execute one notebook in this process; the exit status."""
    import json

    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from IPython.core.compilerop import CachingCompiler
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    class Located(CachingCompiler):
        """Compiles a cell under the name and at the lines of its place in the package."""

        place: tuple[str, int] | None = None

        def ast_parse(self, source: str, filename: str = "<unknown>", symbol: str = "exec") -> Any:
            tree = super().ast_parse(source, filename, symbol)
            return ast.increment_lineno(tree, self.place[1]) if self.place else tree

        def __call__(self, source: Any, filename: str, symbol: str, *rest: Any, **kw: Any) -> Any:
            return super().__call__(source, self.place[0] if self.place else filename, symbol, *rest, **kw)

    class Shell(CaptureShell):
        compiler_class = Located

    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    where = places(cells, module_of(cells))
    os.environ["IN_TEST"] = "1"
    sys.path.insert(0, str(ROOT))
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if str(getattr(nb, "frontmatter_", {}).get("skip_exec", "")).lower() == "true":
        return 0
    flags, shell = set(get_config().tst_flags.split()), Shell(path)
    with working_directory(path.parent):
        for cell in nb.cells:
            directives = getattr(cell, "directives_", {}) or {}
            off = directives.get("eval:", [""])[0].lower() == "false" or flags & directives.keys()
            if cell.cell_type != "code" or off:
                continue
            shell.compile.place = where.get(cell.id)
            shell.cell(cell)
            if shell.exc:
                sys.stderr.write(f"{path.relative_to(ROOT)}, cell {cell.id}:\n\n{cell.source}\n\n")
                traceback.print_exception(type(shell.exc), shell.exc, shell.exc.__traceback__)
                return 1
    return 0


def test(path: Path, timeout: float) -> tuple[bool, float, str]:
    """Execute one notebook in a process of its own: whether it passed, seconds, what it printed."""
    start = time.monotonic()
    try:
        command = [sys.executable, __file__, "--one", str(path)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False, time.monotonic() - start, f"{path}: not done after {timeout:g} s"
    return done.returncode == 0, time.monotonic() - start, done.stdout + done.stderr


def notebooks(parts: list[str]) -> list[Path]:
    """The notebooks under nbs/ whose path contains one of `parts`, as nbdev_test would take them."""
    found = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not p.name.startswith(("_", ".")))
    found = [p for p in found if ".ipynb_checkpoints" not in p.parts and not (p.parent / ".notest").exists()]
    return [p for p in found if not parts or any(part in str(p.relative_to(ROOT)) for part in parts)]


def main() -> int:
    """Execute the notebooks and print seconds and failures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART_OF_PATH", help="only notebooks whose path contains one of them"
    )
    parser.add_argument("-j", "--jobs", type=int, default=2, help="notebooks at a time (2)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one notebook (300)")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return execute(args.one.resolve())
    start, paths, failed = time.monotonic(), notebooks(args.parts), []
    if not paths:
        sys.exit(f"no notebook matches {' '.join(args.parts)}")
    # Two at a time share the cores; numeric libraries that each take all of them only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(args.jobs) as pool:
        for path, (passed, seconds, output) in zip(
            paths, pool.map(lambda p: test(p, args.timeout), paths), strict=True
        ):
            print(f"{'ok    ' if passed else 'FAILED'} {seconds:6.1f} s  {path.relative_to(ROOT)}", flush=True)
            if not passed:
                failed.append(path)
                print(f"\n{output}\n", flush=True)
    print(f"{len(paths) - len(failed)} notebooks passed, {len(failed)} failed in {time.monotonic() - start:.0f} s")
    for path in failed:
        print(f"  {path.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
