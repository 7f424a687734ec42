"""The server as a process: what a notebook cannot show."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from llmkit.core.errors import ServiceError
from llmkit.core.tiny import TEXTS, tiny_model
from llmkit.monitoring.requestlog import read_requests
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {name: tiny_model(base / name, seed=seed, max_length=16_384) for seed, name in enumerate(("a", "b"))}


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "requests.db"
    with ServerProcess(folder, variant="torch", log=log, slots=4, api_key="sk-user", queue=8, threads=1) as s:
        s.log = log
        yield s


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="sk-user", max_retries=0, _strict_response_validation=True)


@pytest.fixture(scope="module")
def loose(server):
    "OpenAI's types have no null where OpenAI sends one: the first prompt token's logprob, an open finish_reason."
    return openai.OpenAI(base_url=server.url, api_key="sk-user", max_retries=0)


@pytest.fixture(scope="module")
def admin(server):
    with AdminClient(server.base, server.admin_key) as a:
        yield a


def complete(client, prompt=TEXTS[0][:20], model="a", **kw):
    return client.completions.create(model=model, prompt=prompt, **({"max_tokens": 12, "temperature": 0} | kw))


def inside(admin, name="a"):
    return next(r["running"] + r["waiting"] for r in admin.revisions() if r["name"] == name)


def wait_until(what, seconds=20.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def test_many_at_once_answer_as_one_alone(client):
    prompts = [t[: 10 + i] for i, t in enumerate(TEXTS[:12])]
    alone = [complete(client, p).choices[0].text for p in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: complete(client, p).choices[0].text, prompts))
    assert together == alone and len(set(alone)) > 1


@pytest.mark.parametrize("seed", [None, 3])
def test_a_stream_is_the_same_reply(client, loose, seed):
    kw = {"temperature": 0} if seed is None else {"temperature": 1.5, "seed": seed}
    parts = list(complete(loose, stream=True, stream_options={"include_usage": True}, **kw))
    whole = complete(client, **kw)
    assert "".join(c.choices[0].text for c in parts if c.choices) == whole.choices[0].text
    assert parts[-1].usage == whole.usage and len({c.id for c in parts}) == 1
    said = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, **kw}
    chunks = list(client.chat.completions.create(stream=True, **said))
    reply = client.chat.completions.create(**said).choices[0]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == reply.message.content
    assert (chunks[0].choices[0].delta.role, chunks[-1].choices[0].finish_reason) == ("assistant", reply.finish_reason)


def test_a_prompt_is_scored_as_transformers_scores_it(loose, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder["a"]), AutoModelForCausalLM.from_pretrained(folder["a"])
    ids = tokenizer.encode(TEXTS[3])[:40]
    scored = complete(loose, ids, echo=True, logprobs=1, max_tokens=0).choices[0]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = [logits[i, t].item() for i, t in enumerate(ids[1:])]
    best = logits[:-1].max(-1).values.tolist()
    assert (scored.text, scored.logprobs.token_logprobs[0]) == (tokenizer.decode(ids), None)
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(want, abs=1e-4)
    assert [max(t.values()) for t in scored.logprobs.top_logprobs[1:]] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(server, admin, stream):
    who = f"gone-{stream}"
    body = {"model": "a", "prompt": "x", "max_tokens": 16_000, "ignore_eos": True, "stream": stream, "user": who}
    text = httpx.Request("POST", "http://x", json=body).content
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-user\r\nContent-Length: {len(text)}"
    with socket.create_connection(("127.0.0.1", int(server.base.rpartition(":")[2]))) as s:
        s.sendall(head.encode() + b"\r\n\r\n" + text)
        if stream:
            s.recv(100)
        else:
            wait_until(lambda: inside(admin) == 1)
    wait_until(lambda: inside(admin) == 0, 5)  # to its end it would take far longer
    wait_until(lambda: any(r["session"] == who for r in read_requests(server.log)))
    row = next(r for r in read_requests(server.log) if r["session"] == who)
    assert (row["status"], row["finish"]) == (499, "abort")
    assert row["completion_tokens"] < 16_000


def test_a_full_queue_says_when_to_come_back(server):
    many = httpx.Client(base_url=server.url, headers={"authorization": "Bearer sk-user"}, timeout=60)
    body = {"model": "a", "prompt": "x", "max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(lambda _: many.post("/completions", json=body), range(24)))
    refused = [r for r in replies if r.status_code == 503]
    assert {r.status_code for r in replies} == {200, 503} and len(replies) - len(refused) >= 12
    assert {r.headers["retry-after"] for r in refused} == {"1"}
    assert "queue is full" in refused[0].json()["error"]["message"]


def test_a_route_changes_under_load_and_drops_nothing(client, admin):
    admin.set_routes("llmkit", {"a": 1.0, "b": 0.0})
    done, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            done.append(complete(client, model="llmkit", max_tokens=4).system_fingerprint)

    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(ask) for _ in range(3)]
        try:
            for share in (0.5, 0.0, 1.0, 0.0):
                admin.set_routes("llmkit", {"a": share, "b": 1 - share})
                n = len(done)
                wait_until(lambda n=n: len(done) > n + 20)
        finally:
            stop.set()
    assert all(w.exception() is None for w in work)
    assert set(done) == {"a", "b"} and set(done[-5:]) == {"b"}
    admin.set_routes("llmkit", {"a": 1.0})


def test_a_revision_comes_and_goes(client, admin, folder):
    admin.load("c", folder["b"], "torch")
    assert complete(client, model="c").choices[0].text == complete(client, model="b").choices[0].text
    admin.set_routes("canary", {"c": 1.0})
    with pytest.raises(ServiceError, match="set its weight to 0 first"):
        admin.unload("c")
    admin.set_routes("canary", {"a": 1.0, "c": 0.0})
    admin.unload("c")
    with pytest.raises(openai.NotFoundError, match="'c' does not exist"):
        complete(client, model="c")


def test_a_session_stays_where_it_is(client, admin):
    admin.set_routes("llmkit", {"a": 0.5, "b": 0.5})

    def seen(user):
        return {complete(client, model="llmkit", max_tokens=1, user=user).system_fingerprint for _ in range(3)}

    where = {u: seen(u) for u in "pqrstuvw"}
    assert all(len(w) == 1 for w in where.values()) and set.union(*where.values()) == {"a", "b"}
    before = admin.routes()
    assert admin.salt("llmkit", "2") == {"llmkit": "2"} and admin.routes() == before
    dealt = {u: seen(u) for u in where}
    assert all(len(w) == 1 for w in dealt.values()) and dealt != where
    admin.set_routes("llmkit", {"a": 0.5, "b": 0.5})
    assert admin.salts() == {"llmkit": "2"} and {u: seen(u) for u in where} == dealt
    assert admin.salt("llmkit", "") == {} and {u: seen(u) for u in where} == where
    admin.set_routes("llmkit", {"a": 1.0})


def test_who_may_not(server):
    assert httpx.post(server.url + "/completions", json={}).status_code == 401
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        complete(openai.OpenAI(base_url=server.url, api_key="sk-no", max_retries=0))
    with pytest.raises(ServiceError, match="answered 403"):
        AdminClient(server.base, "sk-user").routes()
    with pytest.raises(ServiceError, match="answered 401"):
        AdminClient(server.base, "sk-no").routes()
    assert httpx.get(server.base + "/readyz").status_code == 200


def test_what_is_not_understood_is_named(client):
    with pytest.raises(openai.BadRequestError, match="unknown field 'best'") as e:
        complete(client, extra_body={"best": 3})
    assert (e.value.param, e.value.code) == ("best", "unknown_field")
    for kw, say in (({"max_tokens": -1}, "max_tokens"), ({"best_of": 3}, "not supported")):
        with pytest.raises(openai.BadRequestError, match=say):
            complete(client, **kw)
    with pytest.raises(openai.BadRequestError, match=r"field 'tools.*' is missing"):
        said = {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}
        client.chat.completions.create(model="a", **said)


def test_hostile_bodies(server):
    send = httpx.Client(base_url=server.url, headers={"authorization": "Bearer sk-user"})
    bodies = {b"{": 400, b"\xff\xfe": 400, b"[" * 100_000: 400, b'{"model":"a","prompt":"x","n":1e9}': 400}
    bodies |= {b'{"model":"a","prompt":"x","temperature":NaN}': 400, b" " * (5 << 20): 413, b"null": 400}
    for body, status in bodies.items():
        assert send.post("/completions", content=body).status_code == status, body[:40]
    assert send.get("/models").status_code == 200


def test_feedback_joins_the_log(client, server, admin):
    reply = complete(client, "mail ann@example.com", model="llmkit", user="ann")
    admin.feedback(reply.id, "accuracy", 0.42)
    client.post("/feedback", cast_to=object, body={"request_id": reply.id, "name": "good", "value": 1})

    def row():
        return next((r for r in read_requests(server.log) if r["id"] == reply.id), {"labels": {}})

    wait_until(lambda: len(row()["labels"]) == 2)
    assert row()["labels"] == {"accuracy": 0.42, "good": 1.0}
    assert (row()["alias"], row()["session"], row()["prompt"]) == ("llmkit", "ann", "mail <EMAIL>")
    assert 0 < row()["ttft_s"] <= row()["latency_s"] and row()["mean_logprob"] < 0


def test_metrics_have_vllms_names(client, server):
    complete(client)
    text = httpx.get(server.base + "/metrics").text
    assert 'vllm:num_requests_running{engine="0",model_name="a"} 0.0' in text
    assert 'vllm:e2e_request_latency_seconds_count{engine="0",model_name="a"}' in text


def test_a_port_in_use_is_named(server, folder):
    port = server.base.rpartition(":")[2]
    args = [sys.executable, "-m", "llmkit.cli", "serve", f"a={folder['a']}", "--port", port]
    made = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert (made.returncode, made.stdout) == (2, "")
    assert made.stderr.startswith(f"error: port {port} is in use; the next free one is --port ")
    assert made.stderr.count("\n") == 1


def test_a_model_that_cannot_be_served(tmp_path, folder):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ServiceError, match="has no weights"):
        ServerProcess({"x": tmp_path}).start()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ServiceError, match="holds pickled weights"):
        ServerProcess({"x": tmp_path}).start()
    with pytest.raises(ServiceError, match="has no variant 'int4'"):
        ServerProcess({"a": folder["a"]}, variant="int4").start()


def test_sigterm_drains(folder):
    server = ServerProcess({"a": folder["a"]}, variant="torch", slots=2, threads=1).start()
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    stream = complete(client, stream=True, max_tokens=200, extra_body={"ignore_eos": True, "return_token_ids": True})
    tokens = len(next(stream).choices[0].token_ids)
    os.kill(server.pid, signal.SIGTERM)
    chunks = list(stream)
    tokens += sum(len(c.choices[0].token_ids) for c in chunks)
    assert (tokens, chunks[-1].choices[0].finish_reason) == (200, "length")
    assert server.stop() == 0
    with pytest.raises(openai.APIConnectionError):
        complete(client)


def test_it_ends_with_the_process_that_started_it(folder):
    code = (
        "from llmkit.serving.process import ServerProcess; import os, sys\n"
        "s = ServerProcess({'a': sys.argv[1]}, variant='torch').start()\n"
        "print(s.pid, s.base, flush=True); os.kill(os.getpid(), 9)"
    )
    args = [sys.executable, "-c", code, str(folder["a"])]
    pid, base = subprocess.run(args, capture_output=True, text=True, timeout=60).stdout.split()

    def gone():
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().split()[2] == "Z"

    wait_until(gone)
    with pytest.raises(httpx.ConnectError):
        httpx.get(base + "/livez")


@pytest.fixture
def adapter(folder, tmp_path):
    """A LoRA adapter of the model `a`, as peft writes it, that changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder["a"])
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapters_come_and_go(client, admin, adapter):
    """NAME:ADAPTER answers as its own, beside requests without one; an administrator loads and unloads it."""
    path = "/admin/revisions/a/adapters/style"
    with pytest.raises(openai.NotFoundError, match="no adapter 'style'"):
        complete(client, model="a:style")
    assert admin.call("PUT", path, {"folder": str(adapter)}) == {"adapters": ["style"]}
    plain, styled = complete(client), complete(client, model="a:style")
    assert plain.choices[0].text != styled.choices[0].text
    with ThreadPoolExecutor(8) as pool:
        names = ["a", "a:style", "llmkit:style"] * 3
        mixed = list(pool.map(lambda name: complete(client, model=name).choices[0].text, names))
    assert mixed == [(plain if name == "a" else styled).choices[0].text for name in names]
    assert admin.call("DELETE", path) == {"adapters": []}
    with pytest.raises(openai.NotFoundError):
        complete(client, model="a:style")
    with pytest.raises(ServiceError, match="404"):
        admin.call("DELETE", path)
    with pytest.raises(ServiceError, match=r"400.*adapter_config"):
        admin.call("PUT", path, {"folder": str(adapter.parent)})


def test_adapters_survive_a_crash_of_the_engine(folder, adapter, tmp_path):
    """They are there again when the engine is; one that is gone says so, and the rest is served."""
    base = "/admin/revisions/a/adapters/"
    shutil.copytree(adapter, tmp_path / "other")
    kw = {"variant": "torch", "slots": 2, "threads": 1}
    with ServerProcess({"a": folder["a"]}, **kw) as s, AdminClient(s.base, s.admin_key) as admin:
        user = openai.OpenAI(base_url=s.url, api_key="none", max_retries=0)
        for name, where in (("style", adapter), ("other", tmp_path / "other")):
            admin.call("PUT", base + name, {"folder": str(where)})
        plain, styled = (complete(user, model=m).choices[0].text for m in ("a", "a:style"))
        shutil.rmtree(tmp_path / "other")
        (engine,) = [p for p in psutil.Process(s.pid).children() if "llmkit.engine.process" in p.cmdline()]
        engine.kill()
        wait_until(lambda: httpx.get(s.base + "/readyz").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="it restarts"):
            complete(user, model="a:style")
        wait_until(lambda: httpx.get(s.base + "/readyz").status_code == 200, 60)
        assert [complete(user, model=m).choices[0].text for m in ("a", "a:style")] == [plain, styled]
        with pytest.raises(openai.NotFoundError, match=r"lost when the engine restarted: .*no adapter_config"):
            complete(user, model="a:other")
        (seen,) = admin.revisions()
        assert (seen["adapters"], list(seen["lost_adapters"])) == (["style"], ["other"])
        assert plain != styled and "adapter other is lost" in s.output()
