"""Two models and room for one, in a server of its own: nothing is lost, nothing is started twice."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from llmkit.core.errors import ServiceError
from llmkit.core.tiny import tiny_model
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {name: tiny_model(base / name, seed=seed, max_length=16_384) for seed, name in enumerate(("a", "b"))}


@pytest.fixture(scope="module")
def server(folders):
    with ServerProcess(folders, engine="mock", warm_models=1, slots=4, log_json=True) as s:
        yield s


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True)


@pytest.fixture(scope="module")
def admin(server):
    with AdminClient(server.base, server.admin_key) as a:
        yield a


def model(admin, name):
    return next(r for r in admin.revisions() if r["name"] == name)


def complete(client, name, n=3):
    body = {"ignore_eos": True, "return_token_ids": True}
    raw = client.completions.with_raw_response.create(
        model=name, prompt=[20], max_tokens=n, temperature=0, extra_body=body
    )
    return raw.parse().choices[0].token_ids, raw.headers


def wait_until(what, seconds=20.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def cold_starts(server, name):
    text = httpx.get(server.base + "/metrics").text
    line = f'llmkit:cold_start_seconds_count{{revision="{name}"}} '
    return next((float(x.removeprefix(line)) for x in text.splitlines() if x.startswith(line)), 0.0)


def test_what_is_known_and_what_is_warm(server, client, admin):
    assert "ready, a (mock), b (cold) as 'llmkit'" in server.output()
    assert httpx.get(server.base + "/readyz").status_code == 200
    assert {m.id: m.state for m in client.models.list()} == {"llmkit": "warm", "a": "warm", "b": "cold"}
    a, b = model(admin, "a"), model(admin, "b")
    assert (a["state"], a["starts"], b["state"], b["starts"]) == ("warm", 1, "cold", 0)
    assert a["memory_bytes"] > 5e6 and a["planned_bytes"] > 5e6 and b["memory_bytes"] == 0


def test_alternating_requests_are_all_answered(server, client, admin):
    """Each pays for its start, and says so in its header, the metrics and the log."""
    before = cold_starts(server, "b")
    for i in range(6):
        name = "ba"[i % 2]
        tokens, headers = complete(client, name)
        assert tokens == [21, 22, 23]
        kind, _, ms = headers["server-timing"].partition(";dur=")
        assert kind == "cold-start" and 0 < float(ms) / 1e3 < 60
        assert [r["name"] for r in admin.revisions() if r["state"] == "warm"] == [name]
    assert "server-timing" not in complete(client, "a")[1]
    assert cold_starts(server, "b") == before + 3
    lines = [json.loads(x) for x in server.output().splitlines() if x.startswith("{")]
    assert any(x.get("cold_start_s") and x.get("path") == "/v1/completions" for x in lines)
    assert any(x["message"] == "cold start" and x["revision"] == "b" and x["memory_bytes"] > 5e6 for x in lines)


def test_many_requests_for_a_cold_model_cause_one_start(server, client, admin):
    complete(client, "a")
    before = cold_starts(server, "b")
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: complete(client, "b"), range(20)))
    assert [tokens for tokens, _ in replies] == [[21, 22, 23]] * 20
    assert cold_starts(server, "b") == before + 1


def test_a_running_stream_is_waited_for(server, client, admin):
    """The other model gets its room when the stream has come to its end, and not before."""
    complete(client, "a")
    loose = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    body = {"ignore_eos": True, "return_token_ids": True}
    stream = loose.completions.create(model="a", prompt=[20], max_tokens=9_000, stream=True, extra_body=body)
    got, other = len(next(stream).choices[0].token_ids), []
    asks = threading.Thread(target=lambda: other.append(complete(client, "b")))
    asks.start()
    wait_until(lambda: model(admin, "b")["state"] == "loading")
    assert model(admin, "a")["state"] == "warm" and not other
    got += sum(len(c.choices[0].token_ids) for c in stream)
    asks.join(60)
    assert (got, other[0][0]) == (9_000, [21, 22, 23])
    assert model(admin, "a")["state"] == "cold"


def test_both_in_demand_lose_nothing(client):
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: complete(client, "ab"[i % 2], 5)[0], range(40)))
    assert replies == [[21, 22, 23, 24, 25]] * 40


def test_administrators_warm_cool_load_and_forget(client, admin, folders):
    assert admin.set_state("b", "warm")["state"] == "warm"
    assert admin.set_state("b", "cold")["state"] == "cold"
    admin.set_routes("other", {"b": 1.0})
    assert complete(client, "other")[0] == [21, 22, 23]  # an alias of a cold model
    assert admin.load("c", folders["a"])["state"] == "warm" and model(admin, "b")["state"] == "cold"
    admin.set_state("c", "cold")
    assert admin.load("c", folders["a"])["starts"] == 2
    admin.unload("c")
    with pytest.raises(openai.NotFoundError):
        complete(client, "c")
    admin.set_routes("other", {"a": 0.5, "b": 0.5})
    complete(client, "a")
    with pytest.raises(openai.InternalServerError, match=r"no room for model 'b'.*a .* GB for route 'other'") as e:
        complete(client, "b")
    assert (e.value.status_code, e.value.code) == (503, "no_room")
    assert e.value.response.headers["retry-after"] == "5"
    with pytest.raises(ServiceError, match=r"409.*for a rollout"):
        admin.set_state("a", "cold")
    admin.set_routes("other", {"a": 1.0})


def test_a_model_that_cannot_be_loaded_leaves_the_others_alone(client, admin, folders):
    complete(client, "a")
    weights = folders["b"] / "model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    try:
        with pytest.raises(openai.BadRequestError, match="has no weights"):
            complete(client, "b")
        with pytest.raises(ServiceError, match=r"400.*has no weights"):
            admin.set_state("b", "warm")
    finally:
        weights.write_bytes(kept)
    assert complete(client, "a")[0] == [21, 22, 23]
    assert admin.set_state("b", "warm")["failure"] == ""


def test_memory_is_a_bound(folders):
    """Room for one and a half of what is planned."""
    with ServerProcess(folders, engine="mock", slots=1, kv_gb=0.05, warm_gb=0.12) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        with AdminClient(server.base, server.admin_key) as admin:
            for name in "baba":
                assert complete(client, name)[0] == [21, 22, 23]
                warm = [r for r in admin.revisions() if r["state"] == "warm"]
                assert [r["name"] for r in warm] == [name] and warm[0]["planned_bytes"] == 75_000_000
    with pytest.raises(ServiceError, match=r"no room for model 'a': it needs 0\.025 GB"):
        ServerProcess(folders, engine="mock", kv_gb=0.05, warm_gb=0.05).start()
