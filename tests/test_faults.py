"""What breaks, and what people send who mean no good: each has its answer, and the server goes on serving."""

import os
import re
import resource
import select
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import psutil
import pytest

from llmkit.core.tiny import tiny_model
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess

TIMEOUT_S = 6.0  # of a request; long enough for all that is meant to end by itself
CROWD = 2000


@pytest.fixture(scope="module")
def files():
    "As many open files as the crowd needs, for this process and the server that it starts."
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = CROWD + 500
    if soft < enough <= hard or hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    yield resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def server(files, tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("models") / "a", max_length=16_384)
    kw = {"engine": "mock", "slots": 4, "timeout": TIMEOUT_S, "breaker": 0, "queue": 16}
    with ServerProcess({"a": folder}, **kw) as s:
        s.folder = folder
        yield s
        text = s.output()  # uvicorn tells only the last request of a pipeline that its client has gone
        assert text.count("Traceback") == text.count("RuntimeError: unable to perform operation on <TCPTransport"), text


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def admin(server):
    with AdminClient(server.base, server.admin_key) as a:
        yield a


@pytest.fixture(autouse=True)
def goes_on(http, admin):
    "After each of these the server answers as before, and holds nothing."
    yield
    asked = {"model": "a", "prompt": [20], "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    reply = http.post("/completions", json=asked)
    assert (reply.status_code, reply.json()["choices"][0]["token_ids"]) == (200, [21, 22, 23])
    wait_until(lambda: inside(admin) == (0, 0, 0.0))


def wait_until(what, seconds=20.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def inside(admin):
    "Requests running, requests waiting, share of the KV memory in use."
    r = admin.revisions()[0]
    return r["running"], r["waiting"], r["kv_used"]


def long_one(**kw):
    "A request that would go on for far longer than a test."
    return {"model": "a", "prompt": [20], "max_tokens": 16_000, "ignore_eos": True} | kw


def connect(server):
    host, port = server.base.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def raw(body=b"", path="/v1/completions", method="POST", **headers):
    "A request as bytes; the length is that of `body` if no other is given."
    lines = {"Host": "x", "Content-Length": len(body)} | {k.replace("_", "-"): v for k, v in headers.items()}
    head = "".join(f"{k}: {v}\r\n" for k, v in lines.items() if v is not None)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def read_to_end(sock):
    "All that comes until the other side closes."
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass  # closed with bytes of ours unread
    return b"".join(parts)


def first_answer(sock, got=b""):
    "One whole response, of which `got` is here already."
    sock.settimeout(30)
    while True:
        head, _, body = got.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length and len(body) >= int(length[1]):
            return got
        part = sock.recv(65536)
        assert part, got
        got += part


def restarts(server):
    text = httpx.get(server.base + "/metrics").text
    return float(text.split('llmkit:engine_restarts_total{revision="a"} ')[1].split()[0])


def engine_of(server):
    found = [p for p in psutil.Process(server.pid).children() if "llmkit.engine.process" in p.cmdline()]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("how", ["running", "again"])  # the second time nothing is left of the first
def test_the_engine_is_killed_under_load(server, http, admin, how):
    before, victim = restarts(server), engine_of(server)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(http.post, "/completions", json=long_one(prompt=[20 + i])) for i in range(5)]
        stream = pool.submit(lambda: http.post("/completions", json=long_one(stream=True)).text)
        wait_until(lambda: inside(admin)[0] == 4 and sum(inside(admin)[:2]) == 6)
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: httpx.get(server.base + "/livez").status_code == 503, 5)
        said = httpx.get(server.base + "/livez").json() if restarts(server) == before else None
        replies = [a.result(20) for a in asked]
    for r in replies:
        error = r.json()["error"]
        assert (r.status_code, error["code"], r.headers["retry-after"]) == (503, "engine_failed", "1")
        assert error["message"] == "the engine failed: its process ended with exit code -9"
    assert "its process ended with exit code -9" in stream.result()
    assert said is None or said["reason"] == "the engine of a failed: its process ended with exit code -9"
    wait_until(lambda: httpx.get(server.base + "/readyz").status_code == 200)
    assert restarts(server) == before + 1 and inside(admin) == (0, 0, 0.0)
    assert engine_of(server).pid != victim.pid and not psutil.pid_exists(victim.pid)


BAD = [
    (b"{", "the body is not valid"),
    (b"", "the body is not valid"),
    (b"null", "Expected `object`, got `null`"),
    (b'{"model": "a", "prompt": "\xff\xfe"}', "the body is not valid"),
    (b"\xff\xfe\x00", "the body is not valid"),
    (b"[" * 100_000, ""),
    (b'{"model": "a", "prompt": {"a": 1}}', "prompt"),
    (b'{"model": 7, "prompt": "x"}', "model"),
    (b'{"model": "a", "prompt": "x", "max_tokens": "9"}', "max_tokens"),
    (b'{"model": "a", "prompt": "x", "max_tokens": -1}', "max_tokens"),
    (b'{"model": "a", "prompt": "x", "max_tokens": 100000000000000000000}', "but the model holds 16384"),
    (b'{"model": "a", "prompt": "x", "temperature": NaN}', "the body is not valid"),
    (b'{"model": "a", "prompt": "x", "temperature": 1e999}', "temperature"),
    (b'{"model": "a", "prompt": "x", "n": 1000000000}', "n"),
    (b'{"model": "a", "prompt": [1, 99999]}', "a token id of prompt is not between 0 and"),
    (b'{"model": "a", "prompt": [-1]}', "a token id of prompt is not between 0 and"),
    (b'{"model": "a", "prompt": ""}', "the prompt is empty"),
]


@pytest.mark.parametrize(("body", "say"), BAD, ids=range(len(BAD)))
def test_bodies_that_are_wrong(http, body, say):
    reply = http.post("/completions", content=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert say in error["message"] or say == error["param"], error


def test_a_model_that_is_not_there(http):
    reply = http.post("/completions", json={"model": "gpt-9", "prompt": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert "'gpt-9' does not exist" in reply.json()["error"]["message"]


def test_what_is_no_request(server, http):
    assert http.get("/completions").status_code == 405
    assert http.post("/nowhere", json={}).status_code == 404
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", raw(Content_Length="-5")):
        with connect(server) as s:
            s.sendall(junk)
            assert read_to_end(s).startswith(b"HTTP/1.1 400 "), junk


def test_a_hundred_megabytes(server):
    process, piece = psutil.Process(server.pid), b"%x\r\n" % (1 << 16) + b" " * (1 << 16) + b"\r\n"
    before, sent, rest, answer = process.memory_info().rss, 0, b"", b""
    with connect(server) as s:  # announced: refused before any of it is read
        s.sendall(raw(Content_Length=100 << 20))
        assert b"the body has more than 4194304 bytes" in first_answer(s)
    with connect(server) as s:  # in pieces, of which nobody knows how many are to come
        s.sendall(raw(Transfer_Encoding="chunked", Content_Length=None))
        s.setblocking(False)
        until = time.monotonic() + 20
        while b"\r\n\r\n" not in answer and sent < 100 << 20:
            assert time.monotonic() < until
            select.select([s], [s], [], 1)
            rest = rest or piece
            with suppress(BlockingIOError):
                answer += s.recv(65536)
            with suppress(BlockingIOError, ConnectionError):
                sent += (n := s.send(rest))
                rest = rest[n:]
        answer = first_answer(s, answer)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"the body has more than 4194304 bytes" in answer
    assert sent < 20 << 20  # the limit and what two sockets hold, not a hundred
    assert process.memory_info().rss - before < 40 << 20


def test_lengths_that_lie(server):
    body = b'{"model": "a", "prompt": [20], "max_tokens": 2}'
    with connect(server) as s:  # shorter than the body: what is left over is no request
        s.sendall(raw(body, Content_Length=10))
        found = read_to_end(s)
        assert found.count(b"HTTP/1.1 400 ") == found.count(b"HTTP/1.1 ") >= 1
    with connect(server) as s:  # longer: it waits for the rest, but not for ever
        s.sendall(raw(body, Content_Length=len(body) + 5))
        answer = first_answer(s)
        assert answer.startswith(b"HTTP/1.1 408 ") and f"longer than {TIMEOUT_S:g} s".encode() in answer
    with connect(server) as s:  # whoever leaves in the middle of a body is nobody's error
        s.sendall(raw(body[:9], Content_Length=len(body)))


def test_slow_clients_do_not_keep_others(server, http):
    with ExitStack() as stack:
        heads, bodies = ([stack.enter_context(connect(server)) for _ in range(20)] for _ in range(2))
        for s in bodies:
            s.sendall(raw(Content_Length=1000))
        for s in heads:
            s.sendall(b"GET /livez HTTP/1.1\r\nX-Slow: ")
        began, cut = time.monotonic(), set()
        while len(cut) < len(bodies):
            assert time.monotonic() - began < TIMEOUT_S + 10
            for s in [*heads, *(b for b in bodies if b not in cut)]:
                s.sendall(b" ")
            for s in bodies:
                s.settimeout(0.001)
                try:
                    if s not in cut and s.recv(12) == b"HTTP/1.1 408":
                        cut.add(s)
                except TimeoutError:
                    pass
            asked = time.monotonic()
            assert http.post("/completions", json={"model": "a", "prompt": [20]}).status_code == 200
            assert time.monotonic() - asked < TIMEOUT_S
            time.sleep(0.5)


def test_two_thousand_idle_connections(server, files):
    if files < CROWD + 100:
        pytest.skip(f"{files} open files are allowed, too few for {CROWD} connections")
    process = psutil.Process(server.pid)
    before = process.num_fds()
    with ExitStack() as stack:
        for _ in range(CROWD):
            stack.enter_context(connect(server))
        wait_until(lambda: process.num_fds() >= before + CROWD)
        assert httpx.get(server.base + "/readyz").status_code == 200
        reply = httpx.post(server.url + "/completions", json={"model": "a", "prompt": [20]}, timeout=20)
        assert reply.status_code == 200
    wait_until(lambda: process.num_fds() < before + 20)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave(server, http, admin, stream):
    body = httpx.Request("POST", "http://x", json=long_one(stream=stream)).content
    with ExitStack() as stack:
        for _ in range(6):  # four run, two wait
            stack.enter_context(connect(server)).sendall(raw(body))
        wait_until(lambda: sum(inside(admin)[:2]) == 6)
    wait_until(lambda: inside(admin) == (0, 0, 0.0), TIMEOUT_S / 2)  # they would be cut off only after TIMEOUT_S


def test_garbage_in_the_pipeline(server):
    good = raw(b'{"model": "a", "prompt": [20], "max_tokens": 2}')
    with connect(server) as s:  # two at once: two answers, in order
        s.sendall(good + raw(path="/v1/models", method="GET", Connection="close"))
        found = read_to_end(s)
        assert found.count(b"HTTP/1.1 200 ") == 2 and found.index(b"text_completion") < found.index(b'"list"')
    for junk in (b"\x00\xff" * 500, b"{}\r\n\r\n", b"GET\r\n\r\n"):
        with connect(server) as s:
            s.sendall(good + junk)
            assert b"HTTP/1.1 400 " in read_to_end(s)
    with connect(server) as s:  # a thousand that nobody waits for
        s.sendall(good * 1000)


def test_heads_have_a_deadline(server, files):
    if files < CROWD + 100:
        pytest.skip(f"{files} open files are allowed, too few for {CROWD} connections")
    kw = {"engine": "mock", "slots": 4, "head": 2.0}
    with ServerProcess({"a": server.folder}, **kw) as s, ExitStack() as stack:
        process = psutil.Process(s.pid)
        before, began = process.num_fds(), time.monotonic()
        crowd = [stack.enter_context(connect(s)) for _ in range(CROWD)]
        slow = [stack.enter_context(connect(s)) for _ in range(20)]
        for sock in slow:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nX-Slow: ")
        going = stack.enter_context(connect(s))  # a request may take longer than a head
        going.sendall(raw(b'{"model": "a", "prompt": [20], "max_tokens": 2}')[:-10])
        while process.num_fds() > before + 20 and time.monotonic() < began + 60:
            for sock in slow:
                with suppress(ConnectionError):
                    sock.sendall(b"x")
            time.sleep(0.25)
        assert process.num_fds() <= before + 20
        assert [read_to_end(sock) for sock in (crowd[0], crowd[-1])] == [b"", b""]
        answers = [read_to_end(sock) for sock in slow]
        assert b"took longer than 2 s to come" in answers[0] and answers[0].startswith(b"HTTP/1.1 408 ")
        going.sendall(raw(b'{"model": "a", "prompt": [20], "max_tokens": 2}')[-10:])
        assert first_answer(going).startswith(b"HTTP/1.1 200 ")
        assert "Traceback" not in s.output()
