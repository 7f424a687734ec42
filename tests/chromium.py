"""A headless Chromium, driven over its own DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from websocket import create_connection

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "there is no Chromium here: apt-get install chromium"


def wait(check: Any, seconds: float, what: str) -> Any:
    """What `check` returns as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)
    return found


class Browser:
    """One page of a Chromium with a profile of its own in `home`; ends with the `with` block."""

    def __init__(self, home: Path, width: int = 1200, height: int = 1600) -> None:
        self.home, self.size, self.ids = home, f"{width},{height}", itertools.count(1)

    def __enter__(self) -> Browser:
        words = [str(PROGRAM), "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={self.home}"]
        words += [f"--window-size={self.size}", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"]
        words += ["--no-sandbox"] * (os.geteuid() == 0)  # it refuses to sandbox itself as root
        self.process = subprocess.Popen([*words, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file = self.home / "DevToolsActivePort"
        port, path = wait(lambda: file.exists() and file.read_text().split(), 30, "Chromium to start")
        self.socket = create_connection(f"ws://127.0.0.1:{port}{path}", suppress_origin=True, timeout=60)
        self.session = ""
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Answer of the browser to one command of the protocol."""
        number = next(self.ids)
        words = {"id": number, "method": method, "params": params}
        self.socket.send(json.dumps(words | ({"sessionId": self.session} if self.session else {})))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            pass  # an event
        assert "error" not in answer, answer
        return answer["result"]

    def go(self, url: str) -> None:
        """Open an address."""
        self.call("Page.navigate", url=url)

    def js(self, code: str) -> Any:
        """Value of an expression in the page, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, code: str, seconds: float = 60) -> Any:
        """Wait until an expression in the page is true."""
        return wait(lambda: self.js(code), seconds, code)

    def screenshot(self, path: Path) -> Path:
        """Write what the page looks like as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        return path
