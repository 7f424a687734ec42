"""An API server of Kubernetes over HTTPS, strict about what a rollout does: bearer tokens, the media type of a patch,
versions that were read, schemas of the kinds that it knows; and a status that follows some time later."""

from __future__ import annotations

import copy
import datetime
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

TOKEN = "of-a-service-account"
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 253}
WEIGHT = {"type": "integer", "minimum": 0, "maximum": 1_000_000}
PERCENT = {"type": "integer", "minimum": 0, "maximum": 100}


def strict(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def several(item: dict[str, Any], most: int) -> dict[str, Any]:
    """A list of at least one."""
    return {"type": "array", "items": item, "minItems": 1, "maxItems": most}


# The parts of the published types that a rollout's manifests use: Gateway API v1, Knative v1, KServe v1beta1.
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
FILTER = {"type": "object", "required": ["type"]}
BACKEND = strict(
    {"name": NAME, "namespace": NAME, "port": PORT, "weight": WEIGHT, "filters": several(FILTER, 16)}, "name"
)
PATH = strict({"type": {"enum": ["Exact", "PathPrefix", "RegularExpression"]}, "value": {"type": "string"}})
RULE = strict({"matches": several(strict({"path": PATH}), 64), "backendRefs": several(BACKEND, 16)})
ROUTE = strict(
    {
        "parentRefs": several(strict({"name": NAME}, "name"), 32),
        "hostnames": several({"type": "string"}, 16),
        "rules": several(RULE, 16),
    }
)
PROBE = strict({"httpGet": strict({"path": {"type": "string"}, "port": {"type": "integer"}}, "port")})
CONTAINER = strict(
    {
        "name": NAME,
        "image": {"type": "string"},
        "command": several({"type": "string"}, 64),
        "ports": several(strict({"containerPort": {"type": "integer"}}, "containerPort"), 8),
        "env": several(strict({"name": {"type": "string"}, "value": {"type": "string"}}, "name"), 64),
        "resources": strict({"limits": {"type": "object", "additionalProperties": {"type": "string"}}}),
        "readinessProbe": PROBE,
    },
    "name",
)
PREDICTOR = strict({"containers": several(CONTAINER, 8), "canaryTrafficPercent": PERCENT}, "containers")
TARGET = {"revisionName": NAME, "percent": PERCENT, "latestRevision": {"type": "boolean"}, "tag": NAME}
TRAFFIC = strict(TARGET)
SCHEMAS = {
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): ROUTE,
    ("serving.kserve.io/v1beta1", "InferenceService"): strict({"predictor": PREDICTOR}, "predictor"),
    ("serving.knative.dev/v1", "Service"): strict({"traffic": several(TRAFFIC, 16), "template": {"type": "object"}}),
}


def check(thing: dict[str, Any]) -> None:
    """`ValueError` if an object is not what its type says."""
    try:
        jsonschema.validate(thing["spec"], SCHEMAS[thing["apiVersion"], thing["kind"]])
        jsonschema.validate(thing["metadata"]["name"], NAME)
    except (jsonschema.ValidationError, KeyError) as e:
        raise ValueError(getattr(e, "message", f"no matches for kind {e}")) from e
    traffic = thing["spec"].get("traffic")
    if traffic and sum(t.get("percent", 0) for t in traffic) != 100:
        raise ValueError("Traffic targets sum to something else than 100")


def merge(target: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return change
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


class Cluster(ThreadingHTTPServer):
    """The server and its objects; `follow` makes the status of an object `lag` seconds after its change."""

    daemon_threads = True

    def __init__(self, home: Path, lag: float = 0.05) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.things: dict[str, dict[str, Any]] = {}
        self.follow: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
        self.lag, self.lock, self.log, self.version = lag, threading.RLock(), list[tuple[str, int]](), 100
        self.before: Callable[[str], int] = lambda method: 0  # a status to fail with
        self.due: dict[str, float] = {}
        self.certificate = secure(self, home)
        self.kubeconfig = home / "kubeconfig"
        cluster = {"server": f"https://127.0.0.1:{self.server_address[1]}", "certificate-authority": "ca.pem"}
        config: dict[str, Any] = {"apiVersion": "v1", "kind": "Config", "current-context": "x"}
        config |= {"clusters": [{"name": "c", "cluster": cluster}], "users": [{"name": "u", "user": {"token": TOKEN}}]}
        config |= {"contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "llm"}}]}
        self.kubeconfig.write_text(yaml.safe_dump(config))
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def add(self, plural: str, thing: dict[str, Any], follow: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
        """Apply an object; its path."""
        check(thing)
        path = f"/apis/{thing['apiVersion']}/namespaces/{thing['metadata']['namespace']}/{plural}"
        path += f"/{thing['metadata']['name']}"
        self.things[path], self.follow[path] = copy.deepcopy(thing), follow
        self.touch(path, 0.0)
        return path

    def touch(self, path: str, lag: float) -> None:
        """Count a change; the controllers see it later."""
        self.version += 1
        meta = self.things[path]["metadata"]
        meta |= {"resourceVersion": str(self.version), "generation": meta.get("generation", 0) + 1}
        self.due[path] = time.monotonic() + lag

    def read(self, path: str) -> dict[str, Any] | None:
        """An object, its status brought up to date if it is time."""
        if (thing := self.things.get(path)) and time.monotonic() >= self.due[path]:
            thing["status"] = self.follow[path](thing)
        return thing


class Handler(BaseHTTPRequestHandler):
    """GET and PATCH of single objects."""

    server: Cluster
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer("GET")

    def do_PATCH(self) -> None:
        self.answer("PATCH")

    def answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        with self.server.lock:
            status, thing = self.done(method, body)
            self.server.log.append((method, status))
        text = json.dumps(thing if status == 200 else {"kind": "Status", "code": status, "message": thing}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def done(self, method: str, body: bytes) -> tuple[int, Any]:
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, "Unauthorized"
        if status := self.server.before(method):
            return status, "etcdserver: request timed out"
        if (thing := self.server.read(self.path)) is None:
            return 404, f"{self.path.rsplit('/', 2)[1]} {self.path.rsplit('/', 1)[1]!r} not found"
        if method == "GET":
            return 200, thing
        if self.headers.get("content-type") != "application/merge-patch+json":
            return 415, "the body of the request was in an unknown format"
        change = json.loads(body)
        if change.get("metadata", {}).get("resourceVersion") not in (None, thing["metadata"]["resourceVersion"]):
            return 409, "the object has been modified; please apply your changes to the latest version and try again"
        new = merge(thing, {"spec": change.get("spec", {})})
        try:
            check(new)
        except ValueError as e:
            return 422, str(e)
        if new["spec"] != thing["spec"]:
            self.server.things[self.path] = new
            self.server.touch(self.path, self.server.lag)
        return 200, self.server.things[self.path]

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


def secure(server: Cluster, home: Path) -> Path:
    """Speak TLS with a certificate of our own; its file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = (
        made.serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(9))
    )
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = made.add_extension(x509.SubjectAlternativeName([address]), False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    form = serialization.PrivateFormat.TraditionalOpenSSL
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    (home / "ca.pem").write_bytes(pem)
    (home / "server.pem").write_bytes(pem + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return home / "ca.pem"
