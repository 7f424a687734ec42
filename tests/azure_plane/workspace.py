"""The workspace, where its services are, and its two datastores."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

from .blob import ARTIFACTS, CONTAINER
from .limits import bad, check_tags
from .store import missing, page
from .web import ArmError, Reply, Request

if TYPE_CHECKING:
    from .plane import Plane

STORES = {"workspaceblobstore": CONTAINER, "workspaceartifactstore": ARTIFACTS}


class Workspaces:
    """One workspace exists; others can be made, so that a model may move between them, but hold no jobs."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane

    def routes(self) -> None:
        """What is answered."""
        self.plane.on("GET", "", self.get)
        self.plane.on("PATCH", "", self.patch)
        self.plane.on("GET", "/datastores", self.stores)
        self.plane.on("GET", "/datastores/{name}", self.store)
        self.plane.on("POST", "/datastores/{name}/listSecrets", self.secrets)
        self.plane.router.add("GET", self.plane.root.rsplit("/", 1)[0], self.list)
        self.plane.router.add("GET", "/discovery", self.discovery)

    def resource(self) -> dict[str, Any]:
        """The workspace as the service describes it."""
        plane, group = self.plane, self.plane.root.split("/providers")[0]
        made = {"createdAt": plane.began, "createdBy": "somebody", "lastModifiedAt": plane.began}
        properties = {
            "friendlyName": plane.workspace,
            "description": "",
            "provisioningState": "Succeeded",
            "workspaceId": "99999999-0000-0000-0000-000000000001",
            "discoveryUrl": f"{plane.url}/discovery",
            "mlFlowTrackingUri": plane.tracking.uri,
            "storageAccount": f"{group}/providers/Microsoft.Storage/storageAccounts/llmkit",
            "keyVault": f"{group}/providers/Microsoft.KeyVault/vaults/llmkit",
            "applicationInsights": f"{group}/providers/Microsoft.insights/components/llmkit",
            "containerRegistry": f"{group}/providers/Microsoft.ContainerRegistry/registries/llmkit",
            "publicNetworkAccess": "Enabled",
            "tenantId": plane.tenant,
        }
        kind = {"kind": "Default", "sku": {"name": "Basic", "tier": "Basic"}, "identity": {"type": "SystemAssigned"}}
        head = {"id": plane.root, "name": plane.workspace, "location": "westeurope", "systemData": made}
        return (
            head
            | kind
            | {"type": "Microsoft.MachineLearningServices/workspaces", "tags": plane.tags, "properties": properties}
        )

    def get(self, request: Request) -> Reply:
        """The workspace."""
        return Reply(200, self.resource())

    def patch(self, request: Request) -> Reply:
        """Tags."""
        check_tags(request.json.get("tags"))
        self.plane.tags.update(request.json.get("tags") or {})
        return self.get(request)

    def list(self, request: Request) -> Reply:
        """The workspaces of the resource group."""
        return page(request, [self.resource()])

    def discovery(self, request: Request) -> Reply:
        """Where the services of the data plane are."""
        names = ("api", "history", "catalog", "experimentation", "modelmanagement", "studio", "pipelines", "mlflow")
        return Reply(200, {name: self.plane.url for name in names})

    def describe(self, name: str) -> dict[str, Any]:
        """A datastore."""
        if name not in STORES:
            raise missing(f"/datastores/{name}")
        blobs = self.plane.blobs
        properties = {
            "datastoreType": "AzureBlob",
            "accountName": blobs.account,
            "containerName": STORES[name],
            "endpoint": "core.windows.net",
            "protocol": "https",
            "credentials": {"credentialsType": "AccountKey", "secrets": None},
            "isDefault": name == "workspaceblobstore",
            "tags": {},
            "properties": {},
        }
        made = {"createdAt": self.plane.began, "createdBy": "somebody", "lastModifiedAt": self.plane.began}
        head = {"id": f"{self.plane.root}/datastores/{name}", "name": name, "systemData": made}
        return head | {"type": "Microsoft.MachineLearningServices/workspaces/datastores", "properties": properties}

    def stores(self, request: Request) -> Reply:
        """The datastores; with `isDefault`, the default one."""
        found = [self.describe(name) for name in STORES]
        if request.query.get("isdefault", "").lower() == "true":
            found = [s for s in found if s["properties"]["isDefault"]]
        return page(request, found)

    def store(self, request: Request, name: str) -> Reply:
        """One datastore."""
        return Reply(200, self.describe(name))

    def secrets(self, request: Request, name: str) -> Reply:
        """The key of the storage account."""
        self.describe(name)
        return Reply(200, {"secretsType": "AccountKey", "key": self.plane.blobs.key})


class Control:
    """`/_plane`: how a test in another process drives the plane."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane

    def routes(self) -> None:
        """What is answered; none of it needs a token."""
        for method, name, handler in (
            ("POST", "faults", self.fault),
            ("DELETE", "faults", self.clear),
            ("GET", "calls", self.calls),
            ("POST", "token", self.token),
            ("POST", "expire", self.expire),
            ("POST", "preempt/{job}", self.preempt),
            ("POST", "lag", self.lag),
        ):
            self.plane.router.add(method, f"/_plane/{name}", handler)

    def fault(self, request: Request) -> Reply:
        """Switch a fault on; the body has the fields of `Fault`."""
        try:
            self.plane.faults.add(**request.json)
        except TypeError as e:
            raise bad(str(e)) from None
        return Reply(204)

    def clear(self, request: Request) -> Reply:
        """Switch all faults off."""
        self.plane.faults.clear()
        return Reply(204)

    def calls(self, request: Request) -> Reply:
        """What was asked of the plane: method, path and status of each request."""
        return Reply(200, {"calls": self.plane.faults.log})

    def token(self, request: Request) -> Reply:
        """A fresh token: `{"lifetime": seconds, "tenant": id}`, both optional."""
        asked = {k: v for k, v in request.json.items() if k in ("lifetime", "tenant", "audience")}
        until = dt.datetime.now(dt.UTC).timestamp() + float(asked.get("lifetime", 3600))
        return Reply(200, {"token": self.plane.identity.token(**asked), "expires_on": int(until)})

    def expire(self, request: Request) -> Reply:
        """All tokens issued so far are too old; `cloud.json` gets a fresh one."""
        self.plane.expire_tokens()
        return Reply(204)

    def preempt(self, request: Request, job: str) -> Reply:
        """Take the nodes of a running job away."""
        if not self.plane.executor.preempt(job):
            raise ArmError(409, "NotRunning", f"job {job} has no nodes now")
        return Reply(204)

    def lag(self, request: Request) -> Reply:
        """`{"path": pattern, "seconds": s}`: changes there are seen only later."""
        self.plane.store.lag.append((f"*{request.json['path']}", float(request.json["seconds"])))
        return Reply(204)
