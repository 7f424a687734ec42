"""The plane itself: what it is made of, how a request finds its way, and how a client finds the plane."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import identity
from .assets import Assets
from .blob import ACCOUNT, ENDPOINT, Blobs
from .composite import Composite
from .compute import Computes
from .endpoints import Endpoints
from .executor import Executor
from .faults import Faults
from .history import History
from .jobs import Jobs
from .schedules import Schedules
from .store import Store, now
from .tracking import Tracking
from .web import ArmError, Dropped, Reply, Request, Router, Server
from .wire import Wire
from .workspace import Control, Workspaces

OPEN = ("/_plane/", "/discovery", "/studio/")  # no token is asked for


class Plane:
    """A running control plane with one workspace; a context manager."""

    def __init__(
        self,
        home: Path,
        *,
        delay: float = 0.2,  # seconds that a long operation takes
        blobs: str = "auto",  # azurite, stub, or auto: the first where it is installed
        mlflow: bool = False,  # whether jobs get an MLflow run
        quota: int = 600,  # vCPUs
        start_timeout: float = 60.0,  # seconds that a deployment's server may take to become ready
        sas_lifetime: float = 3600.0,  # seconds that an upload may take
    ) -> None:
        self.home, self.quota = home.resolve(), quota
        self.start_timeout, self.sas_lifetime = start_timeout, sas_lifetime
        self.home.mkdir(parents=True, exist_ok=True)
        self.subscription, self.group = "00000000-1111-2222-3333-444444444444", "llmkit-rg"
        self.workspace, self.tenant, self.began = "llmkit-ws", identity.TENANT, now()
        self.root = f"/subscriptions/{self.subscription}/resourceGroups/{self.group}"
        self.root += f"/providers/Microsoft.MachineLearningServices/workspaces/{self.workspace}"
        self.tags: dict[str, str] = {}
        self.images: dict[str, list[str]] = {}  # what an image starts that was not built from a context: words
        self.identity, self.faults, self.router = identity.Identity(), Faults(), Router()
        self.wire, self.tracking = Wire(self.home), Tracking(self.home, mlflow)
        self.store = Store(self.root, delay)
        self.certificate, key = identity.make_certificate(self.home)
        self.context = identity.tls(self.certificate, key)
        self.blobs = Blobs(self.home / "blobs", blobs)
        self.assets, self.computes, self.jobs = Assets(self), Computes(self), Jobs(self)
        self.executor, self.composite, self.endpoints = Executor(self), Composite(self), Endpoints(self)
        parts = (Workspaces(self), Control(self), History(self), Schedules(self))
        for part in (*parts, self.assets, self.computes, self.jobs, self.endpoints):
            part.routes()
        region = (
            f"{self.root.split('/resourceGroups')[0]}/providers/Microsoft.MachineLearningServices/locations/westeurope"
        )
        self.router.add("GET", f"{region}/mfeOperationsStatus/{{name}}", self.store.operation)
        self.router.add("GET", f"{region}/mfeOperationResults/{{name}}", self.store.result)
        self.server = Server(self.answer, self.context)
        self.url = self.server.url
        self.blobs.open(self.url, str(self.certificate))
        self.cloud = self.home / "cloud.json"
        self.describe()

    def on(self, method: str, path: str, handler: Callable[..., Reply]) -> None:
        """Answer a path of the workspace."""
        self.router.add(method, self.root + path, handler)

    def answer(self, request: Request) -> Reply:
        """One request, its faults first."""
        mine = request.headers.get("x-plane") == self.blobs.inside
        free = mine or request.path.startswith("/_plane/")
        status = 0
        try:
            fault = None if free else self.faults.next(request)
            if fault:
                time.sleep(fault.delay)
                if not fault.applied and fault.status != 200:
                    fault.happen()
            reply = self.dispatch(request)
            status = reply.status
            if fault and fault.applied:
                fault.happen()
            return reply
        except ArmError as e:
            status = e.status
            raise
        except Dropped:
            status = 0
            raise
        finally:
            if not free:
                self.faults.note(request, status)

    def dispatch(self, request: Request) -> Reply:
        """Find who answers."""
        if request.path.startswith(f"/{ACCOUNT}/"):
            return self.blobs.answer(request)
        if not request.path.startswith(OPEN):
            self.identity.check(request)
            self.known(request.path)
            if request.path.startswith("/subscriptions/") and "api-version" not in request.query:
                raise ArmError(400, "MissingApiVersionParameter", "The api-version query parameter is required.")
        return self.router.answer(request)

    def known(self, path: str) -> None:
        """404 for a subscription, a resource group or a workspace that is not there."""
        for part, mine, code in (
            ("subscriptions", self.subscription, "SubscriptionNotFound"),
            ("resourceGroups", self.group, "ResourceGroupNotFound"),
            ("workspaces", self.workspace, "ResourceNotFound"),
        ):
            found = re.search(rf"/{part}/([^/]+)", path, re.I)
            if found and found[1].lower() != mine.lower():
                raise ArmError(404, code, f"{part[:-1]} '{found[1]}' could not be found.")

    def describe(self) -> None:
        """Write down how to connect."""
        metadata = {
            "azure_portal": f"{self.url}/",
            "resource_manager": f"{self.url}/",
            "active_directory": f"{self.url}/",
            "aml_resource_id": f"{identity.AUDIENCE}/",
            "storage_endpoint": ENDPOINT,
            "registry_discovery_endpoint": f"{self.url}/",
        }
        said = {
            "subscription_id": self.subscription,
            "resource_group": self.group,
            "workspace_name": self.workspace,
            "tenant_id": self.tenant,
            "cloud": f"LlmkitPlane{self.server.port}",
            "cloud_metadata": metadata,
            "certificate": str(self.certificate),
            "token": self.identity.token(),
            "expires_on": int(time.time()) + 3600,
            "control": f"{self.url}/_plane",
        }
        part = self.cloud.with_suffix(".part")
        part.write_text(json.dumps(said, indent=2))
        part.replace(self.cloud)

    def expire_tokens(self) -> None:
        """All tokens issued so far are too old; a fresh one is written down."""
        self.identity.expire()
        self.describe()

    def close(self) -> None:
        """End everything that was started; an error if anything, here or there, talked to more than this machine."""
        for name in list(self.executor.running):
            self.executor.cancel(name)
        self.store.close()
        self.endpoints.close()
        self.server.close()
        self.blobs.close()
        self.tracking.close()
        self.wire.close()
        if met := self.wire.foreign():
            raise AssertionError(f"not only loopback was talked to: {sorted(set(met))}")

    def __enter__(self) -> Plane:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileCredential:
    """The token that stands in `cloud.json`, read again for every request that needs one."""

    def __init__(self, cloud: Path) -> None:
        self.cloud = cloud

    def get_token(self, *scopes: str, **options: Any) -> Any:
        """The token of now."""
        from azure.core.credentials import AccessToken

        said = json.loads(self.cloud.read_text())
        # Said to expire soon, so that the SDK asks again next time.
        return AccessToken(said["token"], int(time.time()) + 60)


def client(cloud: Path) -> Any:
    """The real `MLClient`, connected to the plane that wrote this file; public arguments only."""
    from azure.ai.ml import MLClient

    said = json.loads(cloud.read_text())
    os.environ["REQUESTS_CA_BUNDLE"] = said["certificate"]
    names = (said["subscription_id"], said["resource_group"], said["workspace_name"])
    where = {"cloud": said["cloud"], "cloud_metadata": said["cloud_metadata"]}
    return MLClient(FileCredential(cloud), *names, enable_telemetry=False, **where)
