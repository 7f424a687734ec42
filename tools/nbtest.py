#!/usr/bin/env python
"""Run notebooks as tests, and count what their exported cells cover as lines of the package.

    python tools/nbtest.py [-j 2] [PART_OF_PATH ...]

Like nbdev_test, which it honours (`#| eval: false`, the flags of settings.ini, `skip_exec`, `.notest`): each notebook
is executed from top to bottom in a process of its own, in its own folder, with the code of its exported cells. But
nbdev_test compiles that code under a name of the cell, so a coverage tool never sees llmkit/x.py run. Here an exported
cell is compiled under the name of its module, at the lines where the export put it. And the processes are copies of
one that has imported the large libraries, which otherwise takes longer than most notebooks.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import gc
import importlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
# Other people's, large, used by many notebooks, and without threads, settings or an accelerator until they are called.
PRELOADED = ("execnb.shell", "nbdev.process", "numpy", "pandas", "torch", "transformers.models.llama.modeling_llama")
STATUS: list[int] = []  # in a copy of this process: how the notebook ended
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


def end() -> None:
    """End a copy of this process here: Python would take all libraries apart, for longer than most notebooks run."""
    if STATUS:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(STATUS[0])


def preload() -> None:
    """Import what most notebooks import, so that each gets it with its copy of this process."""
    atexit.register(end)  # the first that is registered is called last, after what libraries and notebooks register
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # or the first collection in each copy would copy every page, too


@dataclass
class Running:
    """A notebook that a copy of this process executes."""

    path: Path
    pid: int
    output: IO[str]
    started: float

    def printed(self) -> str:
        """What it printed."""
        with self.output:
            self.output.seek(0)
            return self.output.read()


def begin(path: Path) -> Running:
    """Execute one notebook in a copy of this process, which ends as any process does."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed when it is read)
    started = time.monotonic()
    if pid := os.fork():
        return Running(path, pid, output, started)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, standard in ((nothing, 0), (output.fileno(), 1), (output.fileno(), 2)):
        os.dup2(source, standard)
    STATUS.append(execute(path))
    sys.exit(STATUS[0])


def await_end(running: dict[int, Running], timeout: float) -> tuple[Running, bool, float, str]:
    """Wait until one of `running` ends, and take it out: it, whether it passed, its CPU seconds, what it printed."""
    while True:
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if pid in running:
            one = running.pop(pid)
            return one, status == 0, used.ru_utime + used.ru_stime, one.printed()
        for pid, one in running.items():
            if time.monotonic() - one.started > timeout:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                running.pop(pid)
                return one, False, 0.0, f"{one.printed()}{one.path}: not done after {timeout:g} s"
        time.sleep(0.02)


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
    args = parser.parse_args()
    start, paths, failed = time.monotonic(), notebooks(args.parts), []
    if not paths:
        sys.exit(f"no notebook matches {' '.join(args.parts)}")
    # Two at a time share the cores; numeric libraries that each take all of them only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    preload()
    waiting, running = paths[::-1], dict[int, Running]()
    while waiting or running:
        if waiting and len(running) < args.jobs:
            one = begin(waiting.pop())
            running[one.pid] = one
            continue
        one, passed, used, output = await_end(running, args.timeout)
        seconds, name = time.monotonic() - one.started, one.path.relative_to(ROOT)
        print(f"{'ok    ' if passed else 'FAILED'} {seconds:6.1f} s ({used:5.1f} s CPU)  {name}", flush=True)
        if not passed:
            failed.append(one.path)
            print(f"\n{output}\n", flush=True)
    print(f"{len(paths) - len(failed)} notebooks passed, {len(failed)} failed in {time.monotonic() - start:.0f} s")
    for path in failed:
        print(f"  {path.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
