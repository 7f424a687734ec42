"""What stands around the engine, through a process and the official client: limits, cache, shadows, logs, traces."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import httpx
import openai
import pytest

from llmkit.core.tiny import tiny_model
from llmkit.monitoring.requestlog import read_requests
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess


class Collector(BaseHTTPRequestHandler):
    "An OpenTelemetry collector that keeps what it gets."

    got: ClassVar[list] = []

    def do_POST(self):
        self.got.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def collector():
    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, collector):
    base = tmp_path_factory.mktemp("front")
    models = {name: tiny_model(base / name, seed=seed) for seed, name in enumerate(("a", "b"))}
    (base / "keys").write_text("team sk-team\nslow sk-slow rpm=2\nshort sk-short tpm=40\n")
    (base / "serve.yaml").write_text(f"cache_mb: 4\nfor: throughput\nslots: 3\napi_key_file: {base / 'keys'}\n")
    made = {"variant": "torch", "threads": 1, "log_json": True, "log": base / "log.db", "config": base / "serve.yaml"}
    s = ServerProcess(models, **made)
    s.env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}
    s.log = base / "log.db"
    with s:
        yield s


def client(server, key="sk-team"):
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, _strict_response_validation=True)


def complete(client, prompt="def f(", model="a", **kw):
    return client.completions.create(model=model, prompt=prompt, **({"max_tokens": 8, "temperature": 0} | kw))


def rows(server, **where):
    return [r for r in read_requests(server.log, shadows=True) if all(r[k] == v for k, v in where.items())]


def wait_until(what, seconds=20.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def metric(server, name):
    text = httpx.get(server.base + "/metrics").text
    return next((float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(name)), 0.0)


def test_the_same_again_comes_from_the_cache(server):
    user = client(server)
    first, second = complete(user), complete(user)
    assert (first.choices, second.usage.cache_hit) == (second.choices, True)
    assert first.id != second.id and first.usage.total_tokens == second.usage.total_tokens
    said = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
    whole = [user.chat.completions.with_raw_response.create(**said) for _ in range(2)]
    assert [r.headers["x-llmkit-cache"] for r in whole] == ["miss", "hit"]
    loose = openai.OpenAI(base_url=server.url, api_key="sk-team", max_retries=0)
    chunks = list(loose.chat.completions.create(**said, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == whole[0].parse().choices[0].message.content
    assert chunks[-1].usage.cache_hit is True
    fresh = complete(user, extra_headers={"cache-control": "no-cache"})
    assert fresh.choices == first.choices and not hasattr(fresh.usage, "cache_hit")


def test_what_is_said_aside_is_in_the_log(server):
    ann, said = client(server), {"metadata": {"team": "docs", "for": "ann@example.com"}}
    for _ in range(2):  # the second comes from the cache, by its bytes
        complete(ann, "aside", user="ann", extra_body=said | {"store": True})
    complete(ann, "aside", user="ann", extra_body=said | {"store": False})
    with pytest.raises(openai.NotFoundError):
        complete(ann, model="nobody", user="ann", extra_body=said)
    ann.responses.create(model="a", input="hi", max_output_tokens=2, metadata=said["metadata"], safety_identifier="ann")
    wait_until(lambda: len(rows(server, user="ann")) == 4)
    found = rows(server, user="ann")
    assert [(r["status"], r["source"], r["store"]) for r in found[:2]] == [(200, "", 1), (200, "cache", 1)]
    assert [(r["status"], r["source"], r["store"]) for r in found[2:]] == [(404, "", None), (200, "", None)]
    assert {r["metadata"] for r in found} == {'{"team": "docs", "for": "<EMAIL>"}'}
    for many in ({str(i): "x" for i in range(17)}, {"k" * 65: "x"}, {"k": "x" * 513}):
        with pytest.raises(openai.BadRequestError, match="metadata") as e:
            complete(ann, extra_body={"metadata": many})
        assert e.value.param.startswith("metadata")


def test_many_at_once_are_computed_once(server):
    before = metric(server, 'vllm:generation_tokens_total{engine="0",model_name="b"}')
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: complete(client(server), "class A", "b", max_tokens=40), range(8)))
    made = metric(server, 'vllm:generation_tokens_total{engine="0",model_name="b"}') - before
    assert len({r.choices[0].text for r in found}) == 1 and len({r.id for r in found}) == 8
    assert made == found[0].usage.completion_tokens


def test_a_key_has_limits(server):
    slow = client(server, "sk-slow")
    complete(slow, "x1"), complete(slow, "x1")
    with pytest.raises(openai.RateLimitError, match="'slow' is over its limit of 2 requests a minute") as e:
        complete(slow, "x1")
    assert 1 <= int(e.value.response.headers["retry-after"]) <= 30
    short = client(server, "sk-short")
    with pytest.raises(openai.BadRequestError, match="key 'short' has 40 a minute"):
        complete(short, "x2", max_tokens=60)
    complete(short, "x2", max_tokens=30)
    with pytest.raises(openai.RateLimitError, match="40 tokens a minute"):
        complete(short, "x3", max_tokens=38)
    assert complete(short, "x2", max_tokens=30).usage.cache_hit  # costs no tokens


def test_a_shadow_gets_copies_and_nobody_hears_it(server):
    admin = httpx.Client(base_url=server.base, headers={"authorization": f"Bearer {server.admin_key}"})
    body = {"weights": {"a": 1.0}, "shadow": {"revision": "b"}}
    assert admin.put("/admin/routes/llmkit", json=body).json()["shadows"] == {"llmkit": {"revision": "b", "share": 1.0}}
    for i in range(3):
        assert complete(client(server), f"s{i}", "llmkit").system_fingerprint == "a"
    wait_until(lambda: len(rows(server, source="shadow", revision="b")) == 3)
    assert admin.delete("/admin/revisions/b").status_code == 409
    assert admin.put("/admin/routes/llmkit", json={"weights": {"a": 1.0}}).json()["shadows"]
    with AdminClient(server.base, server.admin_key) as typed:
        assert typed.shadow("llmkit", None) == {} == typed.shadows()
        assert typed.shadow("llmkit", "b", 0.5) == {"llmkit": {"revision": "b", "share": 0.5}}
        assert typed.shadow("llmkit", None) == {}
    for wrong in ({"revision": "c"}, {"revision": "b", "share": 2}, {"revision": "b", "part": 1}):
        assert admin.put("/admin/routes/llmkit", json=body | {"shadow": wrong}).status_code == 400
    complete(client(server), "s9", "llmkit")
    assert len(rows(server, source="shadow")) == 3


def test_logs_and_traces_say_who_and_how_long_but_not_what(server):
    user = client(server)
    reply = complete(user, "a secret")
    wait_until(lambda: reply.id in server.output())
    lines = [json.loads(x) for x in server.output().splitlines() if x.startswith("{")]
    line = next(x for x in lines if x.get("request_id") == reply.id)
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["key"], line["revision"], line["completion_tokens"]) == ("team", "a", reply.usage.completion_tokens)
    assert "a secret" not in server.output() and "sk-team" not in server.output()
    assert server.stop() == 0
    sent = dict(Collector.got)
    spans = [
        s for path, b in Collector.got if path == "/v1/traces" for s in b["resourceSpans"][0]["scopeSpans"][0]["spans"]
    ]
    assert {s["name"] for s in spans} >= {"text_completion a", "chat a", "text_completion llmkit"}
    assert "/v1/metrics" in sent and "a secret" not in json.dumps(Collector.got)
