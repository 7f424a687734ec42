"""What goes wrong, on demand: each fault says which requests it meets and how."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from .web import ArmError, Dropped, Reply, Request

CODES = {429: "TooManyRequests", 500: "InternalServerError", 502: "BadGateway", 503: "ServerBusy", 409: "Conflict"}


@dataclass
class Fault:
    """A failure that is answered in place of, or after, the work.

    `status=0` cuts the connection. With `applied` the work is done and only its answer is lost: what a client sees
    when the network, or the client itself, dies between the two.
    """

    path: str = "*"  # pattern of the path, e.g. */jobs/*
    method: str = "*"
    status: int = 503
    times: int | None = 1  # requests that it meets; None: all, until it is cleared or `seconds` are over
    after: int = 0  # requests that it lets through before
    seconds: float | None = None  # how long it lasts, from its first request on
    retry_after: float | None = None  # in the answer
    delay: float = 0.0  # seconds before the answer; with status 200 that is all it does
    applied: bool = False
    code: str = ""
    message: str = "This failure was asked for."
    seen: int = field(default=0, init=False)
    hit: int = field(default=0, init=False)
    since: float | None = field(default=None, init=False)

    def meets(self, request: Request) -> bool:
        """Whether it is this request's turn."""
        if self.method not in ("*", request.method) or not fnmatch(request.path.lower(), self.path.lower()):
            return False
        self.seen += 1
        if self.seen <= self.after or (self.times is not None and self.hit >= self.times):
            return False
        self.since = self.since or time.monotonic()
        if self.seconds is not None and time.monotonic() - self.since > self.seconds:
            return False
        self.hit += 1
        return True

    def happen(self) -> Reply:
        """The failure itself."""
        if not self.status:
            raise Dropped
        headers = {} if self.retry_after is None else {"Retry_After": f"{self.retry_after:g}"}
        raise ArmError(self.status, self.code or CODES.get(self.status, "Failed"), self.message, **headers)


class Faults:
    """The faults of a plane, and the log of what it was asked."""

    def __init__(self) -> None:
        self.active: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []  # method, path, status
        self.lock = threading.Lock()
        self.count = itertools.count(1)

    def add(self, fault: Fault | None = None, **options: Any) -> Fault:
        """Switch a fault on."""
        fault = fault or Fault(**options)
        with self.lock:
            self.active.append(fault)
        return fault

    def clear(self) -> None:
        """Switch all faults off."""
        with self.lock:
            self.active.clear()

    def next(self, request: Request) -> Fault | None:
        """The first fault that meets a request."""
        with self.lock:
            return next((f for f in self.active if f.meets(request)), None)

    def note(self, request: Request, status: int) -> None:
        """Write a request down."""
        with self.lock:
            self.log.append((request.method, request.path, status))

    def calls(self, method: str, pattern: str) -> list[int]:
        """The statuses that were given to requests of this kind, in order."""
        with self.lock:
            return [s for m, p, s in self.log if m == method and fnmatch(p.lower(), pattern.lower())]
