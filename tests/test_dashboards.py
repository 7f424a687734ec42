"""Every query of every dashboard and every rule, asked of a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
from azure_plane.model import mock_model
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llmkit.monitoring.alerts import default_rules
from llmkit.monitoring.dashboards import dashboards
from llmkit.monitoring.declarations import prometheus_config
from llmkit.monitoring.metrics import BY_REASON, LABELS, OWN
from llmkit.monitoring.panels import WINDOW, queries
from llmkit.monitoring.rulefiles import as_yaml, prometheus_rules, rule_names
from llmkit.serving.process import ServerProcess

pytestmark = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="prometheus is not here (Debian's package prometheus brings it)"
)
ROLLOUT = {  # what the controller of rollouts exports, a process of its own
    "rollout_share": (Gauge, ("alias", "revision")),
    "rollout_evidence": (Gauge, ("alias", "gate", "direction")),
    "rollout_verdicts": (Counter, ("alias", "verdict")),
}
RARE = {"rolled back"}  # an annotation that has data only in the minute of a rollback


def get(url: str) -> str:
    with urlopen(url, timeout=10) as reply:
        return reply.read().decode()


def post(url: str, body: dict) -> dict:
    with urlopen(Request(url, json.dumps(body).encode(), {"content-type": "application/json"}), timeout=30) as reply:
        return json.load(reply)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def families(page: str) -> dict[str, str]:
    """The kind of every metric on a page, one without samples included."""
    return dict(re.findall(r"^# TYPE (\S+) (\w+)", page, re.M))


def labelled(page: str) -> set[str]:
    """The families of a page that have samples."""
    return {re.sub(r"_(bucket|sum|count)$", "", m) for m in re.findall(r"^([^#\s{]+)", page, re.M)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("served")
    model, kw = mock_model(folder / "model"), {"engine": "mock", "slots": 4, "price_hour": 3.6}
    with ServerProcess({"v1": model, "v2": model}, weights={"v1": 0.5, "v2": 0.5}, log=folder / "log.db", **kw) as s:
        yield s


def elsewhere(page: str) -> CollectorRegistry:
    """What this server has no reason to count here: GPUs, drift from a profile, failures, and a rollout's controller.

    Names and labels are those of the server's own metrics, so a query with another name or label still finds nothing.
    """
    registry, missing = CollectorRegistry(), {}
    for name, (kind, _, labels) in OWN.items():
        full = f"llmkit:{name}" + ("_total" if kind is Counter else "")
        if full not in labelled(page) or name == "http_responses":
            missing[f"llmkit:{name}"] = (kind, labels)
    missing |= {f"llmkit:{n}": v for n, v in ROLLOUT.items()}
    missing |= {f"vllm:{n}": (Counter, (*LABELS, reason)) for n, reason in BY_REASON.items()}
    values = {"status": ("200", "429", "500"), "finished_reason": ("stop", "error"), "gpu": ("0",)}
    for name, (kind, labels) in missing.items():
        made = kind(name, name, labels, registry=registry)
        choices = next((values[label] for label in labels if label in values), ("x",))
        for i, value in enumerate(choices):
            told = made.labels(*(value if label in values else f"a {label}" for label in labels)) if labels else made
            if isinstance(made, Histogram):
                told.observe(0.1)
            else:
                told.inc(i + 1)
    return registry


def serve(registry: CollectorRegistry) -> ThreadingHTTPServer:
    """A page of metrics as our server gives it; prometheus_client's own server would turn each colon into a line."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(generate_latest(registry))

        def log_message(self, *args: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    return made


@pytest.fixture(scope="module")
def watched(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has scraped the server, under load, for some seconds."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    talk(server, 4)
    exporter = serve(elsewhere(get(f"{server.base}/metrics")))
    targets = [server.base.removeprefix("http://"), f"127.0.0.1:{exporter.server_port}"]
    config = prometheus_config(targets, every_s=1) | {"alerting": {}}
    (folder / "prometheus.yml").write_text(as_yaml(config))
    (folder / "rules.yml").write_text(as_yaml(prometheus_rules(default_rules(), every_s=1)))
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        until(lambda: results(f"http://127.0.0.1:{port}", "count_over_time(up[1m]) >= 2"), folder / "output")
        talk(server, 8, pause_s=0.5)  # while it is scraped, or nothing would have a rate
        until(lambda: results(f"http://127.0.0.1:{port}", "count_over_time(up[1m]) >= 5"), folder / "output")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)
        exporter.shutdown()


def until(ask: object, output: Path) -> None:
    """Ask until there is an answer."""
    end = time.monotonic() + 60
    while True:
        try:
            if ask():  # type: ignore[operator]
                return
        except OSError:
            pass
        assert time.monotonic() < end, output.read_text()[-2000:]
        time.sleep(0.2)


def talk(server: ServerProcess, n: int, pause_s: float = 0.0) -> None:
    """Requests to both revisions, streams among them, and thumbs."""
    for i in range(n):
        body = {"model": server.alias, "prompt": f"def mean{i}(", "max_tokens": 8}
        told = post(f"{server.url}/completions", body)
        post(f"{server.url}/feedback", {"request_id": told["id"], "name": "thumbs", "value": i % 2})
        time.sleep(pause_s)


def results(prometheus: str, query: str) -> list[dict]:
    """What Prometheus answers."""
    found = json.loads(get(f"{prometheus}/api/v1/query?{urlencode({'query': query})}"))
    assert found["status"] == "success"
    return found["data"]["result"]


ASKED = [
    pytest.param(where, query, id=f"{name} {where}")
    for name, board in dashboards(default_rules()).items()
    for where, query in queries(board)
]


@pytest.mark.parametrize(("where", "query"), ASKED)
def test_every_query_of_every_panel_has_an_answer(watched: str, where: str, query: str) -> None:
    within = query.replace(WINDOW, "10s")
    found = results(watched, f"last_over_time(({within})[5m:1s])")  # requests cost something while there are some
    assert found or where in RARE or query.startswith("ALERTS"), query


def test_every_metric_that_is_asked_for_is_one_that_the_server_has(server: ServerProcess) -> None:
    """Also those that have no samples yet, by name: a metric that was renamed is found here."""
    kinds = families(get(f"{server.base}/metrics"))
    known = {*kinds, *(f"llmkit:{n}" + ("_total" if k is Counter else "") for n, (k, _) in ROLLOUT.items()), "up"}
    asked = {m for p in ASKED for m in re.findall(r"\b(?:vllm|llmkit):\w+", p.values[1])}  # type: ignore[arg-type]
    asked |= set(rule_names(default_rules()))
    assert len(asked) > 40
    missing = {m for m in asked if m not in known and re.sub(r"_(bucket|sum|count)$", "", m) not in known}
    assert not missing


def test_prometheus_judges_the_rules_that_ship(watched: str, server: ServerProcess) -> None:
    """None has an error, and a server that answers is not down."""
    until(lambda: all(r["lastEvaluation"][:4] != "0001" for r in rules(watched)), Path(__file__))
    found = rules(watched)
    assert {r["name"] for r in found} == {r.name for r in default_rules()}
    assert [(r["name"], r["lastError"]) for r in found if r["health"] != "ok"] == []
    assert {r["name"]: r["state"] for r in found}["server_down"] == "inactive"


def rules(prometheus: str) -> list[dict]:
    """The rules, as Prometheus sees them."""
    groups = json.loads(get(f"{prometheus}/api/v1/rules"))["data"]["groups"]
    return [r for g in groups for r in g["rules"]]
