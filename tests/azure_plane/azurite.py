"""Azurite, Microsoft's own emulator of the Blob service, where Node and it are installed."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from .web import Reply, Request

KEPT = {"content-length", "transfer-encoding", "connection", "keep-alive", "date"}


def find() -> list[str]:
    """The command that starts Azurite: `LLMKIT_AZURITE`, the PATH, or `npm install --prefix .azurite azurite`."""
    if not shutil.which("node"):
        return []
    named = os.environ.get("LLMKIT_AZURITE") or shutil.which("azurite-blob")
    if not named:
        local = Path(__file__).resolve().parents[2] / ".azurite/node_modules/.bin/azurite-blob"
        named = str(local) if local.exists() else ""
    return [named] if named and named != "none" else []


class Azurite:
    """A running Azurite; requests are handed on to it over plain http on loopback."""

    def __init__(self, command: list[str], folder: Path, account: str, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        words = [*command, "--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(folder)]
        words += ["--skipApiVersionCheck", "--disableTelemetry", "--disableProductStyleUrl", "--silent"]
        self.log = (folder / "azurite.log").open("wb")
        env = os.environ | {"AZURITE_ACCOUNTS": f"{account}:{key}"}
        self.process = subprocess.Popen(words, env=env, stdout=self.log, stderr=self.log, start_new_session=True)
        self.wait(folder)

    def wait(self, folder: Path) -> None:
        """Until it listens."""
        for _ in range(300):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.close()
        raise RuntimeError(f"Azurite did not start:\n{(folder / 'azurite.log').read_text()[-2000:]}")

    def answer(self, request: Request) -> Reply:
        """Hand a request on as it came."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {n: v for n, v in request.headers.items() if n not in ("transfer-encoding", "connection")}
            headers["content-length"] = str(len(request.body))
            connection.request(request.method, request.target, request.body, headers)
            found = connection.getresponse()
            head = request.method == "HEAD"
            kept = {
                n: v for n, v in found.getheaders() if n.lower() not in KEPT or (head and n.lower() == "content-length")
            }
            return Reply(found.status, found.read(), kept)
        finally:
            connection.close()

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
