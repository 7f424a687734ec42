"""The dashboard in a browser over a real server: numbers move, alerts ring, light and dark, sources come and go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import MISSING, PROGRAM, Browser

from llmkit.cli.watcher import Places, Watcher
from llmkit.core.tiny import tiny_model
from llmkit.demos.dashboard import launch
from llmkit.deployment.journal import Book
from llmkit.deployment.plan import Plan
from llmkit.deployment.state import RolloutState
from llmkit.deployment.traffic import drive
from llmkit.monitoring.alerts import read_rules
from llmkit.serving.process import ServerProcess

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=MISSING)
RULES = 'alerts: {slow: {threshold: "P95 > 1ms", severity: warning, for: 0s, note: "Everything is slow."}}'
TEXT = "(document.body?.innerText ?? '')"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A tiny model behind a server that keeps a log."""
    home = tmp_path_factory.mktemp("served")
    models = {"stable-1": tiny_model(home / "model"), "canary-2": tiny_model(home / "other", seed=1)}
    weights = {"stable-1": 0.75, "canary-2": 0.25}
    with ServerProcess(models, weights=weights, variant="torch", slots=4, log=home / "log.db") as found:
        yield found


def dark(page: Browser, wanted: bool) -> None:
    """What the browser tells the page about its owner's taste."""
    features = [{"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}]
    page.call("Emulation.setEmulatedMedia", features=features)


def test_the_dashboard_shows_what_happens(server: ServerProcess, tmp_path: Path) -> None:
    """Requests appear, a rule rings, routes are shown, a missing source says what to do, a stopped server is down."""
    log = server.args[server.args.index("--log") + 1]
    state = RolloutState(alias="llmkit", canary="canary-2", stable="stable-1", plan=Plan().to_dict())
    Book.create(tmp_path / "rollouts" / "monday", state, "ann", "a better model").close()
    places = Places(server.url, server.admin_key, str(log), rollouts=str(tmp_path / "rollouts"))
    drive(server.url, ["def read"] * 4, max_tokens=4)
    with Watcher(places, every=0.5, rules=read_rules(RULES)) as watcher, Browser(tmp_path / "profile") as page:
        demo = launch(watcher)
        try:
            page.go(demo.local_url)
            page.until(f"{TEXT}.includes('alerts firing')")
            drive(server.url, ["def write", "class Reader"] * 20, concurrency=4, max_tokens=8)
            page.until("document.querySelectorAll('.lk-charts svg').length >= 5", 30)
            page.until(f"{TEXT}.includes('Everything is slow.') && {TEXT}.includes('firing')", 30)
            text = page.js(TEXT)
            for words in (
                "stable-1",
                "canary-2",
                "25 %",
                "P95 > 1ms",
                "Time to first token",
                "Cost of a request",
                "tokens a second",
                "monday",
                "planned",
            ):
                assert words in text, words
            assert "not watched: give the folder of retrainings" in text
            assert not any(word in text for word in ("Traceback", "undefined", "NaN")), text
            before = page.js("document.querySelector('.lk-tile:nth-child(2) b').textContent")
            assert before not in ("–", "0/s"), before
            colors = {}
            for name in ("light", "dark"):
                dark(page, name == "dark")
                page.go(f"{demo.local_url}?__theme={name}")
                page.until("document.querySelectorAll('.lk-charts svg').length >= 5", 30)
                colors[name] = page.js("getComputedStyle(document.querySelector('.lk-tile')).backgroundColor")
                page.screenshot(tmp_path / f"{name}.png")
            assert colors["light"] != colors["dark"], colors
            server.stop()
            page.until(f"{TEXT}.includes('down')", 30)
        finally:
            demo.close(verbose=False)
