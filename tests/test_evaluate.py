"""evaluate_model as a user runs it: with a task file, a gate and another model of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from conftest import Done

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{a}} + {{b}} ="
doc_to_choice: ["2", "3", "4"]
doc_to_target: "{{a + b - 2}}"
"""
GATE = """
- {metric: sums/acc, direction: at least, bound: 0.0, surely: true}
- {metric: perplexity, direction: at most, bound: 1.0, of: perplexity_untrained}
- {metric: difference/perplexity, direction: at most, bound: 0}
"""


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_own_task_own_gate_own_rival(llmkit: Callable[..., Done], tmp_path: Path) -> None:
    rows = [{"a": a, "b": b} for a, b in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "sums.yaml").write_text(TASK)
    (tmp_path / "gate.yaml").write_text(GATE)
    run = ("run", "evaluate_model", "-p", "tasks", "sums.yaml")
    first = llmkit(*run, "--out", "first")
    assert first.code == 0, first.err
    found = result(tmp_path / "first")
    assert {"sums/acc", "sums/acc_low", "sums/acc_norm", "accuracy", "fim_exact_high"} <= set(found["metrics"])
    assert [r["prompt"] for r in found["tables"]["task sums"]] == [f"{r['a']} + {r['b']} =" for r in rows]

    # The same model and data again, beside the first run and behind a gate of three bounds more.
    model = found["tables"]["model"][0]["folder"]
    again = ("-p", "data", "first/data", "-p", "model", model)
    same = llmkit(*run, *again, "--out", "again", "-p", "against", "first", "-p", "gate", "gate.yaml")
    assert same.code == 0, same.err
    checks = result(tmp_path / "again")["gate"]
    assert [c["name"] for c in checks[5:]] == [
        "sums/acc_low",
        "perplexity / perplexity_untrained",
        "difference/perplexity",
    ]
    assert all(c["passed"] for c in checks)
    rows = result(tmp_path / "again")["tables"]["against"]
    verdicts = {r["metric"]: r["verdict"] for r in rows}
    assert verdicts["sums/acc"] == verdicts["fim_exact"] == "not proven" and {r["b - a"] for r in rows} == {0.0}
    shown = llmkit("compare", "first", "again")
    assert shown.code == 0 and all(re.search(rf"{name} .*{v}", shown.out) for name, v in verdicts.items())

    # A gate that asks for what is not measured does not pass, and says so.
    (tmp_path / "gate.yaml").write_text("- {metric: sum/acc, direction: at least, bound: 0}")
    missed = llmkit(*run, *again, "--out", "missed", "-p", "gate", "gate.yaml")
    assert missed.code == 1 and "sum/acc: sum/acc was not measured; did you mean 'sums/acc'?" in missed.err
    (tmp_path / "gate.yaml").write_text("- {metric: perplexty, direction: at most, bound: 9}")
    refused = llmkit(*run, "--out", "refused", "-p", "gate", "gate.yaml")
    assert refused.code == 2 and "did you mean 'perplexity'?" in refused.err and not (tmp_path / "refused").exists()
    (tmp_path / "sums.yaml").write_text(TASK.replace("doc_to_text", "doc_to_txt"))
    broken = llmkit(*run, *again, "--out", "broken")
    assert broken.code == 2 and "sums.yaml has the key 'doc_to_txt'" in broken.err and broken.err.count("\n") == 1
