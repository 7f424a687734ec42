"""Online endpoints and their deployments: made, scaled, given traffic and keys, removed."""

from __future__ import annotations

import math
import secrets
import time
from typing import TYPE_CHECKING, Any

from . import limits
from .limits import bad, check_name, check_size, check_tags, seconds
from .scoring import Scoring
from .serving import ServerProcess
from .store import page
from .web import ArmError, Reply, Request

if TYPE_CHECKING:
    from .plane import Plane


class Endpoints:
    """The online endpoints of the workspace."""

    def __init__(self, plane: Plane) -> None:
        self.plane, self.store = plane, plane.store
        self.keys: dict[str, dict[str, str]] = {}
        self.fronts: dict[str, Scoring] = {}
        self.servers: dict[tuple[str, str], ServerProcess] = {}
        self.elsewhere: set[str] = set()  # endpoint names that another workspace of the region has

    def routes(self) -> None:
        """What is answered."""
        at, below = "/onlineEndpoints", "/onlineEndpoints/{name}/deployments"
        for method, path, handler in (
            ("GET", at, self.list),
            ("GET", f"{at}/{{name}}", self.get),
            ("PUT", f"{at}/{{name}}", self.put),
            ("DELETE", f"{at}/{{name}}", self.delete),
            ("POST", f"{at}/{{name}}/listKeys", self.list_keys),
            ("POST", f"{at}/{{name}}/regenerateKeys", self.regenerate),
            ("POST", f"{at}/{{name}}/token", self.token),
            ("GET", below, self.deployments),
            ("GET", f"{below}/{{deployment}}", self.deployment),
            ("PUT", f"{below}/{{deployment}}", self.deploy),
            ("PATCH", f"{below}/{{deployment}}", self.scale),
            ("DELETE", f"{below}/{{deployment}}", self.undeploy),
            ("POST", f"{below}/{{deployment}}/getLogs", self.logs),
        ):
            self.plane.on(method, path, handler)

    def list(self, request: Request) -> Reply:
        """All endpoints."""
        return page(request, self.store.under("/onlineEndpoints"))

    def get(self, request: Request, name: str) -> Reply:
        """One endpoint."""
        return Reply(200, self.store.read(f"/onlineEndpoints/{name}"))

    def put(self, request: Request, name: str) -> Reply:
        """Create an endpoint, or change its traffic, tags and description."""
        check_name("endpoint", name)
        body, path = request.json, f"/onlineEndpoints/{name}"
        check_tags(body.get("tags"))
        wanted = body.get("properties") or {}
        before = self.store.find(path)
        self.store.idle(path)
        if name.lower() in self.elsewhere:
            raise ArmError(409, "Conflict", f"Endpoint name {name} already exists in the region westeurope.")
        if not before and len(self.store.under("/onlineEndpoints")) >= limits.ENDPOINTS:
            raise bad(f"the workspace has {limits.ENDPOINTS} endpoints already", "EndpointQuotaReached")
        mode = str(wanted.get("authMode") or "Key")
        if mode not in ("Key", "AMLToken", "AADToken"):
            raise bad(f"authMode '{mode}' is unknown")
        if before and mode != before["properties"]["authMode"]:
            raise bad("authMode of an endpoint cannot be changed", "AuthModeImmutable")
        traffic, mirror = self.check_traffic(name, wanted)
        if name not in self.fronts:
            self.fronts[name] = Scoring(self.plane, name)
            self.keys[name] = {"primaryKey": secrets.token_urlsafe(32), "secondaryKey": secrets.token_urlsafe(32)}
        front = self.fronts[name].url
        old = before["properties"] if before else {"traffic": {}, "mirrorTraffic": {}}
        properties = {
            "authMode": mode,
            "traffic": old["traffic"],
            "mirrorTraffic": old["mirrorTraffic"],
            "compute": None,
        }
        properties |= {"scoringUri": self.scoring_uri(name), "swaggerUri": f"{front}/swagger.json", "properties": {}}
        properties |= {"description": wanted.get("description"), "provisioningState": "Creating"}
        properties |= {"publicNetworkAccess": wanted.get("publicNetworkAccess") or "Enabled"}
        more = {k: body.get(k) for k in ("location", "tags", "kind")}
        identity = body.get("identity") or {"type": "SystemAssigned"}
        made = self.store.put(path, properties, identity=identity, **more)

        def settle() -> None:
            made["properties"] |= {"traffic": traffic, "mirrorTraffic": mirror}

        return self.store.begin(request, path, "Updating" if before else "Creating", settle)

    def scoring_uri(self, name: str) -> str:
        """The address that is called: the scoring route of what is deployed."""
        routes = [d["properties"].get("scoringPath") for d in self.store.under(f"/onlineEndpoints/{name}/deployments")]
        return self.fronts[name].url + (next((r for r in routes if r), None) or "/score")

    def check_traffic(self, name: str, wanted: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
        """Live and mirrored shares, if they add up and go to deployments that run."""
        live, mirror = dict(wanted.get("traffic") or {}), dict(wanted.get("mirrorTraffic") or {})
        for deployment, share in [*live.items(), *mirror.items()]:
            found = self.store.find(f"/onlineEndpoints/{name}/deployments/{deployment}")
            if found is None:
                raise bad(
                    f"traffic for deployment '{deployment}', which endpoint '{name}' does not have", "InvalidTraffic"
                )
            if found["properties"]["provisioningState"] != "Succeeded" and share:
                raise bad(f"deployment '{deployment}' is {found['properties']['provisioningState']}", "InvalidTraffic")
            if not isinstance(share, int) or isinstance(share, bool) or not 0 <= share <= 100:
                raise bad(f"traffic of '{deployment}' is {share}, not a whole number from 0 to 100", "InvalidTraffic")
        if sum(live.values()) not in (0, 100):
            raise bad(f"live traffic adds up to {sum(live.values())}; it must be 0 or 100", "InvalidTraffic")
        if len(mirror) > 1 or sum(mirror.values()) > limits.MIRROR:
            raise bad(f"traffic is mirrored to one deployment, {limits.MIRROR} % at most", "InvalidMirrorTraffic")
        if any(live.get(deployment) for deployment in mirror):
            raise bad("a deployment gets live or mirrored traffic, not both", "InvalidMirrorTraffic")
        return live, mirror

    def delete(self, request: Request, name: str) -> Reply:
        """Remove an endpoint and its deployments."""
        path = f"/onlineEndpoints/{name}"
        if self.store.find(path) is None:
            return Reply(204)
        self.store.idle(path)

        def work() -> None:
            for key in [k for k in self.servers if k[0] == name]:
                self.servers.pop(key).close()
            self.fronts.pop(name).close()
            self.store.delete(path)

        return self.store.begin(request, path, "Deleting", work, 202)

    def list_keys(self, request: Request, name: str) -> Reply:
        """Both keys."""
        if self.store.get(f"/onlineEndpoints/{name}")["properties"]["authMode"] != "Key":
            raise bad(f"endpoint '{name}' does not use keys")
        return Reply(200, self.keys[name])

    def regenerate(self, request: Request, name: str) -> Reply:
        """A new key in place of one of them; the old one is refused from then on."""
        self.store.get(f"/onlineEndpoints/{name}")
        kind = str(request.json.get("keyType"))
        if kind not in ("Primary", "Secondary"):
            raise bad(f"keyType '{kind}' is neither Primary nor Secondary")
        self.keys[name][f"{kind.lower()}Key"] = secrets.token_urlsafe(32)
        return self.store.begin(request, f"/no/{name}", "", lambda: None, 202)

    def token(self, request: Request, name: str) -> Reply:
        """A token for an endpoint that takes tokens."""
        self.store.get(f"/onlineEndpoints/{name}")
        until = int(time.time()) + 3600
        more = {"expiryTimeUtc": until, "refreshAfterTimeUtc": until - 600, "tokenType": "Bearer"}
        return Reply(200, {"accessToken": self.plane.identity.token()} | more)

    def deployments(self, request: Request, name: str) -> Reply:
        """The deployments of an endpoint."""
        self.store.get(f"/onlineEndpoints/{name}")
        return page(request, self.store.under(f"/onlineEndpoints/{name}/deployments"))

    def deployment(self, request: Request, name: str, deployment: str) -> Reply:
        """One deployment."""
        return Reply(200, self.store.read(f"/onlineEndpoints/{name}/deployments/{deployment}"))

    def deploy(self, request: Request, name: str, deployment: str) -> Reply:
        """Create a deployment, or replace it: its server is started and asked until it is ready."""
        check_name("deployment", deployment)
        self.store.get(f"/onlineEndpoints/{name}")
        self.store.idle(f"/onlineEndpoints/{name}")
        path, body = f"/onlineEndpoints/{name}/deployments/{deployment}", request.json
        self.store.idle(path)
        check_tags(body.get("tags"))
        properties = {k: v for k, v in (body.get("properties") or {}).items() if v is not None}
        before = self.store.find(path)
        capacity = (body.get("sku") or {}).get("capacity")
        self.check(name, deployment, properties, capacity, bool(before))
        base = {"scaleSettings": {"scaleType": "Default"}, "environmentVariables": {}, "properties": {}, "tags": {}}
        base |= {"egressPublicNetworkAccess": "Enabled", "appInsightsEnabled": False, "requestSettings": {}}
        base |= properties | {"provisioningState": "Creating", "endpointComputeType": "Managed"}
        sku = {"name": "Default", "tier": None, "capacity": capacity}
        self.store.put(path, base, sku=sku, **{k: body.get(k) for k in ("location", "tags")})
        # What can be seen to be wrong is refused before the operation starts, the rest fails it.
        server = ServerProcess(self.plane, name, deployment, base)

        def work() -> None:
            server.start()
            old = self.servers.pop((name, deployment), None)
            self.servers[name, deployment] = server
            if old:
                old.close()
            self.store.get(path)["properties"]["scoringPath"] = server.route("scoringRoute")[0]
            self.store.get(f"/onlineEndpoints/{name}")["properties"]["scoringUri"] = self.scoring_uri(name)

        return self.store.begin(request, path, "Updating" if before else "Creating", work)

    def check(self, name: str, deployment: str, properties: dict[str, Any], capacity: Any, known: bool) -> None:
        """Refuse what the service refuses."""
        _, cpus = check_size(properties.get("instanceType"))
        if not isinstance(capacity, int) or not 1 <= capacity <= limits.INSTANCES:
            raise bad(f"{capacity} instances; a deployment has from 1 to {limits.INSTANCES}", "InvalidInstanceCount")
        if not known and len(self.store.under(f"/onlineEndpoints/{name}/deployments")) >= limits.DEPLOYMENTS:
            raise bad(f"an endpoint has at most {limits.DEPLOYMENTS} deployments", "DeploymentQuotaReached")
        if cpus * math.ceil(capacity * limits.RESERVE) > self.plane.quota:
            raise bad(f"Not enough quota available for {properties['instanceType']} in westeurope.", "OutOfQuota")
        if properties.get("codeConfiguration"):
            raise bad("a scoring script needs Azure's inference server; give an environment with an inferenceConfig")
        environment = self.plane.assets.find(properties.get("environmentId"), "environments")
        if not environment["properties"].get("inferenceConfig"):
            raise bad("the environment has no inferenceConfig, and the deployment no code", "InvalidEnvironment")
        if properties.get("model"):
            self.plane.assets.find(properties["model"], "models")
        asked = properties.get("requestSettings") or {}
        if (seconds(asked.get("requestTimeout")) or 0) > limits.TIMEOUT_S:
            raise bad(
                f"requestTimeout {asked['requestTimeout']} is over {limits.TIMEOUT_S} seconds", "InvalidRequestSettings"
            )
        if not 1 <= int(asked.get("maxConcurrentRequestsPerInstance") or 1) <= 1000:
            raise bad("maxConcurrentRequestsPerInstance must be from 1 to 1000", "InvalidRequestSettings")

    def scale(self, request: Request, name: str, deployment: str) -> Reply:
        """Change the number of instances."""
        path = f"/onlineEndpoints/{name}/deployments/{deployment}"
        found = self.store.get(path)
        self.store.idle(path)
        capacity = (request.json.get("sku") or {}).get("capacity", found["sku"]["capacity"])
        self.check(name, deployment, found["properties"], capacity, True)
        found["sku"]["capacity"] = capacity
        return self.store.begin(request, path, "Updating", lambda: None)

    def undeploy(self, request: Request, name: str, deployment: str) -> Reply:
        """Remove a deployment that gets no traffic."""
        path = f"/onlineEndpoints/{name}/deployments/{deployment}"
        endpoint = self.store.find(f"/onlineEndpoints/{name}")
        if endpoint is None or self.store.find(path) is None:
            return Reply(204)
        self.store.idle(path)
        if endpoint["properties"]["traffic"].get(deployment):
            raise bad(f"Deployment {deployment} has live traffic; set it to 0 first.", "DeploymentHasTraffic")

        def work() -> None:
            if server := self.servers.pop((name, deployment), None):
                server.close()
            self.store.delete(path)

        return self.store.begin(request, path, "Deleting", work, 202)

    def logs(self, request: Request, name: str, deployment: str) -> Reply:
        """The last lines that a server wrote."""
        self.store.get(f"/onlineEndpoints/{name}/deployments/{deployment}")
        server = self.servers.get((name, deployment))
        path = self.plane.home / "endpoints" / name / deployment / "server.log"
        text = server.log() if server else path.read_text(errors="replace") if path.exists() else ""
        lines = text.splitlines()[-int(request.json.get("tail") or 500) :]
        return Reply(200, {"content": "\n".join(lines)})

    def close(self) -> None:
        """End all servers."""
        for server in self.servers.values():
            server.close()
        for front in self.fronts.values():
            front.close()
