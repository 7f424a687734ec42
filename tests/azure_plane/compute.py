"""Clusters: made, changed, listed and removed, in minutes that pass quickly; and the nodes that jobs take."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any

from .limits import QUOTA, bad, check_name, check_size, check_tags, seconds
from .store import missing, page
from .web import ArmError, Reply, Request

if TYPE_CHECKING:
    from .plane import Plane


class Computes:
    """The computes of the workspace."""

    def __init__(self, plane: Plane) -> None:
        self.plane, self.store = plane, plane.store
        self.free = threading.Condition()
        self.taken: dict[str, int] = {}  # nodes of each cluster that run jobs

    def routes(self) -> None:
        """What is answered."""
        self.plane.on("GET", "/computes", self.list)
        self.plane.on("GET", "/computes/{name}", self.get)
        self.plane.on("PUT", "/computes/{name}", self.put)
        self.plane.on("PATCH", "/computes/{name}", self.patch)
        self.plane.on("DELETE", "/computes/{name}", self.delete)
        self.plane.on("POST", "/computes/{name}/listNodes", self.nodes)
        where = "/subscriptions/{subscription}/providers/Microsoft.MachineLearningServices/locations/{region}"
        self.plane.router.add("GET", f"{where}/usages", self.usages)

    def list(self, request: Request) -> Reply:
        """All computes."""
        return page(request, self.store.under("/computes"))

    def get(self, request: Request, name: str) -> Reply:
        """One compute."""
        found = self.store.read(f"/computes/{name}")
        inner = found["properties"]["properties"]
        inner["currentNodeCount"] = self.taken.get(name.lower(), 0) or inner["scaleSettings"]["minNodeCount"]
        return Reply(200, found)

    def put(self, request: Request, name: str) -> Reply:
        """Create a cluster, or change its scale and identity."""
        check_name("compute", name)
        body, path = request.json, f"/computes/{name}"
        check_tags(body.get("tags"))
        properties = body.get("properties") or {}
        if properties.get("computeType") != "AmlCompute":
            raise bad(f"compute type {properties.get('computeType')} is not offered here")
        inner = properties.setdefault("properties", {})
        self.check(name, inner)
        self.store.idle(path)
        before = self.store.find(path)
        if before:
            old = before["properties"]["properties"]
            for field in ("vmSize", "vmPriority", "subnet", "enableNodePublicIp"):
                if old.get(field) != inner.get(field):
                    raise bad(f"{field} of compute {name} cannot be changed; delete it first", "ComputeImmutable")
        inner |= {"currentNodeCount": 0, "targetNodeCount": 0, "allocationState": "Steady", "errors": None}
        properties |= {"provisioningState": "Creating", "isAttachedCompute": False, "provisioningErrors": None}
        properties |= {"computeLocation": body.get("location"), "createdOn": self.plane.began}
        more = {key: body.get(key) for key in ("location", "tags", "identity")}
        self.store.put(path, properties, **more)
        return self.store.begin(request, path, "Updating" if before else "Creating", lambda: None)

    def check(self, name: str, inner: dict[str, Any]) -> None:
        """Size, priority, scale and quota."""
        _, cpus = check_size(inner.get("vmSize"))
        if inner.get("vmPriority") not in ("Dedicated", "LowPriority", None):
            raise bad(f"vmPriority '{inner['vmPriority']}' is not Dedicated or LowPriority")
        scale = inner.get("scaleSettings") or {}
        least, most = scale.get("minNodeCount") or 0, scale.get("maxNodeCount")
        if not isinstance(most, int) or most < 1 or least < 0 or least > most:
            raise bad(f"scale settings: {least} to {most} nodes is no range", "InvalidScaleSettings")
        if scale.get("nodeIdleTimeBeforeScaleDown"):
            seconds(scale["nodeIdleTimeBeforeScaleDown"])
        used = sum(self.cpus(r) for r in self.store.under("/computes") if r["name"].lower() != name.lower())
        if used + cpus * most > min(QUOTA, self.plane.quota):
            text = f"{cpus * most} vCPUs exceed what is left of the quota ({self.plane.quota - used})"
            raise ArmError(400, "ClusterCoreQuotaReached", f"{text} for VM family of {inner['vmSize']} in westeurope.")

    def cpus(self, resource: dict[str, Any]) -> int:
        """vCPUs of a cluster at its largest."""
        inner = resource["properties"]["properties"]
        return check_size(inner["vmSize"])[1] * inner["scaleSettings"]["maxNodeCount"]

    def patch(self, request: Request, name: str) -> Reply:
        """Change the scale settings."""
        found = self.store.get(f"/computes/{name}")
        self.store.idle(f"/computes/{name}")
        inner = found["properties"]["properties"]
        wanted = (request.json.get("properties") or {}).get("properties") or {}
        self.check(name, inner | wanted)
        inner["scaleSettings"] |= wanted.get("scaleSettings") or {}
        return self.store.begin(request, f"/computes/{name}", "Updating", lambda: None)

    def delete(self, request: Request, name: str) -> Reply:
        """Remove a cluster that runs nothing."""
        path = f"/computes/{name}"
        if self.store.find(path) is None:
            return Reply(204)
        self.store.idle(path)
        if self.taken.get(name.lower()):
            raise ArmError(409, "ComputeInUse", f"compute {name} runs jobs")
        return self.store.begin(request, path, "Deleting", lambda: self.store.delete(path), 202)

    def nodes(self, request: Request, name: str) -> Reply:
        """The nodes that are up."""
        self.store.get(f"/computes/{name}")
        node = {
            "privateIpAddress": "127.0.0.1",
            "publicIpAddress": None,
            "port": 0,
            "runId": None,
            "nodeState": "running",
        }
        return Reply(200, {"nodes": [node | {"nodeId": f"node-{i}"} for i in range(self.taken.get(name.lower(), 0))]})

    def usages(self, request: Request, **where: str) -> Reply:
        """How much of the quota is used."""
        used = sum(self.cpus(r) for r in self.store.under("/computes"))
        name = {"value": "Total Cluster Dedicated Regional vCPUs", "localizedValue": "Total dedicated vCPUs"}
        row = {"currentValue": used, "limit": self.plane.quota, "unit": "Count", "name": name}
        return Reply(200, {"value": [row | {"id": "usages/total", "type": "Usages"}]})

    def name(self, reference: str | None) -> str:
        """The name in a compute's ARM id or reference; empty for serverless."""
        found = re.search(r"(?:/computes/|azureml:)([^/:]+)$", reference or "") or re.fullmatch(
            "([^/:]+)", reference or ""
        )
        return "" if not reference or not found or found[1].lower() == "serverless" else found[1]

    def most(self, name: str) -> int:
        """Nodes that a cluster can have."""
        found = self.store.find(f"/computes/{name}")
        if found is None:
            raise missing(f"/computes/{name}")
        if found["properties"]["provisioningState"] in ("Failed", "Deleting"):
            raise ArmError(409, "ComputeNotReady", f"compute {name} is {found['properties']['provisioningState']}")
        return int(found["properties"]["properties"]["scaleSettings"]["maxNodeCount"])

    def take(self, name: str, nodes: int, stop: threading.Event) -> bool:
        """Wait for nodes of a cluster; false if the job was ended meanwhile."""
        with self.free:
            while not stop.is_set() and not self.store.closed.is_set():
                if not name or self.taken.get(name.lower(), 0) + nodes <= self.most(name):
                    self.taken[name.lower()] = self.taken.get(name.lower(), 0) + nodes
                    return True
                self.free.wait(0.1)
        return False

    def give(self, name: str, nodes: int) -> None:
        """Give nodes back."""
        with self.free:
            self.taken[name.lower()] -= nodes
            self.free.notify_all()
