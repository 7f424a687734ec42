"""What the server says of itself in /openapi.json, held against what it does."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from conftest import LENGTHS, Served
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

EXAMPLES = 25  # of each operation


@pytest.fixture(scope="session")
def description(served: Served) -> Any:
    """The schema that the running server shows, and which of its own checks schemathesis leaves out."""
    config = SchemathesisConfig.from_dict(
        {
            "seed": 3,
            "generation": {"max-examples": EXAMPLES, "deterministic": True, "no-shrink": True},
            "phases": {"stateful": {"enabled": False}},
            "checks": {
                # JSON Schema cannot say which fields exclude each other or how much a model holds: such bodies get 400.
                "positive_data_acceptance": {"enabled": False},
            },
        }
    )
    return schemathesis.openapi.from_url(f"{served.base}/openapi.json", config=config)


schema = schemathesis.pytest.from_fixture("description")


def within_reach(case: Any) -> None:
    """Ask for a model that is there and for a few tokens; what was made invalid in a body stays as it is."""
    body = case.body
    if not isinstance(body, dict) or "/admin" in case.path:
        return
    if isinstance(body.get("model"), str):
        body["model"] = "short"
    if isinstance(body.get("n"), int) and 2 < body["n"] <= 64:
        body["n"] = 2
    if (field := LENGTH.get(case.path)) and body.get(field) is None:
        body[field] = 4


LENGTH = {"/v1/completions": "max_tokens", "/v1/chat/completions": "max_tokens", "/v1/responses": "max_output_tokens"}


def sensible(case: Any) -> None:
    """What no schema says of a valid body: most of them would get 400 and show nothing of the replies."""
    body = case.body if isinstance(case.body, dict) else {}
    if case.path == "/v1/completions" and not isinstance(body.get("prompt"), str):
        body["prompt"] = [[1, 2], [3]]
    if case.path in ("/v1/completions", "/tokenize"):
        body["prompt"] = body.get("prompt") or "def"
    if case.path == "/tokenize":
        body |= {"messages": None, "tools": None, "add_generation_prompt": None}
    for message in body.get("messages") or ():
        message |= {"role": "user", "content": message.get("content") or "hi", "tool_calls": None, "tool_call_id": None}
    for option, needed in (("stream_options", "stream"), ("top_logprobs", "logprobs")):
        if body.get(option):
            body[needed] = True
    if case.path == "/admin/routes/{alias}":
        body |= {"weights": {"tiny": 0.5, "short": 0.5}, "shadow": None}
    if case.path == "/v1/models/{name}":
        case.path_parameters["name"] = "tiny"
    if case.path == "/admin/revisions/{name}/state":
        case.path_parameters["name"] = "tiny"
        body["state"] = "warm"


STATUS: dict[str, set[int]] = {}  # which statuses each operation was seen with


@schema.parametrize()
@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_operation(case: Any, served: Served) -> None:
    """No 5xx; status, content type, headers and body as described; what is invalid is refused, and so is no key."""
    within_reach(case)
    if case.meta.generation.mode == GenerationMode.POSITIVE:
        sensible(case)
    if case.method == "DELETE" and case.path_parameters.get("name") in LENGTHS:
        return  # what is served stays
    response = case.call_and_validate(headers=bearer(served, case.path), timeout=60)
    STATUS.setdefault(f"{case.method} {case.path}", set()).add(response.status_code)


def bearer(served: Served, path: str) -> dict[str, str]:
    """The key that a path wants."""
    return {"Authorization": f"Bearer {served.admin_key if path.startswith('/admin') else served.key}"}


def test_every_operation_was_seen_to_succeed(description: Any) -> None:
    """Refusals alone would say nothing of what an operation answers."""
    wanted = {o.label for o in (found.ok() for found in description.get_all_operations())}
    done = {name for name, seen in STATUS.items() if seen & {200, 202}}
    assert wanted - done == {f"{m} {path}" for m in ("PUT", "DELETE") for path in (REVISION, ADAPTER)}  # see below


REVISION, ADAPTER = "/admin/revisions/{name}", "/admin/revisions/{name}/adapters/{adapter}"


def test_an_adapter_comes_and_goes(description: Any, served: Served) -> None:
    """Loaded, unloaded, and then it is not there."""
    body = {"folder": str(served.folder.with_name("adapter"))}
    for method, sent, status in (("PUT", body, 201), ("DELETE", None, 200), ("DELETE", None, 404)):
        given = {"body": sent, "media_type": "application/json"} if sent else {}
        case = description[ADAPTER][method].Case(path_parameters={"name": "tiny", "adapter": "style"}, **given)
        assert case.call_and_validate(headers=bearer(served, ADAPTER), timeout=60).status_code == status


def test_a_revision_comes_and_goes(description: Any, served: Served) -> None:
    path, body = REVISION, {"model": str(served.folder), "variant": "torch"}
    for method, sent, status in (("PUT", body, 201), ("PUT", body, 409), ("DELETE", None, 200), ("DELETE", None, 404)):
        given = {"body": sent, "media_type": "application/json"} if sent else {}
        case = description[path][method].Case(path_parameters={"name": "third"}, **given)
        assert case.call_and_validate(headers=bearer(served, path), timeout=120).status_code == status
