"""The loop from thumbs: real answers, real feedback, `llmkit monitor retrain` with DPO, a candidate in the registry."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import httpx
import pytest
from conftest import Done

from llmkit.core.card import ModelCard
from llmkit.core.registry import get_version
from llmkit.core.tiny import tiny_model
from llmkit.data.chat import IGNORED, encode_pair
from llmkit.deployment.feedback import Take, gather
from llmkit.deployment.harvest import as_pair
from llmkit.deployment.release import Release, RolloutJob, open_release
from llmkit.deployment.retraining import Gates, RetrainPolicy, save_policy
from llmkit.monitoring.profile import make_profile
from llmkit.monitoring.requestlog import read_requests
from llmkit.serving.process import ServerProcess
from llmkit.serving.text import Text

FIND = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"what": "ann@example.com"}'}}

VERBS = ("read", "write", "find", "sort", "drop", "send", "load", "save", "join", "split")
NOUNS = ("header", "token", "message", "record", "table", "window", "packet")
STEMS = [f"def {verb}_{noun}(value, size=" for verb, noun in product(VERBS, NOUNS)]


def thumbs_of(release: Release, log: Path, asks: int) -> list[bool]:
    """Let forty users ask and say what they think: a small size pleases, anything else does not."""
    revision = ModelCard.load(release.champion).revision
    server = ServerProcess({revision: release.champion}, log=log, variant="torch")
    with server, httpx.Client(base_url=server.base, timeout=60) as http:

        def ask(i: int) -> bool:
            body = {"model": "llmkit", "prompt": STEMS[i % len(STEMS)], "max_tokens": 6, "temperature": 1.0}
            reply = http.post("/v1/completions", json=body | {"seed": i, "user": f"u{i % 41}"}).json()
            good = reply["choices"][0]["text"][:1] in "01234"
            said = {"request_id": reply["id"], "name": "thumbs", "value": int(good)}
            assert http.post("/v1/feedback", json=said).status_code == 202
            return good

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(ask, range(asks)))


def test_chats_become_examples(tmp_path: Path) -> None:
    """What a server logs of chats can be trained on: system messages, earlier turns, calls and their answers."""
    model, log = tiny_model(tmp_path / "model", max_length=2048), tmp_path / "requests.db"
    alone = [{"role": "user", "content": "where is the header?"}]
    talk = [{"role": "system", "content": "Be brief."}, *alone, {"role": "assistant", "content": "Which?"}]
    talk += [{"role": "user", "content": "that of the message"}]
    used = [{"role": "user", "content": "find a mail"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    used += [{"role": "tool", "tool_call_id": "c1", "content": "there is none"}]
    asks = [{"messages": alone}, {"messages": talk}, {"messages": used, "tools": [FIND], "tool_choice": "required"}]
    server = ServerProcess({"a": model}, log=log, variant="torch")
    with server, httpx.Client(base_url=server.base, timeout=60) as http:
        for i, ask in enumerate(asks):
            body = {"model": "llmkit", "max_tokens": 60, "user": f"u{i}"} | ask
            reply = http.post("/v1/chat/completions", json=body).json()
            said = {"request_id": reply["id"], "name": "label", "text": "the first"}
            assert http.post("/v1/feedback", json=said).status_code == 202
    made = gather(read_requests(log), Take(), tokenizer := Text.load(model).tokenizer)
    assert (len(made.examples), dict(made.left_out)) == (3, {})
    pairs = [as_pair(s) for s in made.examples]
    assert [p["messages"] for p in pairs[1:2]] == [[*talk, {"role": "assistant", "content": "the first"}]]
    assert "ann@example.com" not in str(pairs)
    assert '<tool_call>{"name":"find","arguments":{"what":"<EMAIL>"}}</tool_call>' in str(pairs[2]["messages"])
    for pair in pairs:
        _, labels = encode_pair(tokenizer, pair)
        assert tokenizer.decode([i for i in labels if i != IGNORED]) == "the first<|end|>"


@pytest.mark.soak
def test_thumbs_become_a_candidate(tmp_path: Path, llmkit: Callable[..., Done]) -> None:
    """Prompts too short for a loss, and many answers to each: what people liked is likelier where nobody trained."""
    release, log = open_release(RolloutJob(), tmp_path), tmp_path / "requests.db"
    liked = thumbs_of(release, log, 10 * len(STEMS))
    assert 0.1 < sum(liked) / len(liked) < 0.9
    rows, card = read_requests(log), ModelCard.load(release.champion)
    assert len(rows) == len(liked) == sum("thumbs" in r["labels"] for r in rows)
    card.profile = {"prompts": make_profile(rows, "prompts", model=card.revision)}
    card.save(release.champion)
    gates = Gates(bounds="smoke", windows=16, old_rise=1.0)
    train = {"steps": 28, "lr": 3e-4, "batch_size": 8, "length": 64}
    policy = save_policy(RetrainPolicy.tiny(how="dpo", train=train, gates=gates), tmp_path / "policy.yml")
    about = ["--log", log, "--model", release.champion, "--data", release.prepared.folder]
    about += ["--tracking", release.tracking, "--force", "users say so", "--json"]
    began = time.monotonic()
    done = llmkit("monitor", "retrain", policy, *about)
    print(f"{time.monotonic() - began:.0f} s", done.out, done.err)
    told = json.loads(done.out.splitlines()[-1])
    assert (done.code, told["status"]) == (0, "registered"), done
    assert told["margin"] > told["margin_before"] and told["questions"] >= 5
    candidate = get_version(release.name, "candidate", release.tracking)
    assert candidate is not None and candidate.version == told["version"]
    assert ModelCard.load(candidate.folder).revision != ModelCard.load(release.champion).revision
