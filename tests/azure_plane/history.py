"""The data plane: run history, where logs are, and where outputs lie."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from . import bindings
from .executor import TERMINAL
from .web import ArmError, Reply, Request

if TYPE_CHECKING:
    from .plane import Plane


class History:
    """What `jobs.stream`, `jobs.download` and `jobs.list(parent)` ask for."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane

    def routes(self) -> None:
        """What is answered."""
        at, data = f"/history/v1.0{self.plane.root}", f"/data/v1.0{self.plane.root}"
        on = self.plane.router.add
        on("GET", f"{at}/runs/{{name}}", self.get)
        on("GET", f"{at}/runs/{{name}}/details", self.details)
        on("GET", f"{at}/runs/{{name}}/children", self.children)
        on("GET", f"{at}/experiments/{{experiment}}/runs/{{name}}", self.get)
        on("PATCH", f"{at}/experiments/{{experiment}}/runs/{{name}}", self.patch)
        on("POST", f"{at}/rundata", self.data)
        on("POST", f"{data}/dataversion/batchGetResolvedUris", self.data_uris)
        on("POST", f"/modelregistry/v1.0{self.plane.root}/models/batchGetResolvedUris", self.model_uris)

    def describe(self, name: str) -> dict[str, Any]:
        """A job as run history knows it."""
        job = self.plane.store.get(f"/jobs/{name}")
        properties = job["properties"]
        told = {
            "runId": name,
            "runUuid": name,
            "parentRunId": properties.get("parentJobName"),
            "rootRunId": properties.get("parentJobName") or name,
            "status": properties["status"],
            "displayName": properties["displayName"],
            "name": properties["displayName"],
            "description": properties.get("description"),
            "experimentId": properties["experimentName"],
            "hidden": properties["isArchived"],
            "createdUtc": job["systemData"]["createdAt"],
            "startTimeUtc": properties["properties"].get("StartTimeUtc"),
            "endTimeUtc": properties["properties"].get("EndTimeUtc"),
            "runType": "azureml.scriptrun",
            "runTypeV2": {"orchestrator": "Execution", "traits": [], "attribution": None, "computeType": "AmlCompute"},
            "target": (properties.get("computeId") or "").rsplit("/", 1)[-1],
            "tags": properties["tags"],
            "properties": {**properties["properties"], "azureml.ModuleName": properties["displayName"]},
            "dataContainerId": f"dcid.{name}",
            "services": {},
            "outputs": {k: self.reference(name, k, v) for k, v in (properties.get("outputs") or {}).items()},
        }
        if error := self.plane.jobs.errors.get(name):
            told["error"] = {"error": {"code": "UserError", "message": error}}
        return told

    def reference(self, name: str, output: str, given: dict[str, Any] | None) -> dict[str, Any]:
        """The asset id of an output, and its type."""
        kind = (given or {}).get("jobOutputType") or "uri_folder"
        kinds = {"custom_model": ("models", "CustomModel"), "mlflow_model": ("models", "MLFlowModel")}
        where, said = kinds.get(kind, ("data", kind))
        asset = f"azureml://locations/westeurope/workspaces/1/{where}/azureml_{name}_output_data_{output}/versions/1"
        return {"assetId": asset, "type": said}

    def get(self, request: Request, name: str, **more: str) -> Reply:
        """A run."""
        return Reply(200, self.describe(name))

    def details(self, request: Request, name: str) -> Reply:
        """A run and the signed addresses of its logs."""
        prefix, found = f"ExperimentRun/dcid.{name}/", {}
        client = self.plane.blobs.client("azureml")
        for item in client.list_blobs(name_starts_with=prefix, headers=self.plane.blobs.mine):
            found[item.name.removeprefix(prefix)] = self.plane.blobs.sas("azureml", 3600, item.name)
        return Reply(200, self.describe(name) | {"logFiles": found, "warnings": []})

    def children(self, request: Request, name: str) -> Reply:
        """The runs of a pipeline or a sweep."""
        self.plane.store.get(f"/jobs/{name}")
        return Reply(200, {"value": [self.describe(c) for c in self.plane.jobs.children.get(name, ())]})

    def patch(self, request: Request, experiment: str, name: str) -> Reply:
        """Change name, description, tags, or archive."""
        properties, asked = self.plane.store.get(f"/jobs/{name}")["properties"], request.json
        for theirs, ours in (("displayName", "displayName"), ("description", "description"), ("hidden", "isArchived")):
            if asked.get(theirs) is not None:
                properties[ours] = asked[theirs]
        for field in ("tags", "properties"):
            properties[field].update(asked.get(field) or {})
        return self.get(request, name)

    def data(self, request: Request) -> Reply:
        """A run's metadata, its outputs among it."""
        return Reply(200, {"runMetadata": self.describe(request.json["runId"])})

    def uri(self, asset: str) -> str:
        """Where the output lies that an asset id names."""
        found = re.search(r"azureml_(.+)_output_data_(.+)/versions/", asset)
        if not found:
            raise ArmError(404, "NotFound", f"no output {asset}")
        name, output = found.groups()
        job = self.plane.store.get(f"/jobs/{name}")["properties"]
        if job["status"] not in TERMINAL:
            raise ArmError(404, "NotFound", f"job {name} has no outputs yet")
        uri = bindings.destination(name, output, job["outputs"].get(output))
        group = self.plane.root.split("/providers")[0]
        return uri.replace("azureml://", f"azureml:/{group}/workspaces/{self.plane.workspace}/", 1)

    def data_uris(self, request: Request) -> Reply:
        """The addresses of data outputs."""
        return Reply(200, {"values": {a: {"uri": self.uri(a), "type": "uri_folder"} for a in request.json["values"]}})

    def model_uris(self, request: Request) -> Reply:
        """The addresses of model outputs."""
        return Reply(200, {"values": {a: {"path": self.uri(a)} for a in request.json["values"]}})
