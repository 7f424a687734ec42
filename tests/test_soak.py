"""A server under random load for as long as one likes: nothing is wrong in the end, and nothing is left over."""

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from llmkit.core.errors import ServiceError
from llmkit.core.tiny import TEXTS, tiny_model
from llmkit.monitoring.requestlog import read_requests
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess

SOAK_S = float(os.environ.get("LLMKIT_SOAK_S", "600"))
SEED = int(os.environ.get("LLMKIT_SOAK_SEED", "0"))
CLIENTS, LONGEST = 12, 60
PROMPTS = [text[: 5 + 9 * i] for i, text in enumerate(TEXTS[:10])]  # short ones, and some longer than a piece
TIE = 1e-3  # two logits that are closer may change places with the batch that computes them
pytestmark = pytest.mark.soak


@dataclass
class Alone:
    "A reply to a prompt that nobody else disturbed: its tokens, and how far the second best was at each."

    tokens: list[int]
    gaps: list[float]

    def same(self, tokens: list[int]) -> bool:
        "Whether `tokens` are this reply, or part from it at a tie."
        i = next((i for i, (x, y) in enumerate(zip(tokens, self.tokens, strict=False)) if x != y), None)
        return i is None or self.gaps[i] < TIE


@dataclass
class Load:
    "What the clients did, and what they saw."

    server: ServerProcess
    alone: dict[tuple[str, int], Alone] = field(default_factory=dict)  # (model folder, prompt) -> reply
    sent: dict[str, str] = field(default_factory=dict)  # session -> how it ended
    seen: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def folder(self, revision: str) -> str:
        "The model behind a revision: 'c' is 'b' under another name."
        return "a" if revision == "a" else "b"

    def check(self, asked: dict, status: int, revision: str, tokens: list[int], error: dict) -> None:
        "Note a reply, and whatever is wrong with it."
        name = asked["user"]
        self.seen[f"status {status} {error.get('code', '')}".strip()] += 1
        self.sent[name] = str(status)
        known = status == 200 or (status == 404 and asked["model"] == "c")
        known = known or (status == 503 and error["code"] in ("queue_full", "queue_tokens"))
        known = known or (status == 503 and "being unloaded" in error["message"])
        if not known:
            self.wrong.append(f"{name} {asked['model']}: {status} {error}")
        elif status == 200:
            if len(tokens) != asked["max_tokens"]:
                self.wrong.append(f"{name}: {len(tokens)} tokens of {asked['max_tokens']}")
            which = self.folder(revision), PROMPTS.index(asked["prompt"])
            if asked["temperature"] == 0 and not self.alone[which].same(tokens):
                self.wrong.append(f"{name}: {tokens} from {revision}, alone {self.alone[which].tokens}")
            if asked["temperature"] == 0:
                self.seen["greedy replies compared"] += 1
                self.seen["parted at a tie"] += tokens != self.alone[which].tokens[: len(tokens)]


def a_request(rng: random.Random, name: str) -> dict:
    "What a client asks for."
    asked = {"model": rng.choice(("llmkit", "llmkit", "a", "b", "c")), "prompt": rng.choice(PROMPTS), "user": name}
    asked |= {"max_tokens": rng.randint(1, LONGEST), "temperature": rng.choice((0, 0, 1.0)), "ignore_eos": True}
    return asked | {"stream": rng.random() < 0.5, "return_token_ids": True}


def events(lines) -> list[dict]:
    "The objects of a stream of events."
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def ask(load: Load, http: httpx.Client, asked: dict) -> None:
    "Send a request and read the reply to its end; httpx's iter_lines would break a line in a text that has a U+0085."
    with http.stream("POST", "/completions", json=asked) as reply:
        revision = reply.headers.get("x-llmkit-revision", "")
        body = reply.read().decode()
    found = events(body.split("\n")) if asked["stream"] and reply.status_code == 200 else [json.loads(body)]
    error = next((x["error"] for x in found if "error" in x), {})
    tokens = [t for x in found for c in x.get("choices", ()) for t in c["token_ids"]]
    load.check(asked, 503 if error and reply.status_code == 200 else reply.status_code, revision, tokens, error)


def cancel(load: Load, http: httpx.Client, asked: dict, rng: random.Random) -> None:
    "Close the stream after a few of its lines."
    few = rng.randint(1, 12)
    with http.stream("POST", "/completions", json=asked | {"stream": True}) as reply:
        for i, _ in enumerate(reply.iter_lines()):
            if i == few:
                break
    load.sent[asked["user"]] = "cancelled"


def hang_up(load: Load, asked: dict, rng: random.Random) -> None:
    "Leave without a word: in the middle of the body, at its end, or some time later."
    body = json.dumps(asked).encode()
    host, port = load.server.base.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as s:
        s.sendall(head + body[: rng.choice((len(body) // 2, len(body), len(body)))])
        time.sleep(rng.choice((0, 0.01, 0.1)))
    load.sent[asked["user"]] = "hung up"


def client(load: Load, seed: int, prefix: str) -> None:
    "One client: now busy, now idle, and not always polite."
    rng, n = random.Random(seed), 0
    with httpx.Client(base_url=load.server.url, timeout=120) as http:
        while not load.stop.is_set():
            asked = a_request(rng, name := f"{prefix}-{seed}-{n}")
            n, what = n + 1, rng.random()
            load.sent[name] = "sent"
            if what < 0.7:
                ask(load, http, asked)
            elif what < 0.85:
                cancel(load, http, asked, rng)
            else:
                hang_up(load, asked, rng)
            if rng.random() < 0.2:
                time.sleep(rng.expovariate(10))


def administrator(load: Load, folder: dict, seed: int) -> None:
    "Loads and unloads a third revision and moves the route about, at times while it is in use."
    rng = random.Random(seed)
    with AdminClient(load.server.base, load.server.admin_key) as admin:
        while not load.stop.is_set():
            admin.load("c", folder["b"], "torch")
            for _ in range(rng.randint(1, 4)):
                shares = [rng.random() for _ in "abc"]
                total = sum(shares)
                weights = {n: s / total for n, s in zip("abc", shares, strict=True)}
                admin.set_routes("llmkit", weights)
                time.sleep(rng.uniform(0.05, 0.5))
            with pytest.raises(ServiceError, match="sends traffic to 'c'"):
                admin.unload("c")
            admin.set_routes("llmkit", {"a": 0.5, "b": 0.5})
            admin.unload("c")
            load.seen["revisions loaded and unloaded"] += 1


def soak(load: Load, folder: dict, seconds: float, prefix: str) -> None:
    "Everybody at once for so long; whoever fails says so."
    load.stop.clear()
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        work = [pool.submit(client, load, SEED * 1000 + i, prefix) for i in range(CLIENTS)]
        work.append(pool.submit(administrator, load, folder, SEED))
        until = time.monotonic() + seconds
        try:
            while time.monotonic() < until and not any(w.done() for w in work):
                time.sleep(0.1)
        finally:  # also of a test that ran out of time: leaving the pool waits for its threads
            load.stop.set()
    for w in work:
        w.result()


def read_alone(load: Load, folder: dict) -> None:
    "The replies to compare with, one request at a time."
    with httpx.Client(base_url=load.server.url, timeout=120) as http:
        for name in folder:
            for i, prompt in enumerate(PROMPTS):
                asked = {"model": name, "prompt": prompt, "max_tokens": LONGEST, "temperature": 0, "ignore_eos": True}
                asked |= {"logprobs": 2, "return_token_ids": True, "user": f"alone-{name}-{i}"}
                choice = http.post("/completions", json=asked).json()["choices"][0]
                best = [sorted(t.values()) for t in choice["logprobs"]["top_logprobs"]]
                load.alone[name, i] = Alone(choice["token_ids"], [b[-1] - b[-2] if len(b) > 1 else 0 for b in best])
                load.sent[asked["user"]] = "200"


def at_rest(server: ServerProcess) -> dict[str, tuple[int, int, int]]:
    "Open files, threads and bytes of the server and of each engine, once nothing is inside and nobody is connected."
    until = time.monotonic() + 30
    with AdminClient(server.base, server.admin_key) as admin:
        while any(r["running"] or r["waiting"] or r["kv_used"] for r in admin.revisions()):
            assert time.monotonic() < until, admin.revisions()
            time.sleep(0.05)
    process = psutil.Process(server.pid)
    while [c for c in process.net_connections() if c.status != "LISTEN"]:
        assert time.monotonic() < until, process.net_connections()
        time.sleep(0.05)
    time.sleep(1)  # the log's writer and a process that is just going
    engines = {p.cmdline()[3]: p for p in process.children()}
    names = {"server": process} | {json.loads(k)["folder"].rpartition("/")[2]: p for k, p in engines.items()}
    assert sorted(names) == ["a", "b", "server"] and len(process.children()) == 2
    return {n: (p.num_fds(), p.num_threads(), p.memory_info().rss) for n, p in names.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {name: tiny_model(base / name, seed=seed, max_length=256) for seed, name in enumerate(("a", "b"))}


def drains(load: Load) -> None:
    "SIGTERM while requests run: they are answered to their end, and the exit code is 0."
    asked = [{"model": "b", "prompt": p, "max_tokens": LONGEST, "temperature": 0} for p in PROMPTS[:5]]
    asked = [a | {"user": f"last-{i}", "ignore_eos": True} for i, a in enumerate(asked)]
    asked = [a | {"return_token_ids": True, "stream": i % 2 == 0} for i, a in enumerate(asked)]
    with httpx.Client(base_url=load.server.url, timeout=60) as http, ThreadPoolExecutor(5) as pool:
        with AdminClient(load.server.base, load.server.admin_key) as admin:
            work = [pool.submit(ask, load, http, a) for a in asked]
            while sum(r["running"] + r["waiting"] for r in admin.revisions()) < len(asked):
                assert not all(w.done() for w in work), "they were over before they were seen"
        code = load.server.stop()
        for w in work:
            w.result()
    assert (code, [load.sent[a["user"]] for a in asked]) == (0, ["200"] * len(asked))


@pytest.mark.timeout(2 * SOAK_S + 300)
def test_soak(folder, tmp_path):
    log = tmp_path / "requests.db"
    kw = {"engine": "torch", "slots": 4, "threads": 1, "queue": 3, "kv_gb": 0.00012}  # memory for half of the slots
    with ServerProcess(folder, log=log, **kw) as server:
        load = Load(server)
        read_alone(load, folder)
        soak(load, folder, min(30.0, max(5.0, SOAK_S / 4)), "warm")
        before = at_rest(server)
        soak(load, folder, SOAK_S, "soak")
        after = at_rest(server)
        metrics = httpx.get(server.base + "/metrics").text
        drains(load)
        text = server.output()
    for name in before:
        print(f"{name}: open files, threads, bytes: {before[name]} -> {after[name]}")
    load.seen["preempted"] = sum(counted(metrics, "vllm:num_preemptions_total"))
    print(dict(load.seen) | {k: n for k, n in Counter(load.sent.values()).items() if not k.isdigit()})
    assert not load.wrong, load.wrong[:5]
    assert load.seen["greedy replies compared"] > 20 and load.seen["revisions loaded and unloaded"] > 1
    assert load.seen["parted at a tie"] <= 0.01 * load.seen["greedy replies compared"] and load.seen["preempted"] > 0
    assert sum(counted(metrics, "llmkit:engine_restarts_total")) == 0 and "Traceback" not in text, text[-3000:]
    pool = (os.cpu_count() or 1) + 4  # threads that asyncio may start beside those it has
    for name, (files, threads, size) in before.items():
        assert after[name][0] <= files, name
        assert after[name][1] <= threads + (pool if name == "server" else 0), name
        assert after[name][2] <= size + (64 << 20), name
    one_row_each(load, read_requests(log))


def counted(metrics: str, name: str) -> list[float]:
    "The values of a metric."
    return [float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name + "{")]


def one_row_each(load: Load, rows: list[dict]) -> None:
    "As many rows as requests, with the status that the client saw."
    assert len(rows) == len(load.sent), Counter(r["status"] for r in rows)
    by_name = Counter(r["session"] for r in rows)
    nameless = by_name.pop("", 0)  # hung up before the body was read
    assert set(by_name.values()) == {1} and nameless <= sum(how == "hung up" for how in load.sent.values())
    status = {r["session"]: str(r["status"]) for r in rows}
    for name, how in load.sent.items():
        with suppress(ValueError):
            int(how)
            assert status[name] == how, name
