"""Resources by their ARM path, long operations that take time, and reads that are not up to date yet."""

from __future__ import annotations

import copy
import datetime as dt
import threading
import time
import uuid
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

from .web import ArmError, Reply, Request

Resource = dict[str, Any]
BUSY = ("Creating", "Updating", "Deleting", "Provisioning")


def now() -> str:
    """The time as Azure writes it."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f0Z")


class Store:
    """The state of the plane: a resource is `{id, name, type, properties, ...}`."""

    def __init__(self, root: str, delay: float) -> None:
        self.root = root  # the ARM id of the workspace
        self.delay = delay  # seconds that a long operation takes
        self.lag: list[tuple[str, float]] = []  # path pattern -> seconds until a change can be read
        self.lock = threading.RLock()
        self.items: dict[str, Resource] = {}
        self.old: dict[str, tuple[float, Resource | None]] = {}  # path -> until when this is what one reads
        self.operations: dict[str, dict[str, Any]] = {}
        self.threads: list[threading.Thread] = []
        self.closed = threading.Event()

    def id(self, path: str) -> str:
        """The ARM id of a path in the workspace."""
        return self.root + path

    def put(self, path: str, properties: dict[str, Any], **more: Any) -> Resource:
        """Create or replace a resource."""
        with self.lock:
            before = self.items.get(path.lower())
            kinds = path.strip("/").split("/")[0::2]
            made = before["systemData"]["createdAt"] if before else now()
            data = {"createdAt": made, "createdBy": "somebody", "createdByType": "User", "lastModifiedAt": now()}
            head = {"id": self.id(path), "name": path.rsplit("/", 1)[1], "systemData": data}
            kind = "Microsoft.MachineLearningServices/workspaces/" + "/".join(kinds)
            item = head | {"type": kind, "properties": properties} | more
            self.stale(path, before)
            self.items[path.lower()] = item
            return item

    def stale(self, path: str, before: Resource | None) -> None:
        """Remember what reads will see for a while, if the plane is told to be behind."""
        wait = max((s for pattern, s in self.lag if fnmatch(path.lower(), pattern.lower())), default=0.0)
        if wait and path.lower() not in self.old:
            self.old[path.lower()] = (time.monotonic() + wait, copy.deepcopy(before))

    def find(self, path: str) -> Resource | None:
        """The resource as it is."""
        return self.items.get(path.lower())

    def get(self, path: str) -> Resource:
        """The resource as it is, or 404."""
        found = self.find(path)
        if found is None:
            raise missing(path)
        return found

    def read(self, path: str) -> Resource:
        """The resource as a client may see it: perhaps as it was a moment ago."""
        with self.lock:
            until, before = self.old.get(path.lower(), (0.0, None))
            if until > time.monotonic():
                if before is None:
                    raise missing(path)
                return before
            self.old.pop(path.lower(), None)
            return copy.deepcopy(self.get(path))

    def under(self, path: str) -> list[Resource]:
        """The resources one level below a path, oldest first."""
        with self.lock:
            depth, start = path.count("/") + 1, path.lower() + "/"
            return [copy.deepcopy(r) for p, r in self.items.items() if p.startswith(start) and p.count("/") == depth]

    def delete(self, path: str) -> None:
        """Remove a resource and what is below it."""
        with self.lock:
            for key in [p for p in self.items if p == path.lower() or p.startswith(path.lower() + "/")]:
                self.stale(key, self.items.pop(key))

    def idle(self, path: str) -> None:
        """409 while a resource is being changed."""
        found = self.find(path)
        state = found["properties"].get("provisioningState") if found else None
        if state in BUSY:
            text = f"The resource {path} is in state {state}; wait until the running operation has finished."
            raise ArmError(409, "ResourceOperationInProgress", text)

    def background(self, work: Callable[[], None], name: str) -> None:
        """Run something in a thread that `close` waits for."""
        thread = threading.Thread(target=work, name=name, daemon=True)
        self.threads = [t for t in self.threads if t.is_alive()] + [thread]
        thread.start()

    def begin(self, request: Request, path: str, state: str, work: Callable[[], None], status: int = 0) -> Reply:
        """Start a long operation on a resource: 201, 200 or 202 and the address where it can be asked for."""
        name = str(uuid.uuid4())
        operation = {"id": name, "name": name, "status": "InProgress", "startTime": now()}
        self.operations[name] = operation
        item = self.find(path)
        if item is not None:
            item["properties"]["provisioningState"] = state

        def run() -> None:
            self.closed.wait(self.delay)
            try:
                work()
                done = self.find(path)
                if done is not None:
                    done["properties"]["provisioningState"] = "Succeeded"
                operation.update(status="Succeeded", endTime=now())
            except ArmError as e:
                done = self.find(path)
                if done is not None:
                    done["properties"]["provisioningState"] = "Failed"
                operation.update(status="Failed", endTime=now(), error={"code": e.code, "message": e.message})

        where = request.base + self.root.split("/resourceGroups")[0]
        where += f"/providers/Microsoft.MachineLearningServices/locations/westeurope/%s/{name}?api-version=2024-10-01"
        headers = {"Azure-AsyncOperation": where % "mfeOperationsStatus", "x-ms-retry-after-ms": "100"}
        headers |= {"Location": where % "mfeOperationResults", "x-ms-async-operation-timeout": "PT1H"}
        body = copy.deepcopy(item) if status != 202 else None
        self.background(run, f"operation {path}")
        return Reply(status or (201 if state == "Creating" else 200), body, headers)

    def operation(self, request: Request, name: str) -> Reply:
        """Where a long operation stands."""
        if name not in self.operations:
            raise ArmError(404, "NotFound", f"no operation {name}")
        return Reply(200, self.operations[name], {"x-ms-retry-after-ms": "100"})

    def result(self, request: Request, name: str) -> Reply:
        """202 until a long operation has ended."""
        running = self.operation(request, name).body["status"] == "InProgress"
        return Reply(202 if running else 200, None, {"x-ms-retry-after-ms": "100"} if running else {})

    def close(self) -> None:
        """End waits and operations."""
        self.closed.set()
        for thread in self.threads:
            thread.join(10)


def missing(path: str) -> ArmError:
    """404 as Azure Machine Learning says it."""
    return ArmError(404, "ResourceNotFound", f"The resource '{path.lstrip('/')}' was not found in the workspace.")


def page(request: Request, items: list[Resource], size: int = 100) -> Reply:
    """One page of a list, and the address of the next."""
    begin = int(request.query.get("$skip") or 0)
    body: dict[str, Any] = {"value": items[begin : begin + size]}
    if begin + size < len(items):
        path, _, query = request.target.partition("?")
        kept = [part for part in query.split("&") if not part.lower().startswith(("$skip=", "%24skip="))]
        body["nextLink"] = f"{request.base}{path}?{'&'.join([*kept, f'$skip={begin + size}'])}"
    return Reply(200, body)
