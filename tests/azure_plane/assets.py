"""Codes, environments, data, models and components: containers of versions that do not change."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any

from .limits import COMMAND, bad, check_name, check_tags
from .store import Resource, missing, page
from .web import ArmError, Reply, Request

if TYPE_CHECKING:
    from .plane import Plane

# What cannot be changed in a version that exists.
FIXED = {
    "codes": ("codeUri",),
    "environments": ("image", "build", "condaFile"),
    "data": ("dataUri", "dataType"),
    "models": ("modelUri", "modelType"),
    "components": ("componentSpec",),
}
IMAGE = r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"


class Assets:
    """The five kinds of asset."""

    def __init__(self, plane: Plane) -> None:
        self.plane, self.store = plane, plane.store

    def routes(self) -> None:
        """What is answered, the same for each kind."""
        for kind in FIXED:
            for method, tail, handler in (
                ("GET", "", self.containers),
                ("GET", "/{name}", self.container),
                ("GET", "/{name}/versions", self.versions),
                ("GET", "/{name}/versions/{version}", self.version),
                ("PUT", "/{name}/versions/{version}", self.put),
                ("DELETE", "/{name}/versions/{version}", self.delete),
                ("POST", "/{name}/versions/{version}/startPendingUpload", self.upload),
            ):
                self.plane.on(method, f"/(?P<kind>{kind}){tail}", handler)

    def containers(self, request: Request, kind: str) -> Reply:
        """The named assets of a kind; anonymous ones are not shown."""
        found = [self.store.read(f"/{kind}/{r['name']}") for r in self.store.under(f"/{kind}")]
        return page(request, [r for r in found if not r["properties"].get("isAnonymous")])

    def container(self, request: Request, kind: str, name: str) -> Reply:
        """An asset, and its latest and next version."""
        return Reply(200, self.store.read(f"/{kind}/{name}"))

    def versions(self, request: Request, kind: str, name: str) -> Reply:
        """The versions of an asset, newest first; for code, those with a hash."""
        found = self.store.under(f"/{kind}/{name}/versions")
        if not found and kind != "codes" and not self.store.find(f"/{kind}/{name}"):
            raise missing(f"/{kind}/{name}")
        if wanted := request.query.get("hash"):  # anonymous code has a new name each time: its content is looked for
            every = [r for c in self.store.under(f"/{kind}") for r in self.store.under(f"/{kind}/{c['name']}/versions")]
            found = [r for r in every if r["properties"]["properties"].get("hash_sha256") == wanted]
        return page(request, found[::-1][: int(request.query.get("$top") or len(found) or 1)])

    def version(self, request: Request, kind: str, name: str, version: str) -> Reply:
        """One version."""
        return Reply(200, self.store.read(f"/{kind}/{name}/versions/{version}"))

    def put(self, request: Request, kind: str, name: str, version: str) -> Reply:
        """Create a version, or change what may change: description, tags, stage."""
        check_name("asset", name)
        check_name("version", version)
        properties = request.json.get("properties")
        if not isinstance(properties, dict):
            raise bad("properties are missing")
        check_tags(properties.get("tags"))
        getattr(self, f"check_{kind}", lambda p: None)(properties)
        path = f"/{kind}/{name}/versions/{version}"
        before = self.store.find(path)
        if before and any(before["properties"].get(f) != properties.get(f) for f in FIXED[kind]):
            said = (
                "Asset paths cannot be updated."
                if FIXED[kind][0].endswith("Uri")
                else f"{kind} versions are immutable."
            )
            raise ArmError(400 if "paths" in said else 409, "UserError", said)
        base = {"tags": {}, "properties": {}, "isArchived": False, "isAnonymous": False, "description": None}
        made = self.store.put(
            path, base | self.defaults(kind, properties) | properties | {"provisioningState": "Succeeded"}
        )
        self.register(kind, name, version, properties)
        return Reply(200 if before else 201, made)

    def defaults(self, kind: str, properties: dict[str, Any]) -> dict[str, Any]:
        """What the service adds to a kind."""
        if kind == "models":
            return {"flavors": {}, "modelType": "custom_model", "stage": "Development"}
        if kind == "environments":
            return {"environmentType": "UserCreated", "osType": "Linux"}
        return {}

    def register(self, kind: str, name: str, version: str, properties: dict[str, Any]) -> None:
        """Keep the container's latest and next version."""
        before = self.store.find(f"/{kind}/{name}")
        numbers = [int(r["name"]) for r in self.store.under(f"/{kind}/{name}/versions") if r["name"].isdigit()]
        said = {"latestVersion": version, "nextVersion": str(max(numbers, default=0) + 1), "isArchived": False}
        said |= {"isAnonymous": bool(properties.get("isAnonymous")), "tags": {}, "properties": {}, "description": None}
        if kind == "data":
            said["dataType"] = properties.get("dataType", "uri_folder")
        if not before or before["properties"]["latestVersion"] != version:
            self.store.put(f"/{kind}/{name}", said)

    def delete(self, request: Request, kind: str, name: str, version: str) -> Reply:
        """Remove a version."""
        path = f"/{kind}/{name}/versions/{version}"
        known = self.store.find(path)
        self.store.delete(path)
        return Reply(200 if known else 204)

    def upload(self, request: Request, kind: str, name: str, version: str) -> Reply:
        """A fresh container for an upload, and a signed address that lets one write there for a while."""
        container = f"{uuid.uuid4().hex[:8]}-{uuid.uuid4()}"[:63]
        self.plane.blobs.make(container)
        blob = f"{self.plane.blobs.url}/{container}"
        credential = {"credentialType": "SAS", "sasUri": self.plane.blobs.sas(container, self.plane.sas_lifetime)}
        store = f"{self.plane.root}/datastores/workspaceblobstore"
        reference = {"blobUri": blob, "storageAccountArmId": store, "credential": credential}
        said = {"pendingUploadId": str(uuid.uuid4()), "pendingUploadType": "TemporaryBlobReference"}
        return Reply(200, said | {"blobReferenceForConsumption": reference})

    def check_environments(self, properties: dict[str, Any]) -> None:
        """An image that can be named, or a build context that was uploaded."""
        image, build = properties.get("image"), properties.get("build")
        if bool(image) == bool(build):
            raise bad("an environment has either an image or a build context")
        if image and not re.fullmatch(IMAGE, image):
            raise bad(f"'{image}' is no image reference")
        if build and not build.get("contextUri"):
            raise bad("build.contextUri is missing")

    def check_components(self, properties: dict[str, Any]) -> None:
        """A command that fits, of a component whose code and environment exist."""
        spec = properties.get("componentSpec") or {}
        if len(str(spec.get("command", ""))) > COMMAND:
            raise bad("the command is too long")
        if spec.get("type") == "command":
            self.find(spec.get("environment"), "environments")
            if spec.get("code"):
                self.find(spec["code"], "codes")

    def find(self, reference: str | None, kind: str) -> Resource:
        """The version that an ARM id or `azureml:` reference names; 404 without it."""
        long = re.search(rf"/{kind}/([^/]+)/versions/([^/]+)$", reference or "")
        short = re.fullmatch(r"azureml:([^:/@]+)(?::([^:/]+)|@latest)", reference or "")
        name, version = (long or short).groups() if (long or short) else (None, None)  # type: ignore[union-attr]
        if not name:
            raise bad(f"'{reference}' names none of the workspace's {kind}")
        if version is None:
            version = self.store.get(f"/{kind}/{name}")["properties"]["latestVersion"]
        return self.store.get(f"/{kind}/{name}/versions/{version}")

    def publish(self, kind: str, name: str, properties: dict[str, Any]) -> str:
        """Register what a job made as the next version of an asset; its ARM id."""
        before = self.store.find(f"/{kind}/{name}")
        version = before["properties"]["nextVersion"] if before else "1"
        base = {"tags": {}, "properties": {}, "isArchived": False, "isAnonymous": False, "description": None}
        made = self.store.put(f"/{kind}/{name}/versions/{version}", base | self.defaults(kind, {}) | properties)
        self.register(kind, name, version, properties)
        return str(made["id"])
