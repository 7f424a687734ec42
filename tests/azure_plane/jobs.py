"""Jobs: submitted, looked at, listed, cancelled. A name is taken once; what is submitted under it stays."""

from __future__ import annotations

import copy
import uuid
from typing import TYPE_CHECKING, Any

from . import bindings, limits
from .executor import TERMINAL
from .limits import bad, check_name, check_shm, check_size, check_tags, seconds
from .store import Resource, now, page
from .web import ArmError, Reply, Request

if TYPE_CHECKING:
    from .plane import Plane

FREE = ("description", "displayName", "tags", "properties", "isArchived", "services", "status", "parentJobName")
DISTRIBUTIONS = ("PyTorch", "TensorFlow", "Mpi")


class Jobs:
    """The jobs of the workspace."""

    def __init__(self, plane: Plane) -> None:
        self.plane, self.store = plane, plane.store
        self.sent: dict[str, dict[str, Any]] = {}  # what was submitted, by name
        self.history: dict[str, list[str]] = {}  # the states that a job has been in
        self.errors: dict[str, str | None] = {}
        self.children: dict[str, list[str]] = {}

    def routes(self) -> None:
        """What is answered."""
        self.plane.on("GET", "/jobs", self.list)
        self.plane.on("GET", "/jobs/{name}", self.get)
        self.plane.on("PUT", "/jobs/{name}", self.put)
        self.plane.on("DELETE", "/jobs/{name}", self.delete)
        self.plane.on("POST", "/jobs/{name}/cancel", self.cancel)

    def list(self, request: Request) -> Reply:
        """Jobs without a parent, newest first."""
        asked, view = request.query, request.query.get("listviewtype", "ActiveOnly")
        found = []
        for job in reversed(self.store.under("/jobs")):
            properties = job["properties"]
            tag, _, value = asked.get("tag", "").partition("=")
            wrong = tag and (tag not in properties["tags"] or (value and properties["tags"][tag] != value))
            wrong = wrong or properties.get("parentJobName")
            wrong = wrong or (asked.get("jobtype") and asked["jobtype"] != properties["jobType"])
            wrong = wrong or (view != "All" and properties["isArchived"] != (view == "ArchivedOnly"))
            if not wrong:
                found.append(job)
        return page(request, found)

    def get(self, request: Request, name: str) -> Reply:
        """One job."""
        return Reply(200, self.store.read(f"/jobs/{name}"))

    def put(self, request: Request, name: str) -> Reply:
        """Submit a job, or change what may change of one that exists."""
        check_name("job", name)
        properties = request.json.get("properties")
        if not isinstance(properties, dict):
            raise bad("properties are missing")
        check_tags(properties.get("tags"))
        with self.store.lock:
            if self.store.find(f"/jobs/{name}"):
                return self.change(name, properties)
            self.check(properties)
            made = self.create(name, properties)
        if properties["jobType"] == "Command":
            self.plane.executor.start(name)
        else:
            self.plane.composite.start(name)
        return Reply(201, copy.deepcopy(made))

    def change(self, name: str, properties: dict[str, Any]) -> Reply:
        """A second PUT under a name."""
        before, job = self.sent[name], self.store.get(f"/jobs/{name}")
        for field in set(before) | set(properties):
            if field not in FREE and plain(before.get(field)) != plain(properties.get(field)):
                text = (
                    "A job with this name already exists. If you are trying to create a new job, use a different name. "
                    f"If you are trying to update an existing job, the existing job's {field} cannot be changed. "
                    "Only description, displayName, tags, properties, and isArchived can be updated."
                )
                raise ArmError(400, "UserError", text)
        for field in ("description", "displayName", "tags", "properties", "isArchived"):
            if properties.get(field) is not None:
                old = job["properties"].get(field)
                both = isinstance(old, dict) and field == "properties"
                job["properties"][field] = {**old, **properties[field]} if both else properties[field]
        return Reply(200, copy.deepcopy(job))

    def create(self, name: str, properties: dict[str, Any], parent: str = "") -> Resource:
        """The resource of a new job."""
        self.sent[name] = copy.deepcopy(properties)
        self.history[name] = ["NotStarted"]
        studio = f"{self.plane.url}/studio/runs/{name}"
        services = {
            "Tracking": {
                "jobServiceType": "Tracking",
                "endpoint": self.plane.tracking.uri,
                "status": None,
                "port": None,
            },
            "Studio": {"jobServiceType": "Studio", "endpoint": studio, "status": None, "port": None},
        }
        base = {
            "experimentName": "Default",
            "description": None,
            "tags": {},
            "isArchived": False,
            "inputs": {},
            "outputs": {},
        }
        base |= {k: v for k, v in properties.items() if v is not None}
        base |= {"displayName": properties.get("displayName") or name, "status": "Starting", "services": services}
        base["properties"] = {"ContentSnapshotId": str(uuid.uuid4())} | (properties.get("properties") or {})
        if properties.get("computeId"):
            base["computeId"] = self.compute_id(properties["computeId"])
        if parent:
            base |= {"parentJobName": parent}
            base["properties"]["azureml.parentRunId"] = parent
            self.children.setdefault(parent, []).append(name)
        return self.store.put(f"/jobs/{name}", base)

    def compute_id(self, reference: str) -> str:
        """The ARM id of a job's compute."""
        name = self.plane.computes.name(reference)
        return f"{self.plane.root}/computes/{name}" if name else "serverless"

    def check(self, properties: dict[str, Any]) -> None:
        """Refuse what the service refuses."""
        kind = properties.get("jobType")
        if kind == "Command":
            self.check_command(properties)
        elif kind in ("Pipeline", "Sweep"):
            self.plane.composite.check(properties)
        else:
            raise bad(f"jobs of type {kind} are not offered here")

    def check_command(self, properties: dict[str, Any]) -> None:
        """A command with code, an environment, and a compute that are there."""
        if not str(properties.get("command") or "").strip():
            raise bad("the command is empty")
        if len(properties["command"]) > limits.COMMAND:
            raise bad(f"the command has more than {limits.COMMAND} characters")
        bindings.check(properties)
        self.check_place(properties)
        distribution = properties.get("distribution") or {}
        if distribution and distribution.get("distributionType") not in DISTRIBUTIONS:
            raise bad(f"distribution type {distribution.get('distributionType')} is none of {', '.join(DISTRIBUTIONS)}")
        if int(distribution.get("processCountPerInstance") or 1) < 1:
            raise bad("processCountPerInstance must be at least 1")
        seconds((properties.get("limits") or {}).get("timeout"))
        for name, given in (properties.get("inputs") or {}).items():
            if (
                given
                and given.get("jobInputType") != "literal"
                and given["uri"].startswith(("azureml:", "/subscriptions"))
            ):
                bindings.resolve(self.plane, given["uri"])
            if not name.isidentifier():
                raise bad(f"input name '{name}' is invalid", "InvalidName")

    def check_place(self, properties: dict[str, Any]) -> None:
        """Environment, code, compute and the number of nodes."""
        environment = properties.get("environmentId")
        if not str(environment).startswith("azureml://registries/"):
            self.plane.assets.find(environment, "environments")
        if properties.get("codeId"):
            self.plane.assets.find(properties["codeId"], "codes")
        resources = properties.get("resources") or {}
        check_shm(resources.get("shmSize"))
        count = resources.get("instanceCount", 1)
        if not isinstance(count, int) or not 1 <= count <= limits.NODES:
            raise bad(f"instanceCount {count} must be from 1 to {limits.NODES}", "InvalidInstanceCount")
        name = self.plane.computes.name(properties.get("computeId"))
        if not name:
            check_size(resources.get("instanceType") or "STANDARD_DS3_V2")
        elif count > (most := self.plane.computes.most(name)):
            text = f"The job asks for {count} nodes, and compute '{name}' has at most {most}."
            raise bad(text, "NodeCountExceedsCluster")

    def status(self, name: str, status: str, error: str | None = None) -> None:
        """Say where a job stands."""
        job = self.store.get(f"/jobs/{name}")
        job["properties"]["status"] = status
        job["systemData"]["lastModifiedAt"] = now()
        if status == "Running":
            job["properties"]["properties"].setdefault("StartTimeUtc", now())
        if status in TERMINAL:
            job["properties"]["properties"]["EndTimeUtc"] = now()
        self.history[name].append(status)
        self.errors[name] = error

    def cancel(self, request: Request, name: str) -> Reply:
        """End a job and its children; nothing happens to one that has ended."""
        job = self.store.get(f"/jobs/{name}")
        if job["properties"]["status"] in TERMINAL:
            return Reply(200)
        job["properties"]["status"] = "CancelRequested"
        for each in (name, *self.children.get(name, ())):
            self.plane.executor.cancel(each)
        self.plane.composite.cancel(name)
        return self.store.begin(request, f"/no/{name}", "", lambda: None, 202)

    def delete(self, request: Request, name: str) -> Reply:
        """Remove a job that has ended."""
        job = self.store.get(f"/jobs/{name}")
        if job["properties"]["status"] not in TERMINAL:
            raise ArmError(409, "JobRunning", f"job {name} is {job['properties']['status']}; cancel it first")
        return self.store.begin(request, f"/no/{name}", "", lambda: self.store.delete(f"/jobs/{name}"), 202)


def plain(value: Any) -> Any:
    """A submitted value without what may differ though it means the same: prefixes, empty fields."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if plain(v) not in (None, {}, "")}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, str) and ("/subscriptions/" in value or value.startswith("azureml:")):
        return (
            value.removeprefix("azureml:").lower().rsplit("/", 1)[-1]
            if "/computes/" in value
            else value.removeprefix("azureml:")
        )
    return value
