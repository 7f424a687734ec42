"""Alerts against the programs that others run: promtool, amtool, a webhook that hangs, a mail server."""

from __future__ import annotations

import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from llmkit.monitoring.alerts import AlertRule, default_rules, read_rules
from llmkit.monitoring.evaluator import Evaluator
from llmkit.monitoring.promql import Divide, Expr, Increase, Moment, OrZero, Over, Quantile, Rate, Series, Vector
from llmkit.monitoring.rulefiles import as_yaml, prometheus_rules, prometheus_tests
from llmkit.monitoring.series import Labels, Matcher, Store, labels_of

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
