"""Guessing ahead behind the server: every reply is the one that comes without it."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from test_server import wait_until

from llmkit.core.errors import ServiceError
from llmkit.core.tiny import TEXTS, tiny_model
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}
CODE = TEXTS[0] * 3 + TEXTS[1] + TEXTS[0][:40]
KINDS = {
    "greedy": {},
    "drawn": {"temperature": 1.2, "seed": 5},
    "several": {"temperature": 1.0, "seed": 7, "n": 3},
    "cold": {"temperature": 0.3, "seed": 1, "top_p": 0.9},
    "log probabilities": {"logprobs": 3},
    "echo": {"logprobs": 1, "echo": True},
    "penalties": {"frequency_penalty": 0.4, "presence_penalty": 0.2},
    "bias": {"logit_bias": {"70": 4.0}},
    "schema": {"extra_body": {"structured_outputs": {"json": SCHEMA}}, "temperature": 1.0, "seed": 3},
    "pattern": {"extra_body": {"structured_outputs": {"regex": "(abc){1,30}"}}},
    "at least": {"extra_body": {"min_tokens": 50, "ignore_eos": True}},
    "short": {"max_tokens": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {name: tiny_model(base / name, seed=seed, max_length=1024) for seed, name in enumerate(("a", "small"))}


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA adapter of the model `a` that changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    where = tmp_path_factory.mktemp("adapters") / "style"
    model = AutoModelForCausalLM.from_pretrained(folder["a"])
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(where)
    return where


@pytest.fixture(scope="module", params=["", "lookup", "draft"])
def server(request, folder, adapter):
    """A server without guesses, and one with each kind of them."""
    how = f"draft:{folder['small']}" if request.param == "draft" else request.param
    kw = {"variant": "torch", "slots": 4, "threads": 1, "speculate": how}
    with ServerProcess({"a": folder["a"]}, **kw) as s, AdminClient(s.base, s.admin_key) as admin:
        admin.call("PUT", "/admin/revisions/a/adapters/style", {"folder": str(adapter)})
        s.how, s.admin = request.param, admin
        yield s


def user(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def said(reply):
    """Texts, why they ended, how long they are, and log probabilities rounded to what arithmetic leaves alone."""
    lines = [(c.index, c.text, c.finish_reason) for c in reply.choices]
    likely = [[round(p, 3) for p in c.logprobs.token_logprobs if p is not None] for c in reply.choices if c.logprobs]
    return lines, likely, reply.usage.completion_tokens


def metric(server, name):
    lines = httpx.get(server.base + "/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def asked(server):
    """What each kind of request is answered, by the model and by its adapter, alone and then beside the others."""
    client = user(server)

    def ask(job):
        kind, model = job
        kw = {"max_tokens": 60, "temperature": 0} | KINDS[kind]
        return said(client.completions.create(model=model, prompt=CODE, **kw))

    jobs = [(kind, model) for kind in KINDS for model in ("a", "a:style")]
    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, jobs))
    return dict(zip(jobs, alone, strict=True)), dict(zip(jobs, together, strict=True))


FIRST = {}  # what the server without guesses said


def test_every_kind_of_request_gets_its_reply(server, asked):
    alone, together = asked
    FIRST.update({} if server.how else alone)
    assert alone == FIRST
    assert together == alone
    assert FIRST["greedy", "a"] != FIRST["greedy", "a:style"]
    if server.how:
        assert metric(server, "vllm:spec_decode_num_draft_tokens_total") > 20
        assert metric(server, "llmkit:speculation_speedup") > 0.3


def test_a_stop_string_ends_the_reply_where_it_does_without_guesses(server):
    client = user(server)
    kw = {"model": "a", "prompt": CODE, "max_tokens": 200, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**kw).choices[0].text
    for at in range(3, 100, 7):
        stop = whole[at : at + 4]
        reply = client.completions.create(stop=stop, **kw)
        assert reply.choices[0].text == whole.split(stop)[0]
        assert reply.choices[0].finish_reason == "stop"
        parts = list(client.completions.create(stop=stop, stream=True, **kw))
        assert "".join(p.choices[0].text for p in parts) == whole.split(stop)[0]
    wait_until(lambda: server.admin.revisions()[0]["running"] == 0, 5)


def test_who_leaves_in_the_middle_disturbs_nobody(server):
    client = user(server)
    kw = {"model": "a", "prompt": CODE, "temperature": 0, "extra_body": {"ignore_eos": True}}
    want = said(client.completions.create(max_tokens=120, **kw))

    def leave(_):
        with client.completions.create(max_tokens=700, stream=True, **kw) as stream:
            return next(iter(stream)).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        gone = [pool.submit(leave, i) for i in range(12)]
        stay = [pool.submit(lambda: said(client.completions.create(max_tokens=120, **kw))) for _ in range(6)]
        assert [s.result() for s in stay] == [want] * 6
        assert all(g.result() is not None for g in gone)
    wait_until(lambda: server.admin.revisions()[0]["running"] == 0, 5)  # to their end they would take longer


def test_it_guesses_again_after_a_crash(server):
    (engine,) = [p for p in psutil.Process(server.pid).children() if "llmkit.engine.process" in p.cmdline()]
    engine.kill()
    wait_until(lambda: httpx.get(server.base + "/readyz").status_code == 503)
    wait_until(lambda: httpx.get(server.base + "/readyz").status_code == 200, 60)
    before = metric(server, "vllm:spec_decode_num_draft_tokens_total")
    kw = {"max_tokens": 60, "temperature": 0}
    for _ in range(3):
        reply = said(user(server).completions.create(model="a", prompt=CODE, **kw))
        assert reply == FIRST["greedy", "a"]
    after = metric(server, "vllm:spec_decode_num_draft_tokens_total")
    assert after > before if server.how else after == before == 0


def test_a_draft_model_that_does_not_fit_is_named(folder, tmp_path):
    from llmkit.core.run import read_json, write_json

    with pytest.raises(ServiceError, match=r"nowhere.*(no such|does not exist|not a|no config)"):
        ServerProcess({"a": folder["a"]}, speculate=f"draft:{tmp_path / 'nowhere'}").start()
    other = shutil.copytree(folder["small"], tmp_path / "other")
    config = read_json(other / "config.json")
    write_json(other / "config.json", config | {"vocab_size": 99})
    with pytest.raises(ServiceError, match="has a vocabulary of 99 tokens"):
        ServerProcess({"a": folder["a"]}, variant="torch", speculate=f"draft:{other}").start()
