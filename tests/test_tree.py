"""The rules of the tree that a reader can rely on."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS, PACKAGE = ROOT / "nbs", ROOT / "llmkit"
FLOORS = ["core", "security", "data", "kernels", "models", "engine", "training", "evaluation", "optimization"]
FLOORS += ["monitoring", "serving", "deployment", "runner", "azureml", "cli"]
COMPOSE = ("jobs", "demos", "benchmarks")  # they may import every floor
LONG, WALL, MODULE = 20, 40, 300
sys.path.insert(0, str(ROOT / "tools"))


def cells(path: Path) -> list[dict]:
    """The code cells of a notebook, their source as one text."""
    book = json.loads(path.read_text(encoding="utf-8"))
    return [c | {"source": "".join(c["source"])} for c in book["cells"] if c["cell_type"] == "code"]


def notebooks() -> list[Path]:
    """All notebooks."""
    return sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def modules() -> list[Path]:
    """All modules of the package that a notebook must stand behind."""
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def exported(path: Path) -> Iterator[str]:
    """The exported cells of a notebook, without their directives."""
    for cell in cells(path):
        if re.search(r"^#\|\s*exports?\b", cell["source"], re.M):
            yield "\n".join(line for line in cell["source"].splitlines() if not line.startswith("#|"))


def default_exp(path: Path) -> str:
    """What a notebook exports to; empty if it exports nothing."""
    found = (re.search(r"^#\|\s*default_exp\s+(\S+)", c["source"], re.M) for c in cells(path))
    return next((m[1] for m in found if m), "")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_one_notebook_one_module() -> None:
    """A notebook's folder and noun are its module's, and no module is without a notebook."""
    wrong, made = [], {}
    for path in notebooks():
        target, floor = default_exp(path), path.parent.name
        job = floor == "jobs" or (floor == "benchmarks" and not re.match(r"\d", path.stem))
        if path.parent == NBS or job:
            wrong += [f"{name(path)} must export nothing"] * bool(target)
            continue
        noun = re.sub(r"^\d+[a-z]?_", "", path.stem)
        noun = "__main__" if (floor, noun) == ("cli", "module") else noun
        if target != f"{floor}.{noun}":
            wrong.append(f"{name(path)} exports to {target or 'nothing'}, not to {floor}.{noun}")
        if not re.match(r"\d\d[a-z]?_", path.stem):
            wrong.append(f"{name(path)} has no number")
        made[target] = path
    for path in modules():
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        wrong += [f"{name(path)} comes from no notebook"] * (module not in made)
    assert not wrong, "\n".join(wrong)


def floor_of(module: str) -> str:
    """The floor in a dotted name below llmkit; empty for llmkit itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "llmkit" and len(parts) > 1 else ""


def imports(source: str, package: str = "") -> Iterator[tuple[int, str]]:
    """Line and module of every import of llmkit in `source`; relative ones are resolved against `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if floor_of(alias.name))
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "llmkit":
                yield from ((node.lineno, f"llmkit.{alias.name}") for alias in node.names)
            elif floor_of(module):
                yield node.lineno, module


def upward(path: Path) -> list[str]:
    """The imports of a module that look up."""
    here = path.relative_to(PACKAGE).parts[0]
    if here in COMPOSE:
        return []
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = imports(path.read_text(encoding="utf-8"), package)
    # The command names its parts as text and imports what it is asked for; demos are one of them.
    return [
        f"{name(path)}:{line} imports {module}"
        for line, module in found
        if floor_of(module) not in FLOORS or FLOORS.index(floor_of(module)) > FLOORS.index(here)
    ]


def test_imports_run_downward() -> None:
    assert {p.relative_to(PACKAGE).parts[0] for p in modules()} <= {*FLOORS, *COMPOSE}
    wrong = [line for path in modules() for line in upward(path)]
    assert not wrong, "\n".join(wrong)


def test_the_import_rule_sees_relative_and_late_imports() -> None:
    """The rule above would catch what it is for."""
    source = "from ..serving.server import app\ndef f():\n    from llmkit import cli\n    import llmkit.runner.run\n"
    found = [module for _, module in imports(source, "llmkit.core")]
    assert found == ["llmkit.serving.server", "llmkit.cli", "llmkit.runner.run"]


def test_exported_cells_and_modules_are_short() -> None:
    sizes = [(len(text.splitlines()), name(path)) for path in notebooks() for text in exported(path)]
    long = sorted((s for s in sizes if s[0] > LONG), reverse=True)
    print(f"{len(sizes)} exported cells, {len(long)} over {LONG} lines:")
    print("\n".join(f"{lines:4d} {where}" for lines, where in long))
    over = [f"{where}: a cell of {lines} lines" for lines, where in long if lines > WALL]
    lengths = [(len(p.read_text(encoding="utf-8").splitlines()), name(p)) for p in modules()]
    over += [f"{where}: {lines} lines" for lines, where in lengths if lines > MODULE]
    assert not over, "\n".join(over)


def fastest(*words: str, tries: int = 7) -> float:
    """Seconds of the fastest of several runs of a command: a busy machine makes some slow, none fast."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}  # its start-up is not ours
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], env=env, check=True, capture_output=True, cwd=ROOT)
        best = min(best, time.perf_counter() - start)
    return best


CLI = ("-m", "llmkit.cli")


HELP = [(*CLI, *words, "--help") for words in ([], ["run"], ["jobs"], ["pipeline"], ["azure"])]


@pytest.mark.parametrize("words", [("-c", "import llmkit"), *HELP])
def test_answers_at_once(words: tuple[str, ...]) -> None:
    assert fastest(*words) < 0.3


def test_in_sync() -> None:
    """Notebooks are clean, llmkit/ is what they export and nothing else, README.md is the index."""
    from sync import problems

    found = problems()
    assert not found, "\n".join(found)


def test_nothing_by_hand_in_the_package() -> None:
    for path in modules():
        assert "AUTOGENERATED! DO NOT EDIT!" in path.read_text(encoding="utf-8"), name(path)
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.suffix == ".py", f"{name(path)} comes from no notebook"
        if path.name == "__init__.py":
            text = path.read_text(encoding="utf-8").strip()
            assert not text or text.startswith("__version__"), f"{name(path)} holds code"


def public(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and the public methods of its public classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{inside}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


def untyped(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> bool:
    """Whether a parameter (apart from self and cls) or the result has no type."""
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    plain = [*node.args.posonlyargs, *node.args.args][1 if method and not static else 0 :]
    stars = [a for a in (node.args.vararg, node.args.kwarg) if a]
    return node.returns is None or any(a.annotation is None for a in [*plain, *node.args.kwonlyargs, *stars])


def test_public_names_are_typed_and_documented() -> None:
    wrong = []
    for path in modules():
        for what, node in public(ast.parse(path.read_text(encoding="utf-8")).body):
            where = f"{name(path)}:{node.lineno} {what}"  # type: ignore[attr-defined]
            overload = any("overload" in ast.unparse(d) for d in getattr(node, "decorator_list", ()))
            inherits = what.endswith(".validate")  # the hook of Config, documented there
            if not ast.get_docstring(node) and not overload and not inherits:  # type: ignore[arg-type]
                wrong.append(f"{where} has no docstring")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and untyped(node, "." in what):
                wrong.append(f"{where} is not fully typed")
    assert not wrong, "\n".join(wrong)


JOBS = sorted((NBS / "jobs").glob("*.ipynb"))


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.stem)
def test_job_defaults_are_the_tiny_preset(path: Path) -> None:
    """What a job notebook shows as its defaults is what its config's `tiny` gives."""
    from llmkit.runner.inspect import config_class, parameters

    known, cls = parameters(path), config_class(path)
    assert cls is not None, f"{name(path)}: its parameters do not begin with '# config: module:Class'"
    values = cls.tiny().to_dict()
    assert set(known) == set(values), f"only one of both has {set(known) ^ set(values)}"
    assert {n: p.default for n, p in known.items()} == values
    quickstart = getattr(cls, "quickstart", None)
    assert quickstart is not None, f"{cls.__name__} has no quickstart preset"


BENCHES = sorted((NBS / "benchmarks").glob("[!0-9]*.ipynb"))  # the numbered ones hold what these are made of


@pytest.mark.parametrize("path", BENCHES, ids=lambda p: p.stem)
def test_benchmark_defaults_are_the_tiny_preset(path: Path) -> None:
    """A benchmark that is run as it is takes seconds, asks no peer, and its full preset is one too."""
    from llmkit.runner.inspect import config_class, parameters

    cls = config_class(path)
    assert cls is not None, f"{name(path)}: its parameters do not begin with '# config: module:Class'"
    assert {n: p.default for n, p in parameters(path).items()} == cls.tiny().to_dict()
    assert set(cls.full().to_dict()) == set(cls.tiny().to_dict())  # type: ignore[attr-defined]


def test_jobs_keep_no_outputs() -> None:
    kept = [name(path) for path in [*JOBS, *BENCHES] for cell in cells(path) if cell["outputs"]]
    assert not kept


MACHINE = re.compile(r"/(?:tmp|root|home|work|check)/\w|real_accelerator")  # a path of one machine, a line with a date


def test_outputs_hold_no_errors_and_nothing_of_a_machine() -> None:
    found = []
    for path in sorted(NBS.rglob("*.ipynb")):
        for output in (o for cell in cells(path) for o in cell.get("outputs", [])):
            pictures = {k: v for k, v in output.get("data", {}).items() if k.startswith("image/")}
            text = json.dumps(output | {"data": {k: v for k, v in output.get("data", {}).items() if k not in pictures}})
            if output["output_type"] == "error" or MACHINE.search(text):
                found.append((name(path), text[:200]))
    assert not found


def pins(path: str = "requirements.txt") -> dict[str, str]:
    """The lock, or another file of pins: version by normalized name."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    found = (re.fullmatch(r"([\w.\-]+)(?:\[[\w,]+\])?==(\S+)", line) for line in lines)
    return {normal(m[1]): m[2] for m in found if m}


def normal(requirement: str) -> str:
    """The package that a requirement names, as PyPI normalizes it."""
    bare = re.split(r"[\[<>=!~;]", requirement)[0]
    return re.sub(r"[-_.]+", "-", bare).lower()


def test_the_lock_is_exact_and_portable() -> None:
    lines = [x for x in (ROOT / "requirements.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert [x for x in lines if not re.fullmatch(r"[\w.\-]+==[\w.!]+", x)] == []
    assert pins()["torch"] == "2.13.0"


def test_the_lock_holds_every_extra_but_gpu() -> None:
    """`onnxruntime` and `onnxruntime-gpu` overwrite each other's files: no environment may get both."""
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    extras = {k: v.split() for k, v in ini["DEFAULT"].items() if k == "requirements" or k.endswith("_requirements")}
    gpu = {normal(r) for r in extras.pop("gpu_requirements")}
    assert "onnxruntime-gpu" in gpu
    assert "onnxruntime-gpu" not in pins() and "onnxruntime" in pins()
    wanted = {normal(r) for rs in extras.values() for r in rs}
    assert "onnxruntime-gpu" not in wanted
    assert wanted <= set(pins()), f"not in the lock: {wanted - set(pins())}"


def test_the_suites_of_others_stay_out_of_the_lock() -> None:
    """They bring some sixty packages; what both environments compute with is the same version in both."""
    peers, lock = pins("tests/peers/requirements.txt"), pins()
    assert {"schemathesis", "langchain-openai", "langchain-tests"} <= set(peers) - set(lock)
    both = ("torch", "transformers", "lm-eval")
    assert {n: peers[n] for n in both} == {n: lock[n] for n in both}
