"""The address of an endpoint: checks the key, picks a deployment by its share, mirrors, and passes the answer on."""

from __future__ import annotations

import hmac
import http.client
import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import limits
from .limits import seconds
from .web import ArmError, Reply, Request, Server

if TYPE_CHECKING:
    from .plane import Plane

HOP = {"connection", "transfer-encoding", "content-length", "host", "keep-alive", "expect", "azureml-model-deployment"}


class Scoring:
    """The https server of one endpoint; every path below its address reaches the deployment's server."""

    def __init__(self, plane: Plane, name: str) -> None:
        self.plane, self.name = plane, name
        self.server = Server(self.answer, plane.context)
        self.url = self.server.url
        self.rng = random.Random(name)
        self.counts: Counter[str] = Counter()  # live requests by deployment
        self.mirrored: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()
        self.lock = threading.Lock()

    def answer(self, request: Request) -> Reply:
        """One request."""
        if fault := self.plane.faults.next(request):
            fault.happen()
        endpoint = self.plane.store.get(f"/onlineEndpoints/{self.name}")["properties"]
        self.check(request, endpoint["authMode"])
        if len(request.body) > limits.PAYLOAD:
            raise ArmError(413, "PayloadTooLarge", f"the body has over {limits.PAYLOAD >> 20} MB")
        name = self.choose(request, endpoint)
        self.mirror(request, endpoint.get("mirrorTraffic") or {})
        with self.lock:
            self.counts[name] += 1
        reply = self.send(request, name)
        reply.headers["azureml-model-deployment"] = name
        return reply

    def check(self, request: Request, mode: str) -> None:
        """401 without the right key or token."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if mode == "Key":
            keys = self.plane.endpoints.keys[self.name].values()
            if kind.lower() != "bearer" or not any(hmac.compare_digest(given, key) for key in keys):
                raise ArmError(401, "key_auth_bad_header_forbidden", "the key is missing or wrong")
        else:
            self.plane.identity.check(request)

    def choose(self, request: Request, endpoint: dict[str, Any]) -> str:
        """The deployment that the request names, else one by the shares."""
        if named := request.headers.get("azureml-model-deployment"):
            if (self.name, named) not in self.plane.endpoints.servers:
                raise ArmError(404, "DeploymentNotFound", f"endpoint {self.name} has no deployment {named}")
            return named
        shares = {name: share for name, share in endpoint["traffic"].items() if share}
        if not shares:
            raise ArmError(404, "NoTraffic", f"no deployment of endpoint {self.name} gets traffic")
        with self.lock:
            return self.rng.choices(list(shares), list(shares.values()))[0]

    def mirror(self, request: Request, shares: dict[str, int]) -> None:
        """Send a copy of some requests to another deployment, and drop its answer."""
        for name, share in shares.items():
            with self.lock:
                chosen = self.rng.random() * 100 < share
            if not chosen:
                continue

            def copy(name: str = name) -> None:
                try:
                    reply = self.send(request, name)
                    for _ in reply.body if isinstance(reply.body, Iterator) else ():
                        continue
                except ArmError:
                    return  # a mirror's failure is nobody's
                finally:
                    with self.lock:
                        self.mirrored[name] += 1

            self.plane.store.background(copy, f"mirror {name}")

    def send(self, request: Request, name: str) -> Reply:
        """Pass a request on to a deployment's server, and what it says back."""
        server = self.plane.endpoints.servers.get((self.name, name))
        resource = self.plane.store.find(f"/onlineEndpoints/{self.name}/deployments/{name}")
        if server is None or resource is None:
            raise ArmError(503, "DeploymentNotReady", f"deployment {name} has no server")
        asked = resource["properties"].get("requestSettings") or {}
        room = int(asked.get("maxConcurrentRequestsPerInstance") or 1) * resource["sku"]["capacity"]
        with self.lock:
            if self.busy[name] >= room:
                raise ArmError(
                    429, "TooManyRequests", f"deployment {name} takes {room} requests at once", Retry_After="1"
                )
            self.busy[name] += 1
        timeout = seconds(asked.get("requestTimeout")) or 5.0
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
        try:
            headers = {n: v for n, v in request.headers.items() if n not in HOP}
            connection.request(request.method, request.target, request.body or None, headers)
            found = connection.getresponse()
            kept = {n: v for n, v in found.getheaders() if n.lower() not in HOP}
            if "text/event-stream" in found.getheader("content-type", ""):
                return Reply(found.status, self.stream(connection, found, name), kept)
            reply = Reply(found.status, found.read(), kept)
        except TimeoutError:
            self.done(connection, name)
            raise ArmError(408, "RequestTimeout", f"deployment {name} did not answer in {timeout:g} seconds") from None
        except (OSError, http.client.HTTPException) as e:
            self.done(connection, name)
            raise ArmError(502, "BadGateway", f"deployment {name}: {type(e).__name__}: {e}") from None
        self.done(connection, name)
        return reply

    def stream(
        self, connection: http.client.HTTPConnection, found: http.client.HTTPResponse, name: str
    ) -> Iterator[bytes]:
        """The parts of an answer as they come."""
        try:
            while part := found.read1(65536):
                yield part
        finally:
            self.done(connection, name)

    def done(self, connection: http.client.HTTPConnection, name: str) -> None:
        """Hang up, and make room."""
        connection.close()
        with self.lock:
            self.busy[name] -= 1

    def close(self) -> None:
        """Stop listening."""
        self.server.close()
