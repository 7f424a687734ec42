"""Alerts against the programs that others run: promtool, amtool, a webhook that hangs, a mail server."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import suppress
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO, ClassVar

import pytest
import yaml
from azure_plane.identity import make_certificate, tls
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llmkit.monitoring.alertloop import AlertLoop, Own, report, start, stop
from llmkit.monitoring.alerts import AlertRule, default_rules, read_rules
from llmkit.monitoring.channels import payload
from llmkit.monitoring.declarations import declarations
from llmkit.monitoring.evaluator import AlertState, Evaluator, alert_labels
from llmkit.monitoring.logfile import RequestRow
from llmkit.monitoring.promql import Divide, Expr, Increase, Moment, OrZero, Over, Quantile, Rate, Series, Vector
from llmkit.monitoring.routes import Routes, alertmanager
from llmkit.monitoring.rulefiles import as_yaml, prometheus_rules, prometheus_tests
from llmkit.monitoring.series import Labels, Matcher, Store, Target, labels_of
from llmkit.monitoring.traces import make_span

ROOT = Path(__file__).resolve().parents[1]
STEP_S = 15


def needs(program: str) -> pytest.MarkDecorator:
    """Skip where one of Prometheus' programs is not installed."""
    package = "prometheus" if program in ("promtool", "prometheus") else "prometheus-alertmanager"
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not here (Debian's {package} brings it)")


# The same questions to promtool and to us

Script = list[tuple[Labels, list[str]]]  # a series and its samples, as promtool writes them
Question = tuple[str, float]  # an expression and when it is asked


def asked(folder: Path, tests: list[tuple[Script, list[Question]]], rules: dict | None = None) -> list[Vector]:
    """What promtool answers. Its tests are made to fail, for then it says what it got, with every digit."""
    (folder / "rules.yml").write_text(yaml.safe_dump(rules or {"groups": []}))
    never = [{"labels": "never", "value": 1}]
    groups = [
        {
            "interval": f"{STEP_S}s",
            "input_series": [{"series": notation(k), "values": " ".join(v)} for k, v in script],
            "promql_expr_test": [
                {"expr": q, "eval_time": f"{round(t * 1000)}ms", "exp_samples": never} for q, t in questions
            ],
        }
        for script, questions in tests
    ]
    file = folder / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": groups}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    answers = re.findall(r"got:(.*)", done.stdout + done.stderr)
    assert len(answers) == sum(len(q) for _, q in tests), (done.stdout + done.stderr)[:2000]
    return [samples(a) for a in answers]


def notation(labels: Labels) -> str:
    """A series as promtool writes it."""
    found = dict(labels)
    name = found.pop("__name__")
    return name + "{" + ",".join(f'{k}="{v}"' for k, v in found.items()) + "}"


def samples(text: str) -> Vector:
    """The samples in a line of promtool's."""
    found = re.findall(r"(\S*?)\{([^}]*)\} (\S+?)(?:,|$)", text.strip())
    return {labels_of(n, dict(re.findall(r'(\w+)="([^"]*)"', inner))): float(v) for n, inner, v in found}


def filled(script: Script) -> Store:
    """The same series in a store of ours."""
    store = Store(keep_s=1e6)
    for labels, values in script:
        for i, v in enumerate(values):
            if v != "_":
                store.add(labels, i * STEP_S, None if v == "stale" else float(v))
    return store


def counter(rng: random.Random, n: int) -> list[str]:
    """A counter with gaps, restarts and, now and then, an end."""
    total, made = float(rng.choice([0, 0, rng.randint(1, 50)])), []
    for _ in range(n):
        total = 0.0 if rng.random() < 0.03 else total + rng.choice([0, 1, 2, rng.random() * 9])
        made.append("_" if rng.random() < 0.2 else "stale" if rng.random() < 0.02 else repr(total))
    return ["_"] * rng.randint(0, 5) + made


def story(rng: random.Random) -> Script:
    """Counters, buckets and gauges of two servers."""
    n, script = rng.randint(5, 60), []
    for server in ("a", "b"):
        for status in ("200", "500"):
            script.append((labels_of("n_total", {"server": server, "status": status}), counter(rng, n)))
        at = {"server": server}
        bounds, rises = ["0.1", "0.25", "1", "+Inf"], [[rng.choice([0, 1, 3]) for _ in range(n)] for _ in range(4)]
        for b, le in enumerate(bounds):
            below = [sum(sum(r[: i + 1]) for r in rises[: b + 1]) for i in range(n)]
            values = ["_" if rng.random() < 0.1 else str(v) for v in below]
            script.append((labels_of("s_bucket", at | {"le": le}), values))
        script.append((labels_of("g", at), ["_" if rng.random() < 0.6 else f"{rng.gauss(0, 1):.3f}" for _ in range(n)]))
    return script


FAILS = Rate(Series("n_total", (Matcher("status", "=~", "5.."),)))
EXPRESSIONS: list[Expr] = [
    Series("g"),
    Rate(Series("n_total")),
    Increase(Series("n_total", (Matcher("status", "!=", "200"),))),
    Over("sum", ("server",), Rate(Series("n_total"))),
    Over("max", (), Series("g")),
    Over("min", ("server", "status"), Rate(Series("n_total"))),
    Divide(Over("sum", ("server",), FAILS), Over("sum", ("server",), Rate(Series("n_total"))), factor=100),
    Quantile(0.95, Over("sum", ("server", "le"), Rate(Series("s_bucket")))),
    Quantile(0.5, Over("sum", ("le",), Rate(Series("s_bucket")))),
    OrZero(Over("sum", (), Series("nothing"))),
]


def same(ours: Vector, theirs: Vector) -> bool:
    """Equal labels, and numbers that differ by no more than sums in another order do."""
    return ours.keys() == theirs.keys() and all(
        (math.isnan(v) and math.isnan(theirs[k])) or math.isclose(v, theirs[k], rel_tol=1e-9, abs_tol=1e-12)
        for k, v in ours.items()
    )


@needs("promtool")
def test_every_expression_agrees_with_prometheus_on_random_series(tmp_path: Path) -> None:
    rng = random.Random(7)
    tests, ours = [], []
    for _ in range(40):
        script, window_s = story(rng), rng.choice([60, 120, 300])
        store, questions = filled(script), []
        for expression in EXPRESSIONS:
            at = rng.choice([rng.randint(0, 80) * STEP_S, rng.randint(0, 1_200_000) / 1000])
            questions.append((expression.promql(f"{window_s}s"), at))
            ours.append(expression.vector(Moment(store, round(at * 1000), window_s * 1000)))
        tests.append((script, questions))
    theirs = asked(tmp_path, tests)
    asking = [q for _, questions in tests for q in questions]
    wrong = [(q, a, b) for q, a, b in zip(asking, ours, theirs, strict=True) if not same(a, b)]
    assert not wrong, "\n".join(map(str, wrong[:5]))
    assert sum(map(bool, theirs)) > 200  # most questions have an answer


# Rules


RULES = """
share: {threshold: "error_rate > 20%", for: 0s, window: 1m}
late: {threshold: "P95 > 200ms", for: 1m, window: 2m}
quick: {threshold: "P50 <= 0.1s", for: 30s, window: 1m}
queue: {threshold: "queue >= 3", severity: info, for: 1m30s}
right: {threshold: "accuracy < 0.9", severity: critical, for: 15s}
lost: {threshold: "request_log_lost > 0", for: 0s, window: 2m, labels: {team: data}}
down: {threshold: "servers_up < 1", for: 45s}
"""


def life(rng: random.Random) -> Script:
    """Series of the names that the rules above read, with gaps, ends and returns."""
    n = rng.randint(20, 70)

    def gauge(name: str, values: list[float], **labels: str) -> tuple[Labels, list[str]]:
        now, made = rng.choice(values), []
        for _ in range(n):
            now = rng.choice(values) if rng.random() < 0.2 else now
            made.append("_" if rng.random() < 0.1 else "stale" if rng.random() < 0.03 else repr(now))
        return labels_of(name, labels), made

    script = [gauge("up", [0.0, 1.0, 1.0], job="llmkit"), (labels_of("llmkit:request_log_lost_total"), counter(rng, n))]
    for model in ("v1", "v2"):
        script.append(gauge("vllm:num_requests_waiting", [0.0, 2.0, 3.0, 5.0], model_name=model, engine="0"))
        script.append(gauge("llmkit:accuracy", [0.85, 0.9, 0.95], revision=model))
        fast, slow = counter(rng, n), counter(rng, n)
        for le, values in (("0.1", fast), ("1.0", slow), ("+Inf", slow)):
            name = "vllm:e2e_request_latency_seconds_bucket"
            script.append((labels_of(name, {"model_name": model, "le": le}), values))
    for status in ("200", "500", "503"):
        script.append((labels_of("llmkit:http_responses_total", {"status": status}), counter(rng, n)))
    return script


@needs("promtool")
def test_alerts_are_pending_firing_and_gone_when_prometheus_says_so(tmp_path: Path) -> None:
    """Every step of random lives: our states against Prometheus' own series ALERTS."""
    rules, rng = read_rules(RULES), random.Random(11)
    tests, ours = [], []
    for _ in range(6):
        script, end = life(rng), 80
        store = filled(script)
        evaluator, questions = Evaluator(rules, store), []
        for step in range(end):
            evaluator.evaluate(step * STEP_S)
            questions.append(("ALERTS", step * STEP_S))
            now = {labels_of("ALERTS", a.labels | {"alertstate": a.state}): 1.0 for a in evaluator.active.values()}
            ours.append(now)
        tests.append((script, questions))
    theirs = asked(tmp_path, tests, prometheus_rules(rules))
    wrong = [(i, a.keys() ^ b.keys()) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not same(a, b)]
    assert not wrong, "\n".join(map(str, wrong[:5]))
    seen = {(dict(k)["alertname"], dict(k)["alertstate"]) for v in theirs for k in v}
    assert len(seen) >= 12, seen  # nearly every rule was pending, and fired


@needs("promtool")
def test_promtool_is_content_with_all_cases_of_rules_of_every_kind(tmp_path: Path) -> None:
    texts = ["P99.9 > 5s", "ttft_p95 >= 250ms", "throughput < 1/s", "cost_per_1k_tokens > $0.02", "memory > 90%"]
    texts += ["drift_alarms > 0", "satisfaction <= 0.5", "servers_up < 3", "failed_rate > 1%", "network_io > 100MB/s"]
    holds = ["0s", "1m30s"]
    rules = [AlertRule(name=f"r{i}", threshold=t, for_=holds[i % 2], window="2m") for i, t in enumerate(texts)]
    assert promtool(tmp_path, rules, prometheus_tests(rules)) == ""


@needs("promtool")
def test_promtool_would_say_if_a_rule_did_not_do_what_its_cases_say(tmp_path: Path) -> None:
    """The cases are no decoration: a bound, a duration or a label that is wrong in the rules is found."""
    rules = default_rules()
    for change in ({"threshold": "P95 > 300ms"}, {"for_": "30m"}, {"severity": "info"}):
        (folder := tmp_path / next(iter(change))).mkdir()
        other = [AlertRule.from_dict(rules[0].to_dict() | {k.rstrip("_"): v for k, v in change.items()})]
        assert "high_latency" in promtool(folder, other, prometheus_tests(rules[:1]))


def promtool(folder: Path, rules: list[AlertRule], tests: dict) -> str:
    """What promtool complains about; empty if it does not."""
    (folder / "rules.yml").write_text(as_yaml(prometheus_rules(rules)))
    (folder / "tests.yml").write_text(as_yaml(tests))
    for words in (("check", "rules", "rules.yml"), ("test", "rules", "tests.yml")):
        done = subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            return done.stdout + done.stderr
    return ""


# Alertmanager, Azure, the files that ship


@needs("amtool")
def test_alertmanager_takes_the_routes_and_sends_each_severity_where_it_belongs(tmp_path: Path) -> None:
    file = ROOT / "azure" / "monitoring" / "alertmanager.yml"
    done = subprocess.run(["amtool", "check-config", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for rule in default_rules():
        words = ["amtool", "config", "routes", "test", f"--config.file={file}"]
        labels = [f"{k}={v}" for k, v in alert_labels(rule).items()]
        told = subprocess.run([*words, *labels], capture_output=True, text=True).stdout.strip()
        assert told == rule.severity
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(file.read_text().replace("receiver: nobody", "receiver: somebody"))
    assert subprocess.run(["amtool", "check-config", wrong], capture_output=True).returncode


def test_what_ships_is_what_the_rules_give() -> None:
    """`azure/monitoring` is generated: `write_monitoring("azure/monitoring")`."""
    folder = ROOT / "azure" / "monitoring"
    made = declarations()
    found = {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}
    assert found.keys() == made.keys()
    assert [name for name, text in made.items() if found[name] != text] == []


@needs("promtool")
def test_prometheus_takes_the_files_that_ship() -> None:
    folder = ROOT / "azure" / "monitoring"
    for words in (
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "tests.yml"),
    ):
        done = subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_template_for_azure_uses_what_it_declares() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    from bicep import problems

    assert problems(ROOT / "azure" / "monitoring") == []


def test_what_the_queries_for_azure_read_is_what_its_exporter_sends() -> None:
    """ResultCode, DurationMs and the model in Properties, of a request that went well and of one that did not."""
    made = pytest.importorskip("azure.monitor.opentelemetry.exporter.export.trace._exporter")
    memory, traces = InMemorySpanExporter(), TracerProvider()
    traces.add_span_processor(SimpleSpanProcessor(memory))
    for status in (200, 503):
        row = RequestRow("a", 1e9, "llmkit", "v1", "/v1/chat/completions", status, 3, 4, 0.0, 0.1, 0.75, "stop")
        make_span(traces.get_tracer("llmkit"), row)
    found = [made._convert_span_to_envelope(span) for span in memory.get_finished_spans()]
    assert [e.data.base_type for e in found] == ["RequestData"] * 2  # the table AppRequests
    assert [e.data.base_data.response_code for e in found] == ["200", "503"]
    assert {e.data.base_data.properties["gen_ai.response.model"] for e in found} == {"v1"}
    assert {e.data.base_data.duration for e in found} == {"0.00:00:00.750"}


# Receivers that hang, fail and come back


class Receiver(BaseHTTPRequestHandler):
    """A webhook with moods: it takes what it gets, answers 500, or says nothing."""

    mood = "well"
    told: ClassVar[list[dict]] = []
    tries = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).tries += 1
        if self.mood == "hangs":
            self.server.wait.wait(30)  # type: ignore[attr-defined]
            return
        if self.mood == "well":
            self.told.append(body)
        self.send_response(200 if self.mood == "well" else 500)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[str]:
    Receiver.mood, Receiver.tries = "well", 0
    Receiver.told.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.wait = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.wait.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_an_hour_of_500_loses_nothing_and_tries_a_bounded_number_of_times(hook: str, tmp_path: Path) -> None:
    """A clock of our own: alerts come and go for an hour, a restart in the middle, and all is told afterwards."""
    Receiver.mood = "fails"
    routes = Routes.from_dict({"webhooks": {"chat": {"url": hook}}, "habits": {"critical": QUICK}})
    page = {"celsius": "50"}
    target = Own(lambda: f'llmkit:gpu_temperature_celsius{{gpu="0"}} {page["celsius"]}\n'.encode())
    rules = [AlertRule(name="hot", threshold="gpu_temperature > 85C", severity="critical", for_="0s")]
    loop, expected = AlertLoop(rules, [target], routes, tmp_path), 0
    for now in range(0, 3600, 15):
        page["celsius"] = "90" if now % 600 < 300 else "50"
        expected += len(loop.tick(now))
        while loop.couriers[0].carry(now):
            pass
        if now == 1800:
            stop(loop)
            loop = AlertLoop(rules, [target], routes, tmp_path)
    assert expected == 12 and Receiver.told == []
    assert 12 <= Receiver.tries < 40  # one group: its oldest message is tried, the others wait behind it
    Receiver.mood = "well"
    for now in range(3600, 4600, 15):
        page["celsius"] = "50"
        loop.tick(now)
        while loop.couriers[0].carry(now):
            pass
    assert [b["status"] for b in Receiver.told] == ["firing", "resolved"] * 6  # all of it, and in order
    assert loop.outbox.counts() == {"waiting": 0, "dead": 0, "dropped": 0}
    stop(loop)


QUICK = {"receivers": ["chat"], "wait": "0s", "interval": "0s"}


def test_a_webhook_that_hangs_keeps_neither_the_rules_nor_the_mail_waiting(hook: str, tmp_path: Path) -> None:
    Receiver.mood = "hangs"
    with MailServer() as mail:
        to = {"to": ["ops@example.com"], "sender": "llmkit@example.com", "host": "127.0.0.1", "port": mail.port}
        to |= {"tls": False}
        data = {"webhooks": {"chat": {"url": hook, "timeout_s": 20}}, "mails": {"ops": to}}
        routes = Routes.from_dict(data | {"habits": {"critical": QUICK | {"receivers": ["chat", "ops"]}}})
        rules = [AlertRule(name="down", threshold="servers_up < 1", severity="critical", for_="0s")]
        loop = AlertLoop(rules, [Target("http://127.0.0.1:1/metrics")], routes, tmp_path, every_s=0.02)
        start(loop)
        until(lambda: mail.mails and Receiver.tries)
        seen = loop.ticks
        until(lambda: loop.ticks > seen + 5)  # judged on, while the webhook holds its courier
        assert loop.outbox.counts()["waiting"] == 1
        stop(loop, seconds=0.1)
    head = message_from_bytes(mail.mails[0], policy=policy.default)
    text = head.get_content()
    assert head["Subject"] == "[FIRING:1] down (critical)" and head["To"] == "ops@example.com"
    assert "servers_up < 1, now 0" in text
    again = AlertLoop(rules, [Target("http://127.0.0.1:1/metrics")], routes, tmp_path)  # a restart
    Receiver.mood = "well"
    while again.couriers[0].carry(time.time() + 60):
        pass
    assert [b["status"] for b in Receiver.told] == ["firing"]  # what the webhook never took
    again.tick(time.time())
    assert again.outbox.counts()["waiting"] == 0  # and nothing is told twice
    stop(again)


def test_no_secret_is_printed(hook: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "token").write_text("hunter2")
    Receiver.mood = "fails"
    routes = Routes.from_dict({"webhooks": {"chat": {"url": hook, "token": f"file:{tmp_path}/token"}}})
    loop = AlertLoop(default_rules(), [], routes, tmp_path)
    loop.outbox.put([("chat", "g", {})], {}, 0)
    assert loop.couriers[0].carry(1)
    shown = json.dumps([report(loop), routes.to_dict(), alertmanager(routes)], default=str) + repr(routes) + caplog.text
    assert "answered 500" in shown and "hunter2" not in shown
    assert b"hunter2" not in (tmp_path / "alerts.db").read_bytes()
    stop(loop)


class MailServer:
    """A mail server of a few lines, real enough for smtplib."""

    def __enter__(self) -> MailServer:
        self.mails: list[bytes] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self.socket.accept()
                with line, line.makefile("rwb") as talk, suppress(OSError):
                    self.talk(talk)

    def talk(self, talk: BinaryIO) -> None:
        def say(text: str) -> None:
            talk.write(text.encode() + b"\r\n")
            talk.flush()

        say("220 here")
        while word := talk.readline().strip().upper():
            if word == b"DATA":
                say("354 go on")
                lines = list(iter(talk.readline, b".\r\n"))
                self.mails.append(b"".join(lines))
            say("250 fine" if word != b"QUIT" else "221 bye")


class Secure(MailServer):
    """One that wants STARTTLS and a password before it takes a mail; who says more in the clear is cut off."""

    def __init__(self, certificate: tuple[Path, Path], password: str) -> None:
        self.context, self.password, self.clear = tls(*certificate), password, list[bytes]()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                line, _ = self.socket.accept()
                with line, suppress(OSError):
                    self.open(line)

    def open(self, line: socket.socket) -> None:
        """The talk in the clear, up to STARTTLS, and the rest."""
        line.sendall(b"220 here\r\n")
        with line.makefile("rb") as said:
            while word := said.readline().strip():
                self.clear.append(word)
                if word.upper() == b"STARTTLS":
                    line.sendall(b"220 go on\r\n")
                    break
                line.sendall(b"250-here\r\n250 STARTTLS\r\n" if word.upper().startswith(b"EHLO") else b"530 no\r\n")
            else:
                return
        with self.context.wrap_socket(line, server_side=True) as safe, safe.makefile("rwb") as talk:
            self.talk(talk)

    def talk(self, talk: BinaryIO) -> None:
        def say(text: str) -> None:
            talk.write(text.encode() + b"\r\n")
            talk.flush()

        known = False
        while word := talk.readline().strip():
            verb = word.upper().split()[0]
            if verb == b"EHLO":
                say("250-here\r\n250 AUTH PLAIN")
            elif verb == b"AUTH":
                known = b64decode(word.split()[-1]).split(b"\0")[-1].decode() == self.password
                say("235 welcome" if known else "535 no")
            elif verb == b"DATA" and known:
                say("354 go on")
                self.mails.append(b"".join(iter(talk.readline, b".\r\n")))
                say("250 fine")
            else:
                say("221 bye" if verb == b"QUIT" else "250 fine" if known else "530 who are you?")


def test_a_mail_goes_out_encrypted_and_only_to_a_server_with_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = make_certificate(tmp_path)
    (tmp_path / "password").write_text("hunter2\n")
    with Secure(certificate, "hunter2") as server:
        to = {"to": ["ops@example.com"], "sender": "llmkit@example.com", "host": "127.0.0.1", "port": server.port}
        to |= {"user": "llmkit", "password": f"file:{tmp_path}/password"}
        routes = Routes.from_dict({"mails": {"ops": to}})
        loop = AlertLoop(default_rules(), [], routes, tmp_path)
        alert = AlertState("hot", {"alertname": "hot", "severity": "info"}, {}, 90.0, "firing", 0.0, 0.0)
        loop.outbox.put([("ops", "g", payload("ops", {"alertname": "hot"}, [alert], "g"))], {}, 0)
        assert loop.couriers[0].carry(1) and server.mails == []  # nobody has signed the certificate
        assert "CERTIFICATE_VERIFY_FAILED" in loop.couriers[0].last_error
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        (tmp_path / "password").write_text("wrong")
        assert loop.couriers[0].carry(400) and server.mails == []
        assert "535" in loop.couriers[0].last_error
        (tmp_path / "password").write_text("hunter2\n")
        stop(loop)
        loop = AlertLoop(default_rules(), [], routes, tmp_path)  # a restart: it is still there, and tried again
        assert loop.outbox.due("ops", 400.5) is None  # not at once: how long to wait is on the disk as well
        assert loop.couriers[0].carry(900) and loop.outbox.counts()["waiting"] == 0
        shown = caplog.text + json.dumps(report(loop))
        stop(loop)
    head = message_from_bytes(server.mails[0], policy=policy.default)
    assert head["Subject"] == "[FIRING:1] hot (info)" and head["Date"].datetime.year > 2000
    assert {w.upper().split()[0] for w in server.clear} == {b"EHLO", b"STARTTLS"}  # nothing else in the clear
    assert "hunter2" not in shown and "wrong" not in shown


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
