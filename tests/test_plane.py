"""The monitor behind a real server: its worker killed, held up, without a disk, and left behind; serving goes on."""

import os
import resource
import shutil
import signal
import subprocess
import time

import httpx
import psutil
import pytest

from llmkit.core.tiny import tiny_model
from llmkit.monitoring.alerts import default_rules
from llmkit.monitoring.evaluator import Evaluator
from llmkit.monitoring.requestlog import read_requests
from llmkit.monitoring.series import Store, Target, ingest
from llmkit.serving.client import AdminClient
from llmkit.serving.process import ServerProcess


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "a")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "requests.db"
    with ServerProcess({"a": folder}, engine="mock", log=log, price_tokens=2.0) as s:
        s.log = log
        yield s


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.base, timeout=60) as client:
        yield client


def ask(http, n=1, **more):
    "The ids of `n` answered requests."
    body = {"model": "llmkit", "prompt": "mail ann@example.com", "max_tokens": 3, "temperature": 0} | more
    replies = [http.post("/v1/completions", json=body) for _ in range(n)]
    assert {r.status_code for r in replies} == {200}
    return [r.json()["id"] for r in replies]


def label(http, **said):
    return http.post("/v1/feedback", json=said).status_code


def metric(http, name):
    "The number after `name`, which has its labels; 0 if it is not there."
    text = http.get("/metrics").text.splitlines()
    return next((float(x.rpartition(" ")[2]) for x in text if x.startswith(f"llmkit:{name} ")), 0.0)


def wait_until(what, seconds=30.0):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)
    return found


def worker(server):
    "The monitor's process, once there is one."
    children = lambda: psutil.Process(server.pid).children()  # noqa: E731
    return wait_until(lambda: [p for p in children() if "llmkit.monitoring.worker" in p.cmdline()])[0]


def logged(server):
    return {r["id"]: r for r in read_requests(server.log)} if server.log.exists() else {}


def test_a_row_its_feedback_and_what_it_cost(server, http):
    first, second = ask(http, 2, metadata={"team": "docs"}, user="ann")
    (hidden,) = ask(http, store=False)
    assert label(http, request_id=first, name="thumbs", value=1) == 202
    assert label(http, request_id=second, name="thumbs", value=0) == 202
    assert label(http, request_id=second, name="label", text="ask bob@example.com") == 202
    assert label(http, request_id="nobody", name="completed", value=1) == 202
    wrong = ({"name": "thumbs", "value": 0.5}, {"name": "label", "value": 1}, {"name": "thumbs"}, {"value": 1})
    assert {label(http, request_id=first, **said) for said in wrong} == {400}
    wait_until(lambda: metric(http, 'satisfaction{revision="a"}') == 0.5)
    wait_until(lambda: len(logged(server).get(second, {"labels": ()})["labels"]) == 2)
    rows = logged(server)
    assert hidden not in rows and rows[first]["prompt"] == "mail <EMAIL>"
    assert rows[second]["labels"] == {"thumbs": 0.0, "label": "ask <EMAIL>"}
    where = {"metadata.team": "docs", "user": "ann"}
    assert [r["id"] for r in read_requests(server.log, alias="llmkit", where=where)] == [first, second]
    tokens = sum(r["prompt_tokens"] + r["completion_tokens"] for r in rows.values())
    assert metric(http, 'cost_dollars_total{revision="a"}') == pytest.approx(tokens / 1000 * 2.0 * 3 / 2)  # hidden, too
    assert metric(http, 'feedback_total{name="thumbs",revision="a",value="1"}') == 1
    assert metric(http, "feedback_unknown") == 1 and metric(http, 'accuracy{revision="a"}') == 0
    assert metric(http, 'route_share{alias="llmkit",revision="a"}') == 1
    assert metric(http, 'request_phase_seconds_count{phase="write",revision="a"}') == 3
    assert metric(http, "system_memory_total_bytes") > 0 and metric(http, "monitor_dropped_total") == 0


def test_drift_can_be_asked_for(server, http):
    with AdminClient(server.base, server.admin_key) as admin:
        assert admin.drift() == {} == admin.drift("a")
        assert "no profile" in admin.call("GET", "/admin/drift")["unwatched"]["a"]
    assert http.get("/admin/drift").status_code == 401


def test_a_worker_that_is_held_up_is_shown_and_catches_up(server, http):
    held = worker(server)
    held.send_signal(signal.SIGSTOP)
    ids = ask(http, 40)
    time.sleep(0.3)
    assert metric(http, "monitor_behind_seconds") > 0.2
    assert not set(ids) & logged(server).keys()
    held.send_signal(signal.SIGCONT)
    wait_until(lambda: set(ids) <= logged(server).keys())
    wait_until(lambda: metric(http, "monitor_behind_seconds") == 0)
    assert metric(http, "monitor_dropped_total") == 0


def test_a_worker_that_dies_is_replaced_and_its_loss_counted(server, http):
    before = worker(server)
    before.send_signal(signal.SIGSTOP)
    ids = ask(http, 10)
    time.sleep(0.2)  # they are in its pipe
    before.kill()
    ask(http, 10)  # nobody who asks notices
    wait_until(lambda: metric(http, "monitor_restarts_total") == 1)
    after = worker(server)
    assert after.pid != before.pid
    (last,) = ask(http)
    wait_until(lambda: last in logged(server))
    lost = [i for i in ids if i not in logged(server)]
    assert lost and metric(http, "monitor_dropped_total") >= len(lost)
    wait_until(lambda: metric(http, 'satisfaction{revision="a"}') == 0.5)  # as the log has it


def test_a_full_disk_loses_rows_and_nothing_else(server, http):
    process, log = worker(server), server.log
    _, hard = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (4096, hard))  # any write beyond that fails
    before, restarts = logged(server).keys(), metric(http, "monitor_restarts_total")
    lost = ask(http, 20, prompt="x" * 200)
    wait_until(lambda: metric(http, "request_log_lost_total") >= 20)
    assert not set(lost) & logged(server).keys()
    process.rlimit(resource.RLIMIT_FSIZE, (hard, hard))
    (found,) = ask(http)
    wait_until(lambda: found in logged(server))
    assert before <= logged(server).keys() and metric(http, "monitor_restarts_total") == restarts
    assert "items lost so far" in server.output() and log.exists()


@pytest.fixture
def small_disk(tmp_path):
    "A file system of one megabyte."
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no `mount` here")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk):
    "Take all the room that there is on a disk; the file that has it."
    with (disk / "junk").open("wb", buffering=0) as f, pytest.raises(OSError, match="No space left"):
        while True:
            f.write(bytes(4096))
    return disk / "junk"


def rang(http, store, at):
    "The names of the shipped rules that hold after another look at the server, at a time of our own."
    ingest(store, Target("http://own/metrics"), http.get("/metrics").text, at)
    return {a.name for a in Evaluator(default_rules(), store).evaluate(at)}


def test_a_file_system_without_room(folder, small_disk):
    "Filled under a server, whose worker dies, and which begins anew: it serves, counts, rings, and writes again."
    log, big, store = small_disk / "requests.db", {f"k{i}": "y" * 500 for i in range(8)}, Store()
    lost = lambda http: metric(http, "request_log_lost_total")  # noqa: E731
    with ServerProcess({"a": folder}, engine="mock", log=log) as s, httpx.Client(base_url=s.base, timeout=60) as http:
        s.log = log
        first = ask(http, 20)
        wait_until(lambda: set(first) <= logged(s).keys())
        assert "log_losing_rows" not in rang(http, store, 1000.0)
        junk = fill(small_disk)
        ask(http, 60, metadata=big)
        before = wait_until(lambda: lost(http))
        assert "log_losing_rows" in rang(http, store, 1015.0)
        worker(s).kill()
        wait_until(lambda: metric(http, "monitor_restarts_total") == 1)
        ask(http, 60, metadata=big)  # the next worker has to do without a disk from its first moment
        wait_until(lambda: lost(http) > before)
        assert "log_losing_rows" in rang(http, store, 1030.0)
        junk.unlink()
        (there,) = ask(http)
        wait_until(lambda: there in logged(s))
        assert set(first) <= logged(s).keys() and metric(http, "monitor_restarts_total") == 1
    junk = fill(small_disk)
    with ServerProcess({"a": folder}, engine="mock", log=log) as s, httpx.Client(base_url=s.base, timeout=60) as http:
        s.log = log
        ask(http, 20)
        wait_until(lambda: lost(http) >= 20)
        junk.unlink()
        (again,) = ask(http)
        wait_until(lambda: {*first, there, again} <= logged(s).keys())
        assert metric(http, "monitor_restarts_total") == 0


def test_it_ends_with_the_server_and_writes_what_it_has(folder, tmp_path):
    log = tmp_path / "requests.db"
    for number, code in ((signal.SIGTERM, 0), (signal.SIGKILL, -9)):
        s = ServerProcess({"a": folder}, engine="mock", log=log).start()
        s.log = log
        with httpx.Client(base_url=s.base) as client:
            ids = ask(client, 30)
        process = worker(s)
        if number == signal.SIGTERM:
            process.send_signal(signal.SIGTERM), process.send_signal(signal.SIGINT)  # as a terminal or an init would
        else:
            time.sleep(0.1)  # what was in the ring is gone with the server; what was in the pipe is not
        os.kill(s.pid, number)
        assert s._process.wait(30) == code
        wait_until(lambda p=process: not p.is_running() or p.status() == psutil.STATUS_ZOMBIE)
        assert set(ids) <= logged(s).keys()
        s.stop()


def test_without_a_monitor_there_is_none(folder):
    with ServerProcess({"a": folder}, engine="mock", monitor=False) as s, httpx.Client(base_url=s.base) as client:
        (id,) = ask(client)
        assert label(client, request_id=id, name="thumbs", value=1) == 409
        names = [" ".join(p.cmdline()) for p in psutil.Process(s.pid).children()]
        assert not any("llmkit.monitoring.worker" in n for n in names)
