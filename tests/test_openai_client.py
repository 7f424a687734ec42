"""The official client with strict validation of what it reads, over every endpoint and option."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseCompletedEvent, ResponseIncompleteEvent
from pydantic import BaseModel, ConfigDict

from llmkit.core.tiny import TEXTS, tiny_model, tiny_tokenizer
from llmkit.serving.process import ServerProcess

HI = [{"role": "user", "content": "hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "add two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
FLAT = {"type": "function", **ADD["function"], "strict": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("model") / "a", max_length=2048)
    with ServerProcess({"a": folder}, variant="torch", slots=4, threads=1) as s:
        yield s


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True)


@pytest.fixture(scope="module")
def loose(server):
    "OpenAI's types have no null where OpenAI sends one: an open finish_reason of a completion."
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)


def complete(client, **kw):
    given = {"model": "a", "prompt": TEXTS[0][:20], "max_tokens": 6, "temperature": 0}
    return client.completions.create(**(given | kw))


def chat(client, **kw):
    return client.chat.completions.create(**({"model": "a", "messages": HI, "max_tokens": 6, "temperature": 0} | kw))


def respond(client, **kw):
    given = {"model": "a", "input": "hi", "max_output_tokens": 6, "temperature": 0}
    return client.responses.create(**(given | kw))


SHARED = [
    {"top_p": 0.5, "temperature": 1.0, "seed": -7},
    {"n": 3, "temperature": 1.5, "seed": 1},
    {"stop": ["zzz", "e"]},
    {"presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"logit_bias": {"9": -100, "10": 5}},
    {"user": "ann", "metadata": {"k": "v"}, "store": False},
    {"service_tier": "default", "safety_identifier": "s", "prompt_cache_key": "p"},
    {"response_format": {"type": "text"}},
    {"extra_body": {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "priority": -1}},
    {"extra_body": {"ignore_eos": True, "stop_token_ids": [9], "return_token_ids": True}},
]
ONLY_CHAT = ("metadata", "store", "service_tier", "response_format")


@pytest.mark.parametrize("kw", SHARED, ids=lambda kw: "-".join(kw))
def test_options_of_both(client, kw):
    reply = chat(client, **kw)
    assert isinstance(reply, ChatCompletion) and len(reply.choices) == kw.get("n", 1)
    assert {c.finish_reason for c in reply.choices} <= {"stop", "length"}
    if any(k in kw for k in ONLY_CHAT):  # the client has no argument for them here
        kw = {"extra_body": kw}
    reply = complete(client, **kw)
    assert isinstance(reply, Completion) and len(reply.choices) == kw.get("n", 1)


def test_options_of_completions(client):
    both = complete(client, prompt=["def f(", "x"], best_of=2, n=2, echo=True)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert [c.text[:1] for c in both.choices] == ["d", "d", "x", "x"]
    known = complete(client, prompt=[[5, 6], [7]], logprobs=2).choices
    assert all(len(c.logprobs.tokens) == len(c.logprobs.top_logprobs) for c in known)
    assert complete(client, prompt=[5, 6]).usage.prompt_tokens == 2
    middle = complete(client, prompt="def f(", suffix="return x", extra_body={"return_token_ids": True})
    plain = complete(client, prompt="def f(", extra_body={"return_token_ids": True})
    assert middle.usage.prompt_tokens > plain.usage.prompt_tokens + 3
    with pytest.raises(openai.BadRequestError, match="best_of=3 is not supported"):
        complete(client, best_of=3)


def test_options_of_chat(client):
    reply = chat(client, logprobs=True, top_logprobs=3)
    assert [len(t.top_logprobs) for t in reply.choices[0].logprobs.content] == [3] * reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0
    turns = [{"role": "developer", "content": "be brief"}, *HI, reply.choices[0].message]
    turns += [{"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}]}]
    more = chat(client, messages=turns, max_tokens=openai.NOT_GIVEN, max_completion_tokens=3, modalities=["text"])
    assert more.usage.completion_tokens <= 3 and more.usage.prompt_tokens > reply.usage.prompt_tokens


@pytest.mark.parametrize("kw", [{}, {"n": 2}, {"stop": "e"}, {"seed": 3, "temperature": 1.2}], ids=str)
def test_streams_add_up(client, loose, kw):
    kw = kw | {"stream_options": {"include_usage": True}}
    whole = {k: v for k, v in kw.items() if k != "stream_options"}
    pairs = [(chat(client, stream=True, **kw), chat(client, **whole), lambda c: c.delta.content, ChatCompletionChunk)]
    pairs += [(complete(loose, stream=True, **kw), complete(client, **whole), lambda c: c.text, Completion)]
    for stream, reply, text, kind in pairs:
        chunks = list(stream)
        assert all(isinstance(c, kind) for c in chunks)
        assert {(c.id, c.created, c.model) for c in chunks} == {(chunks[0].id, chunks[0].created, "a")}
        for made in reply.choices:
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == made.index]
            said = made.message.content if kind is ChatCompletionChunk else made.text
            assert "".join(text(c) or "" for c in mine) == said
            assert [c.finish_reason for c in mine if c.finish_reason] == [made.finish_reason]
        assert (chunks[-1].choices, chunks[-1].usage) == ([], reply.usage)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_end_of_a_stream(server, path):
    body = {"model": "a", "max_tokens": 3, "stream": True} | ({"messages": HI} if "chat" in path else {"prompt": "x"})
    with httpx.stream("POST", f"{server.url}/{path}", json=body) as r:
        assert r.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in r.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])
    last = json.loads(lines[-2][6:])
    assert last["choices"][0]["finish_reason"] in ("stop", "length") and last.get("usage") is None


def test_tools_are_told_and_calls_come_back_in_the_history(client):
    told = chat(client, tools=[ADD])
    assert told.usage.prompt_tokens > chat(client, tools=[ADD], tool_choice="none").usage.prompt_tokens + 50
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": true}'}}
    turns = [
        *HI,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "4"},
    ]
    assert chat(client, messages=turns, tools=[ADD], parallel_tool_calls=False).choices[0].message.role == "assistant"
    with pytest.raises(openai.BadRequestError, match="'sub' is not among the tools"):
        chat(client, tools=[ADD], tool_choice={"type": "function", "function": {"name": "sub"}})


FORCED = ["required", {"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize("choice", FORCED, ids=["required", "named"])
@pytest.mark.parametrize("stream", [True, False])
def test_forced_calls(client, choice, stream):
    kw = {"tools": [ADD], "tool_choice": choice, "max_tokens": 100, "temperature": 1, "seed": 1}
    kw |= {"parallel_tool_calls": False}
    if stream:
        with client.chat.completions.stream(model="a", messages=HI, **kw) as s:
            reply = s.get_final_completion()
    else:
        reply = chat(client, **kw)
    made = reply.choices[0]
    assert (made.finish_reason, made.message.content) == ("tool_calls", None)
    (call,) = made.message.tool_calls
    assert call.function.name == "add" and isinstance(json.loads(call.function.arguments)["a"], bool)


@pytest.mark.parametrize("choice", FORCED, ids=["required", "named"])
def test_forced_calls_that_are_cut_off(client, choice):
    "What is there of the arguments, never as text; the same in a stream."
    blank = {str(i): -100 for t, i in tiny_tokenizer().get_vocab().items() if {"\u0120", "\u010a"} & set(t)}
    kw = {"tools": [ADD], "tool_choice": choice, "temperature": 1, "seed": 1, "logit_bias": blank}
    full = chat(client, **kw, max_tokens=100).choices[0].message.tool_calls[0].function.arguments
    seen = set()
    for n in range(1, 40):
        made = chat(client, **kw, max_tokens=n).choices[0]
        calls = [c.function for c in made.message.tool_calls or ()]
        chunks = [c.choices[0] for c in chat(client, **kw, max_tokens=n, stream=True)]
        deltas = [d.function for c in chunks for d in c.delta.tool_calls or ()]
        streamed = "".join(d.arguments or "" for d in deltas if d)
        assert (made.message.content or "", "".join(c.delta.content or "" for c in chunks)) == ("", "")
        assert chunks[-1].finish_reason == made.finish_reason
        if made.finish_reason != "length":
            break
        assert streamed == "".join(c.arguments for c in calls) and full.startswith(streamed)
        assert [d.name for d in deltas if d.name] == [c.name for c in calls] == ["add"] * len(calls)
        seen.add(streamed)
    assert {"", "{"} <= seen and len(seen) > 2


class Flag(BaseModel):
    model_config = ConfigDict(extra="forbid")
    on: bool


def test_forms(client):
    kw = {"max_tokens": 60, "temperature": 1, "seed": 1}
    parsed = client.chat.completions.parse(model="a", messages=HI, response_format=Flag, **kw)
    assert isinstance(parsed.choices[0].message.parsed, Flag)
    for outputs, fine in (
        ({"choice": ["yes", "no"]}, ("yes", "no").__contains__),
        ({"regex": "[ab]{3}"}, lambda t: len(t) == 3 and set(t) <= set("ab")),
        ({"json": Flag.model_json_schema()}, Flag.model_validate_json),
    ):
        assert fine(complete(client, extra_body={"structured_outputs": outputs}, **kw).choices[0].text)
    asked = {"text": {"format": {"type": "json_schema", "name": "flag", "schema": Flag.model_json_schema()}}}
    assert Flag.model_validate_json(respond(client, temperature=1, max_output_tokens=60, **asked).output_text)


WILD = {"type": "object", "properties": {f"x{i}": {"type": "integer"} for i in range(700)}}  # more than can be followed


def test_a_form_that_is_given_up_is_an_error_of_its_request_alone(client, loose):
    outputs, said = {"structured_outputs": {"json": WILD}}, "the grammar cannot be followed any further: Parser Error"
    neighbour = {"prompt": TEXTS[1][:20], "max_tokens": 60}
    want = complete(client, **neighbour).choices[0].text
    text = {"format": {"type": "json_schema", "name": "x", "schema": WILD}}
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(complete, client, **neighbour)
        for ask in (complete, chat):
            with pytest.raises(openai.BadRequestError, match=said) as e:
                ask(client, max_tokens=30, extra_body=outputs)
            assert e.value.code == "invalid_grammar"
            with pytest.raises(openai.APIError, match=said):  # in the middle of a stream, which has its 200 already
                list(ask(loose, max_tokens=30, extra_body=outputs, stream=True))
        with pytest.raises(openai.BadRequestError, match=said):
            client.responses.create(model="a", input="hi", text=text)
        assert going.result().choices[0].text == want


def test_responses(client):
    reply = respond(client, instructions="be brief", top_p=0.9, metadata={"k": "v"}, tools=[FLAT], store=False)
    assert isinstance(reply, Response) and reply.id.startswith("resp_")
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (reply.usage.output_tokens, reply.metadata, reply.tools[0].name) == (6, {"k": "v"}, "add")
    items = [{"role": "user", "content": [{"type": "input_text", "text": "2?"}]}, *reply.output]
    items += [{"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}]
    items += [{"type": "function_call_output", "call_id": "c", "output": "4"}]
    assert respond(client, input=items).usage.input_tokens > 20
    assert respond(client).output_text == chat(client).choices[0].message.content


def test_a_stream_of_responses(client):
    events = list(respond(client, stream=True))
    whole = respond(client)
    kinds = [e.type.removeprefix("response.") for e in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    assert isinstance(events[-1], ResponseCompletedEvent | ResponseIncompleteEvent)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert (events[-1].response.output_text, events[-1].response.usage) == (whole.output_text, whole.usage)
    assert [e.sequence_number for e in events] == [*range(len(events))]
    assert {e.response.id for e in events if hasattr(e, "response")} == {events[0].response.id}


REFUSED = [
    ({"store": True}, "keeps no responses"),
    ({"previous_response_id": "resp_1"}, "keeps no responses"),
    ({"tools": [{"type": "web_search"}]}, "only tools of type 'function'"),
    ({"max_output_tokens": 9999}, "the model holds 2048"),
    ({"extra_body": {"max_tokens": 3}}, "did you mean 'max_output_tokens'"),
]


@pytest.mark.parametrize(("kw", "say"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_responses_refuse(client, kw, say):
    with pytest.raises(openai.BadRequestError, match=say) as e:
        respond(client, **kw)
    assert e.value.param.split("[")[0] in (*kw, "input", "max_tokens")


def test_models_and_tokens(client, server):
    assert [m.id for m in client.models.list()] == ["llmkit", "a"]
    assert client.models.retrieve("a").owned_by == "llmkit"
    with pytest.raises(openai.NotFoundError, match="'b' does not exist"):
        client.models.retrieve("b")
    made = httpx.post(f"{server.base}/tokenize", json={"model": "a", "messages": HI}).json()
    assert made["count"] == len(made["tokens"]) == chat(client).usage.prompt_tokens
    back = httpx.post(f"{server.base}/detokenize", json={"model": "a", "tokens": made["tokens"]}).json()
    assert back["prompt"] == "<|user|>\nhi<|end|>\n<|assistant|>\n"


def test_the_description_is_served(server):
    made = httpx.get(f"{server.base}/openapi.json").json()
    assert made["openapi"].startswith("3.1") and "/v1/responses" in made["paths"]


def test_embeddings(client, loose):
    """Floats and base64 (what the client asks for by itself), one text and several, in order; fewer dimensions."""
    one = loose.embeddings.create(model="a", input="def f(x):")  # it validates before it decodes base64
    many = client.embeddings.create(model="a", input=["return x", "def f(x):"], encoding_format="float", user="ann")
    assert [d.index for d in many.data] == [0, 1] and many.usage.total_tokens > one.usage.total_tokens
    assert one.data[0].embedding == pytest.approx(many.data[1].embedding, abs=1e-5)
    few = client.embeddings.create(model="a", input=[9, 10], dimensions=4, encoding_format="float")
    assert len(few.data[0].embedding) == 4
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="a", input="x", dimensions=9999)
    with pytest.raises(openai.BadRequestError, match="input is empty"):
        client.embeddings.create(model="a", input="")
