"""Requests, answers, routes by pattern, and an https server with a thread a connection."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit


class ArmError(Exception):
    """A refusal in the form that Azure Resource Manager gives it."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def reply(self) -> Reply:
        """The answer that says so."""
        body = {"error": {"code": self.code, "message": self.message, "target": None, "details": []}}
        headers = {name.replace("_", "-"): value for name, value in self.headers.items()}
        return Reply(self.status, body, {"x-ms-error-code": self.code} | headers)


@dataclass
class Request:
    """What came in."""

    method: str
    path: str  # decoded, without the query
    query: dict[str, str]  # names in lower case
    headers: dict[str, str]  # names in lower case
    body: bytes = b""
    target: str = ""  # path and query as they were sent
    base: str = ""  # https://host:port of the server

    @property
    def json(self) -> dict[str, Any]:
        """The body as an object."""
        try:
            found = json.loads(self.body or b"{}")
        except ValueError as e:
            raise ArmError(400, "InvalidRequestContent", f"the body is not JSON: {e}") from None
        if not isinstance(found, dict):
            raise ArmError(400, "InvalidRequestContent", "the body is not an object")
        return found


@dataclass
class Reply:
    """What goes out: an object as JSON, bytes as they are, an iterator in chunks."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)

    def payload(self) -> bytes | Iterator[bytes]:
        """The body as bytes."""
        if self.body is None:
            return b""
        if isinstance(self.body, bytes | Iterator):
            return self.body
        self.headers.setdefault("content-type", "application/json; charset=utf-8")
        return json.dumps(self.body).encode()


Handler = Callable[..., Reply]


class Router:
    """Routes: a method and a path pattern such as `/jobs/{name}`; `{rest*}` takes slashes too."""

    def __init__(self) -> None:
        self.routes: list[tuple[str, re.Pattern[str], Handler]] = []

    def add(self, method: str, pattern: str, handler: Handler) -> None:
        """Answer `method pattern` with `handler(request, **parts)`; ARM paths know no upper and lower case."""
        named = re.sub(r"\{(\w+)(\*?)\}", lambda m: f"(?P<{m[1]}>{'.*' if m[2] else '[^/]+'})", pattern)
        self.routes.append((method, re.compile(named, re.I), handler))

    def answer(self, request: Request) -> Reply:
        """The answer of the first route that matches."""
        known = False
        for method, pattern, handler in self.routes:
            if (found := pattern.fullmatch(request.path.rstrip("/") or "/")) is not None:
                if method in (request.method, "*"):
                    return handler(request, **found.groupdict())
                known = True
        if known:
            raise ArmError(405, "MethodNotAllowed", f"{request.method} {request.path} is not supported")
        raise ArmError(404, "InvalidResourceType", f"no such route: {request.method} {request.path}")


class Dropped(Exception):
    """The connection is to be cut without an answer."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def get_request(self) -> tuple[ssl.SSLSocket, Any]:
        plain, address = self.socket.accept()
        plain.settimeout(60)  # the handshake is done in the connection's own thread
        return self.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


class Server:
    """An https server on loopback; `answer(request)` is called in a thread of its own."""

    def __init__(self, answer: Callable[[Request], Reply], context: ssl.SSLContext) -> None:
        self.httpd = _Server(("127.0.0.1", 0), _handler(answer, self), bind_and_activate=True)
        self.httpd.context = context  # type: ignore[attr-defined]
        self.port = self.httpd.server_address[1]
        self.url = f"https://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop listening."""
        self.httpd.shutdown()
        self.httpd.server_close()


def _handler(answer: Callable[[Request], Reply], server: Server) -> type[BaseHTTPRequestHandler]:
    class One(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def read(self) -> bytes:
            if "chunked" not in self.headers.get("transfer-encoding", ""):
                return self.rfile.read(int(self.headers.get("content-length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def serve(self) -> None:
            url = urlsplit(self.path)
            query = {name.lower(): value for name, value in parse_qsl(url.query, keep_blank_values=True)}
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.read()
            request = Request(self.command, unquote(url.path), query, headers, body, self.path, server.url)
            try:
                reply = answer(request)
            except ArmError as e:
                reply = e.reply()
            except Dropped:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            except Exception:  # noqa: BLE001 - a mistake of the plane's own must reach the test that met it
                text = traceback.format_exc()
                reply = ArmError(500, "PlaneMistake", text).reply()
            self.send(reply)

        def send(self, reply: Reply) -> None:
            payload = reply.payload()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            whole = isinstance(payload, bytes)
            if whole and "content-length" not in {n.lower() for n in reply.headers}:
                self.send_header("content-length", str(len(payload)))
            if not whole:
                self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            if self.command == "HEAD":
                return
            try:
                for part in [payload] if whole else payload:
                    self.wfile.write(part if whole else b"%x\r\n%s\r\n" % (len(part), part))
                if not whole:
                    self.wfile.write(b"0\r\n\r\n")
            finally:
                getattr(payload, "close", bool)()  # a stream whose reader has gone ends here

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = serve

        def log_message(self, *args: Any) -> None:
            """The plane keeps a log of its own."""

    return One
