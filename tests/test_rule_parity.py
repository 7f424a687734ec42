"""Random rules over random series: our evaluator fires when Prometheus does, on what nobody thought of too."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

from test_alerts import STEP_S, Question, Script, asked, filled, needs, same

from llmkit.core.errors import ConfigError
from llmkit.monitoring.alerts import AlertRule
from llmkit.monitoring.evaluator import Evaluator
from llmkit.monitoring.metrics import BY_REASON, HISTOGRAMS, LABELS, OWN, Buckets
from llmkit.monitoring.promql import Divide, Increase, OrZero, Over, Quantile
from llmkit.monitoring.rulefiles import prometheus_rules
from llmkit.monitoring.series import Labels, labels_of
from llmkit.monitoring.signals import SIGNALS, TIMES, UNITS, signal

VALUES = {"instance": ["a:1", "b:1"], "model_name": ["v1", "v2"], "revision": ["v1", "v2"], "gpu": ["0", "1"]}
VALUES |= {"engine": ["0"], "path": ["/v1"], "job": ["llmkit"], "alias": ["llmkit", "code"]}
VALUES |= {"kind": ["prompts", "predictions"], "status": ["200", "429", "500", "503"], "direction": ["read", "write"]}
VALUES |= {"finished_reason": ["stop", "error"], "verdict": ["rollback", "rolled_back", "promote"]}
USUAL = {
    "bytes": 5e9,
    "bytes a second": 1e6,
    "degrees": 85,
    "watts": 300,
    "dollars": 0.02,
    "dollars a second": 1 / 1200,
}
USUAL |= {"a second": 3, "seconds": 60, "dollars a second": 1 / 1200}


def labels_of_metric(name: str) -> list[str]:
    """The labels that the series of a metric have, once a server has been scraped."""
    short = re.sub(r"_(total|bucket)$", "", name.partition(":")[2])
    if name == "up":
        return ["job", "instance"]
    if name.startswith("vllm:"):
        return [*LABELS, *([BY_REASON[short]] if short in BY_REASON else []), "instance"]
    own = ("alias", "verdict") if short == "rollout_verdicts" else OWN[short if short in OWN else name[7:]][2]
    return [*own, "instance"]


def bound_of(rng: random.Random, name: str) -> float:
    """A bound that is crossed now and then."""
    s = signal(name)
    if isinstance(s.expr, Quantile):
        family = s.expr.leaves()[0].name.removeprefix("vllm:").removesuffix("_bucket")
        return rng.choice(getattr(Buckets(), HISTOGRAMS[family])) * rng.choice([1, rng.random()])
    if s.high == 1:
        return rng.choice([0.01, 0.05, 0.5, 0.95, 1.0, 0.0, rng.random()])
    return rng.choice([0, 1, 2, 3, 0.5]) if s.unit == "count" else USUAL[s.unit] * rng.choice([1, rng.random() * 2])


def any_rule(rng: random.Random, name: str) -> AlertRule:
    """A rule of any signal, comparison, unit, duration, window and label that the grammar takes."""
    while True:
        percentile = f"{rng.choice(list(TIMES))}_p{rng.choice(['50', '90', '95', '99', '99.9', '12.5', '1'])}"
        what = percentile.replace("latency_p", "P") if rng.random() < 0.35 else rng.choice(list(SIGNALS))
        unit, scale = rng.choice(list(UNITS[signal(what).unit].items()))
        number = f"{bound_of(rng, what) / scale:.6g}"
        bound = f"${number}{unit[1:]}" if unit.startswith("$") else number + rng.choice(["", " "]) + unit
        options = {
            "severity": rng.choice(["info", "warning", "critical"]),
            "labels": rng.choice([{}, {"team": "data"}]),
        }
        options |= {"for_": rng.choice(["0s", "0", "15s", "30s", "1m30s", "500ms", "20s"])}
        options |= {"window": rng.choice(["1m", "1m30s", "2m", "5m", "7m30s"])}
        try:
            return AlertRule(name=name, threshold=f"{what} {rng.choice(['>', '>=', '<', '<='])} {bound}", **options)
        except ConfigError:  # one that holds never, or always
            continue


def frayed(rng: random.Random, values: list[float]) -> list[str]:
    """The same with gaps and ends; some come late, leave without a word, or leave and come back."""
    made = []
    for v in values:
        chance = rng.random()
        made.append("_" if chance < 0.1 else "stale" if chance < 0.12 else "NaN" if math.isnan(v) else repr(v))
    at, chance = rng.randrange(len(made)), rng.random()
    if chance < 0.15:
        return ["_"] * rng.randint(1, 20) + made
    if chance < 0.3:
        return made[: at + 1]
    return made[:at] + ["stale"] + ["_"] * rng.randint(1, 25) + made[at:] if chance < 0.4 else made


def gauge(rng: random.Random, n: int, bound: float) -> list[str]:
    """Values around a bound, on it, and now and then none that is a number."""
    values = [bound, bound / 2, bound * 2, (bound or 1) * (1 + 1e-9), 0.0, *([math.nan] if rng.random() < 0.3 else [])]
    now, made = rng.choice(values), []
    for _ in range(n):
        now = rng.choice(values) if rng.random() < 0.15 else now
        made.append(now)
    return frayed(rng, made)


def counter(rng: random.Random, n: int, rate: float) -> list[str]:
    """A counter that rises by about `rate` a second, rests, and begins again."""
    total, speed, made = rng.choice([0.0, 0.0, 1e6 * rng.random()]), rate, []
    for _ in range(n):
        speed = rate * rng.choice([0, 0.3, 1, 1, 2, 5]) if rng.random() < 0.1 else speed
        total = 0.0 if rng.random() < 0.03 else total + speed * STEP_S * rng.choice([0, 1, 1, 2])
        made.append(math.nan if rng.random() < 0.003 else total)
    return frayed(rng, made)


def histogram(rng: random.Random, n: int, bounds: tuple[float, ...]) -> dict[str, list[str]]:
    """Buckets of many observations or next to none, which are not always all read."""
    few, at, counts = rng.random() < 0.3, rng.randrange(len(bounds)), [0.0] * (len(bounds) + 1)
    columns: list[list[str]] = [[] for _ in counts]
    for _ in range(n):
        at = rng.randrange(len(bounds) + 1) if rng.random() < 0.1 else at
        counts = [0.0] * len(counts) if rng.random() < 0.02 else counts
        for _ in range(rng.choice([0, 0, 0, 1] if few else [0, 1, 5, 20])):
            here = min(len(bounds), max(0, at + rng.choice([-1, 0, 0, 1])))
            counts = [c + (k >= here) for k, c in enumerate(counts)]
        for column, c in zip(columns, counts, strict=True):
            column.append("_" if rng.random() < 0.05 else repr(c))
    kept = zip([*map(repr, map(float, bounds)), "+Inf"], columns, strict=True)
    return {le: column for le, column in kept if rng.random() > 0.01}


def world(rng: random.Random, rules: list[AlertRule]) -> Script:
    """Series of several servers, models and revisions that these rules read."""
    n, made = rng.randint(15, 60), dict[Labels, list[str]]()
    for rule in rules:
        expr, bound = rule.condition.signal.expr, rule.condition.bound
        rate = bound / rule.window_s or 0.02 if isinstance(expr, Over) and isinstance(expr.of, Increase) else bound or 1
        for s in expr.leaves():
            found: list[dict[str, str]] = [{}]
            for label in labels_of_metric(s.name):
                some = rng.sample(VALUES[label], rng.randint(1, len(VALUES[label])))
                found = [at | {label: v} for at in found for v in some]
            for at in (at for at in found if rng.random() > 0.15):
                if s.name.endswith("_bucket"):
                    bounds = getattr(Buckets(), HISTOGRAMS[s.name[5:-7]])
                    whole = histogram(rng, n, bounds) if labels_of(s.name, at | {"le": "+Inf"}) not in made else {}
                    made |= {labels_of(s.name, at | {"le": le}): column for le, column in whole.items()}
                elif s.name.endswith("_total"):
                    each = rng.choice([1.0, 0.2, 10.0]) if isinstance(expr, Divide) else rate
                    made.setdefault(labels_of(s.name, at), counter(rng, n, each))
                else:
                    level = 1.0 if isinstance(expr, OrZero) else 1e9 if isinstance(expr, Divide) else bound
                    made.setdefault(labels_of(s.name, at), gauge(rng, n, level))
    return list(made.items())


@needs("promtool")
def test_rules_and_series_that_nobody_thought_of_fire_when_prometheus_says_so(tmp_path: Path) -> None:
    rng, tests, ours, rules = random.Random(1), [], [], list[AlertRule]()
    for i in range(12):
        mine = [any_rule(rng, f"r{i}_{j}") for j in range(3)]
        script = world(rng, mine)
        evaluator, questions = Evaluator(mine, filled(script)), list[Question]()
        for step in range(max(len(values) for _, values in script) + 25):
            evaluator.evaluate(step * STEP_S)
            questions.append((f'ALERTS{{alertname=~"r{i}_.*"}}', step * STEP_S))
            now = {labels_of("ALERTS", a.labels | {"alertstate": a.state}): 1.0 for a in evaluator.active.values()}
            ours.append((mine, step, now))
        tests.append((script, questions))
        rules += mine
    theirs = asked(tmp_path, tests, prometheus_rules(rules))
    wrong = [
        (step * STEP_S, [(r.threshold, r.for_, r.window) for r in mine], a.keys() ^ b.keys())
        for (mine, step, a), b in zip(ours, theirs, strict=True)
        if not same(a, b)
    ]
    assert not wrong, "\n".join(map(str, wrong[:5]))
    assert len({(dict(k)["signal"], dict(k)["alertstate"]) for v in theirs for k in v}) > 30
