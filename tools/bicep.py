#!/usr/bin/env python
"""Walk the symbols of Bicep files: what is used must exist, what a module wants must be given, what is declared used.

There is no Bicep compiler on the package registries. This is no parser either (`make declarations` runs one): it reads
words, knows which of them are names, and follows them through the files of azure/infra.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = """
any array base64 cidrHost cidrSubnet concat contains deployment empty endsWith environment first guid int items join
json last length loadJsonContent loadTextContent loadYamlContent max min newGuid padLeft range replace resourceGroup
resourceId skip split startsWith string subscription subscriptionResourceId substring take tenant toLower toUpper trim
union uniqueString utcNow
"""
KEYWORDS = "true false null for in if existing object array string int bool targetScope using"
DECORATORS = "description allowed minLength maxLength minValue maxValue secure batchSize metadata"
TOKEN = re.compile(
    r"(?P<skip>//[^\n]*|/\*.*?\*/|[ \t]+)|(?P<line>\n\s*)|(?P<word>[A-Za-z_]\w*)|(?P<number>\d+)"
    r"|(?P<string>'(?:[^'\\\n]|\\.)*')|(?P<mark>.)",
    re.S,
)
DECLARED = re.compile(r"^(param|var|resource|module|output)\s+(\w+)\s*([^\n]*)", re.M)


@dataclass
class Bicep:
    """One file: what it declares and what it uses."""

    path: Path
    text: str
    kinds: dict[str, str] = field(default_factory=dict)  # param, var, resource or module by name
    required: set[str] = field(default_factory=set)  # parameters without a default
    outputs: set[str] = field(default_factory=set)
    modules: dict[str, tuple[str, set[str]]] = field(default_factory=dict)  # file and given parameters by name
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def say(self, what: str) -> None:
        """Note a problem."""
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path.name
        self.problems.append(f"{path}: {what}")


def tokens(text: str) -> list[tuple[str, str]]:
    """Kind and text of the words, strings and marks; an interpolated string gives what stands between its braces."""
    found: list[tuple[str, str]] = []
    for match in TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind == "string":
            found.append(("string", match[0]))
            for inner in re.findall(r"\$\{([^}]*)\}", match[0]):
                found += [("mark", "("), *tokens(inner), ("mark", ")")]
        elif kind != "skip":
            found.append((kind, match[0]))
    return found


def block(text: str, start: int) -> str:
    """What stands between the first brace from `start` on and the one that closes it."""
    depth, begin = 0, text.index("{", start)
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin + 1 : i]
    return text[begin + 1 :]


def keys(text: str) -> set[str]:
    """The keys of an object's own level."""
    depth, found = 0, set()
    for line in text.splitlines():
        key = re.match(r"\s*(\w+):", line)
        if depth == 0 and key:
            found.add(key[1])
        bare = re.sub(r"'(?:[^'\\]|\\.)*'", "", line)
        depth += sum(bare.count(c) for c in "{[(") - sum(bare.count(c) for c in "}])")
    return found


def read(path: Path) -> Bicep:
    """Declarations of a file, and every name that it uses."""
    file = Bicep(path, path.read_text(encoding="utf-8"))
    for found in DECLARED.finditer(file.text):
        kind, name, rest = found.groups()
        if kind == "output":
            file.outputs.add(name)
            continue
        if name in file.kinds:
            file.say(f"{name} is declared twice")
        file.kinds[name] = kind
        if kind == "param" and "=" not in rest:
            file.required.add(name)
        if kind == "module":
            body = block(file.text, found.end() - (1 if rest.endswith("{") else 0))
            given = re.search(r"^\s*params:\s*\{", body, re.M)
            file.modules[name] = (rest.split("'")[1], keys(block(body, given.start())) if given else set())
    names(file)
    return file


def names(file: Bicep) -> None:
    """Fill in which names a file uses; unknown ones are problems."""
    listed, loops = tokens(file.text), set(re.findall(r"\bfor\s+\(?(\w+)", file.text))
    loops |= set(re.findall(r"\bfor\s+\(\w+,\s*(\w+)\)", file.text))
    for i, (kind, word) in enumerate(listed):
        before = listed[i - 1] if i else ("line", "\n")
        after = listed[i + 1] if i + 1 < len(listed) else ("line", "\n")
        if kind != "word" or word in KEYWORDS.split() or before[1] == ".":
            continue
        if before[0] == "line" and (after[1] == ":" or word in ("param", "var", "resource", "module", "output")):
            continue  # the key of an object, or a declaration
        if before[1] in ("param", "var", "resource", "module", "output"):
            continue  # the name that it declares
        if before[1] == "@":
            if word not in DECORATORS.split():
                file.say(f"there is no decorator @{word}")
        elif after[1] == "(" and after[0] == "mark":
            if word not in FUNCTIONS.split():
                file.say(f"there is no function {word}()")
        elif word in file.kinds:
            file.used.add(word)
        elif word not in loops:
            file.say(f"{word} is declared nowhere")


def walk(path: Path, seen: dict[Path, Bicep] | None = None) -> dict[Path, Bicep]:
    """A file and all modules below it, checked against each other."""
    seen = {} if seen is None else seen
    if path in seen:
        return seen
    file = seen[path] = read(path)
    for name in sorted(file.kinds):
        if file.kinds[name] in ("param", "var") and name not in file.used:
            file.say(f"{file.kinds[name]} {name} is used nowhere")
    for name, (target, given) in file.modules.items():
        below = (path.parent / target).resolve()
        if not below.is_file():
            file.say(f"module {name} is {target}, which does not exist")
            continue
        module = walk(below, seen)[below]
        params = {n for n, kind in module.kinds.items() if kind == "param"}
        for wrong in sorted(given - params):
            file.say(f"module {name} has no parameter {wrong}")
        for missing in sorted(module.required - given):
            file.say(f"module {name} lacks its parameter {missing}")
        for output in sorted(set(re.findall(rf"\b{name}\.outputs\.(\w+)", file.text)) - module.outputs):
            file.say(f"module {name} has no output {output}")
    for target in re.findall(r"load\w+Content\('([^']+)'\)", file.text):
        if not (path.parent / target).is_file():
            file.say(f"{target} does not exist")
    return seen


def check_parameters(path: Path) -> list[str]:
    """What is wrong with a .bicepparam file: its template, names that it lacks, names that are not there."""
    text = path.read_text(encoding="utf-8")
    using = re.search(r"^using\s+'([^']+)'", text, re.M)
    template = path.parent / using[1] if using else path.parent / "?"
    if not template.is_file():
        return [f"{path.name}: `using` names no template that exists"]
    file, given = read(template.resolve()), set(re.findall(r"^param\s+(\w+)\s*=", text, re.M))
    params = {n for n, kind in file.kinds.items() if kind == "param"}
    wrong = [f"{path.name}: {template.name} has no parameter {n}" for n in sorted(given - params)]
    return wrong + [f"{path.name}: {n} is not given and has no default" for n in sorted(file.required - given)]


def problems(folder: Path) -> list[str]:
    """Everything wrong in the templates and parameter files of a folder, modules that nothing uses included."""
    seen: dict[Path, Bicep] = {}
    for path in sorted(folder.glob("*.bicep")):
        walk(path.resolve(), seen)
    found = [line for file in seen.values() for line in file.problems]
    unused = [p for p in sorted(folder.rglob("*.bicep")) if p.resolve() not in seen]
    found += [f"{p.name}: no template uses this module" for p in unused]
    return found + [line for path in sorted(folder.glob("*.bicepparam")) for line in check_parameters(path)]


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "azure" / "infra")
    print("\n".join(wrong) or "every symbol exists and is used")
    sys.exit(bool(wrong))
