"""Block blobs in memory, for machines without Node: what the SDK's uploads and downloads need of the Blob service."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from email.utils import formatdate
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from .web import Reply, Request

VERSION = {"x-ms-version": "2024-11-04", "Server": "Blob-stub"}


@dataclass
class Blob:
    """A blob's bytes, and what is said about it."""

    data: bytes
    metadata: dict[str, str] = field(default_factory=dict)
    kind: str = "application/octet-stream"
    when: str = ""

    @property
    def etag(self) -> str:
        """Changes with the content and the metadata."""
        said = json.dumps([self.metadata, self.when]).encode()
        return f'"0x{hashlib.sha1(self.data + said).hexdigest()[:15].upper()}"'

    def headers(self) -> dict[str, str]:
        """What GET and HEAD answer with."""
        md5 = base64.b64encode(hashlib.md5(self.data).digest()).decode()
        said = {f"x-ms-meta-{name}": value for name, value in self.metadata.items()}
        common = {
            "ETag": self.etag,
            "Last-Modified": self.when,
            "x-ms-blob-type": "BlockBlob",
            "Accept-Ranges": "bytes",
        }
        return common | {"content-type": self.kind, "x-ms-blob-content-md5": md5} | said | VERSION


def error(status: int, code: str) -> Reply:
    """A refusal in the form of the Blob service."""
    body = f"<?xml version='1.0' encoding='utf-8'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return Reply(status, body.encode(), {"x-ms-error-code": code, "content-type": "application/xml"} | VERSION)


class BlobStub:
    """Answers `/account/container/blob`; signatures are not looked at (the door in `blob` checks their expiry)."""

    def __init__(self) -> None:
        self.blobs: dict[str, Blob] = {}
        self.blocks: dict[tuple[str, str], bytes] = {}
        self.containers: set[str] = set()
        self.lock = threading.RLock()

    def answer(self, request: Request) -> Reply:
        """One request."""
        _, _, container, *rest = request.path.split("/", 3)
        with self.lock:
            if request.query.get("restype") == "container":
                return self.container(request, container)
            return self.blob(request, f"{container}/{rest[0] if rest else ''}", container)

    def container(self, request: Request, name: str) -> Reply:
        """Make, look up, or list a container."""
        if request.method == "PUT":
            known = name in self.containers
            self.containers.add(name)
            return error(409, "ContainerAlreadyExists") if known else Reply(201, None, dict(VERSION))
        if name not in self.containers:
            return error(404, "ContainerNotFound")
        return self.list(request, name) if request.query.get("comp") == "list" else Reply(200, None, dict(VERSION))

    def list(self, request: Request, container: str) -> Reply:
        """The blobs of a container that begin with a prefix, in pages; with a delimiter, its folders too."""
        prefix, split = request.query.get("prefix", ""), request.query.get("delimiter", "")
        marker, size = request.query.get("marker", ""), int(request.query.get("maxresults") or 5000)
        start = len(container) + 1
        names = sorted(p[start:] for p in self.blobs if p.startswith(f"{container}/{prefix}"))
        rows, seen = [], set()
        for name in names:
            cut = name.find(split, len(prefix)) if split else -1
            if cut >= 0 and (folder := name[: cut + 1]) not in seen:
                seen.add(folder)
                rows.append((folder, f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>"))
            elif cut < 0:
                rows.append((name, self.row(container, name)))
        rows = [row for row in rows if row[0] >= marker]
        after = rows[size][0] if len(rows) > size else ""
        text = "".join(row for _, row in rows[:size])
        text = f"<Blobs>{text}</Blobs><NextMarker>{escape(after)}</NextMarker>"
        text = f"<?xml version='1.0' encoding='utf-8'?><EnumerationResults>{text}</EnumerationResults>"
        return Reply(200, text.encode(), {"content-type": "application/xml"} | VERSION)

    def row(self, container: str, name: str) -> str:
        """A blob in a list."""
        blob = self.blobs[f"{container}/{name}"]
        said = "".join(f"<{k}>{escape(v)}</{k}>" for k, v in blob.metadata.items())
        facts = f"<Last-Modified>{blob.when}</Last-Modified><Etag>{escape(blob.etag)}</Etag>"
        facts += f"<Content-Length>{len(blob.data)}</Content-Length><Content-Type>{escape(blob.kind)}</Content-Type>"
        facts += "<BlobType>BlockBlob</BlobType>"
        name = escape(name)
        return f"<Blob><Name>{name}</Name><Properties>{facts}</Properties><Metadata>{said}</Metadata></Blob>"

    def blob(self, request: Request, path: str, container: str) -> Reply:
        """Read, write, or describe a blob."""
        if container not in self.containers:
            return error(404, "ContainerNotFound")
        what = request.query.get("comp", "")
        if request.method == "PUT" and what == "block":
            self.blocks[path, request.query["blockid"]] = request.body
            return Reply(201, None, dict(VERSION))
        if request.method == "PUT" and what in ("", "blocklist"):
            return self.write(request, path, self.joined(path, request.body) if what else request.body)
        if (blob := self.blobs.get(path)) is None:
            return error(404, "BlobNotFound")
        if request.method == "PUT" and what == "metadata":
            blob.metadata, blob.when = metadata(request), formatdate(usegmt=True)
            return Reply(200, None, {"ETag": blob.etag, "Last-Modified": blob.when} | VERSION)
        if request.method == "DELETE":
            del self.blobs[path]
            return Reply(202, None, dict(VERSION))
        if request.method == "HEAD":
            return Reply(200, None, blob.headers() | {"content-length": str(len(blob.data))})
        return self.part(request, blob)

    def joined(self, path: str, body: bytes) -> bytes | None:
        """The blocks that a block list names, in its order; nothing if one is unknown."""
        names = [(node.text or "").strip() for node in ET.fromstring(body)]
        parts = [self.blocks.get((path, name)) for name in names]
        return None if None in parts else b"".join(p for p in parts if p is not None)

    def write(self, request: Request, path: str, data: bytes | None) -> Reply:
        """Put a whole blob."""
        if data is None:
            return error(400, "InvalidBlockList")
        if request.headers.get("if-none-match") == "*" and path in self.blobs:
            return error(409, "BlobAlreadyExists")
        kind = request.headers.get("x-ms-blob-content-type", "application/octet-stream")
        blob = self.blobs[path] = Blob(data, metadata(request), kind, formatdate(usegmt=True))
        for key in [k for k in self.blocks if k[0] == path]:
            del self.blocks[key]
        return Reply(201, None, {"ETag": blob.etag, "Last-Modified": blob.when} | VERSION)

    def part(self, request: Request, blob: Blob) -> Reply:
        """The blob, or the range of it that is asked for."""
        wanted = request.headers.get("x-ms-range") or request.headers.get("range")
        if not wanted:
            return Reply(200, blob.data, blob.headers())
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(blob.data) - 1), len(blob.data) - 1)
        if begin >= len(blob.data):
            return error(416, "InvalidRange")
        said = {"Content-Range": f"bytes {begin}-{end}/{len(blob.data)}"}
        return Reply(206, blob.data[begin : end + 1], blob.headers() | said)

    def close(self) -> None:
        """Nothing runs."""


def metadata(request: Request) -> dict[str, str]:
    """What a request says about its blob."""
    return {n.removeprefix("x-ms-meta-"): v for n, v in request.headers.items() if n.startswith("x-ms-meta-")}
