"""A log of every connection that Python opens, here and in the processes that the plane starts."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

# Put before other code of every Python process through PYTHONPATH: an audit hook cannot be taken out again.
HOOK = '''"""Writes down every address that this process connects to or looks up."""
import os, sys

def _watch(path):
    try:
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError:
        return  # a process in a jail of its own can neither write nor connect
    def hook(event, args):
        if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
            where = args[1] if event in ("socket.connect", "socket.sendto") else args[0]
            host = where[0] if isinstance(where, tuple) else where
            try:
                os.write(log, f"{os.getpid()}\\t{event}\\t{host!r}\\n".encode())
            except OSError:
                pass
    sys.addaudithook(hook)

if os.environ.get("LLMKIT_WIRE"):
    _watch(os.environ["LLMKIT_WIRE"])
'''
_watched: list[Path] = []


class Wire:
    """The log of one plane."""

    def __init__(self, home: Path) -> None:
        self.path, self.folder = home / "wire.log", home / "wire"
        self.folder.mkdir()
        (self.folder / "sitecustomize.py").write_text(HOOK)
        self.path.touch()
        _watched.append(self.path)
        if len(_watched) == 1:
            sys.addaudithook(_note)

    def variables(self) -> dict[str, str]:
        """What makes a Python process write to the log."""
        others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        return {"LLMKIT_WIRE": str(self.path), "PYTHONPATH": os.pathsep.join([str(self.folder), *others])}

    def lines(self) -> list[tuple[str, str]]:
        """What was connected to or looked up: event and host."""
        rows = [line.split("\t") for line in self.path.read_text().splitlines()]
        return [(row[1], row[2].strip("'\"")) for row in rows if len(row) == 3]

    def foreign(self) -> list[tuple[str, str]]:
        """What of it was not this machine."""
        here = {"localhost", "None", "", "::1", "0.0.0.0", "::", socket.gethostname()}
        return [
            (e, h)
            for e, h in self.lines()
            if h not in here and not h.startswith(("127.", "/", "b'", "\\x00")) and not h.isdigit()
        ]

    def forget(self) -> None:
        """Begin anew, after what was meant to be noticed."""
        self.path.write_text("")

    def close(self) -> None:
        """Stop writing for this plane."""
        _watched.remove(self.path)
        _watched.append(Path(os.devnull))  # the hook stays


def _note(event: str, args: tuple[object, ...]) -> None:
    """The audit hook of the plane's own process."""
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        where = args[1] if event in ("socket.connect", "socket.sendto") else args[0]
        host = where[0] if isinstance(where, tuple) else where
        for path in _watched:
            if path.parent.exists():
                with path.open("a") as log:
                    log.write(f"{os.getpid()}\t{event}\t{host!r}\n")
