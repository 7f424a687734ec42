"""Running a command job: code unpacked into a fresh folder, Azure's variables, one process a node, outputs kept."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bindings
from .limits import seconds

if TYPE_CHECKING:
    from .plane import Plane

# Of the plane's own environment: what stands for the image that the job would run in.
KEPT = ("HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
TERMINAL = ("Completed", "Failed", "Canceled")
GRACE_S = 10.0  # between SIGTERM and SIGKILL


@dataclass
class Running:
    """A job under way."""

    stop: threading.Event = field(default_factory=threading.Event)
    preempted: threading.Event = field(default_factory=threading.Event)
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # of the logs that were uploaded
    attempts: int = 0


class Executor:
    """Runs command jobs in threads."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.running: dict[str, Running] = {}

    def start(self, name: str) -> None:
        """Run a job in the background."""
        self.running[name] = Running()
        self.plane.store.background(lambda: self.run(name), f"job {name}")

    def status(self, name: str, status: str, **more: Any) -> None:
        """Say where a job stands."""
        self.plane.jobs.status(name, status, **more)

    def run(self, name: str) -> str:
        """Run a job to its end; how it ended."""
        running = self.running.setdefault(name, Running())
        job = self.plane.store.get(f"/jobs/{name}")["properties"]
        count = int((job.get("resources") or {}).get("instanceCount") or 1)
        cluster = self.plane.computes.name(job.get("computeId"))
        end, error = "Canceled", None
        try:
            self.status(name, "Preparing")
            self.plane.tracking.start(name, job["experimentName"], job["displayName"], job.get("tags") or {})
            while not running.stop.is_set():
                self.status(name, "Queued")
                if not self.plane.computes.take(cluster, count, running.stop):
                    break
                try:
                    end, error = self.attempt(name, job, count, running)
                finally:
                    self.plane.computes.give(cluster, count)
                if not running.preempted.is_set():
                    break
                running.preempted.clear()  # the nodes were taken away: Azure queues the job again
            self.plane.tracking.end(name, end)
            if end == "Completed":
                bindings.publish(self.plane, name, job)
        except Exception as e:  # noqa: BLE001 - whatever it is, the job must end and say so
            end, error = "Failed", f"{type(e).__name__}: {e}"
        self.status(name, end, error=error)
        return end

    def attempt(self, name: str, job: dict[str, Any], count: int, running: Running) -> tuple[str, str | None]:
        """Run all nodes once."""
        folder = self.plane.home / "jobs" / name
        running.attempts += 1
        bound = bindings.bind(self.plane, name, job, folder)
        logs = folder / "logs" / "user_logs"
        logs.mkdir(parents=True, exist_ok=True)
        try:
            self.launch(name, job, count, bound, folder, running)
            self.status(name, "Running")
            return self.watch(name, job, running)
        finally:
            self.kill(running)
            self.status(name, "Finalizing")
            bindings.store(self.plane, bound)
            self.logs(name, running)

    def launch(
        self, name: str, job: dict[str, Any], count: int, bound: bindings.Bound, folder: Path, running: Running
    ) -> None:
        """Start the processes of all nodes."""
        per_node = int((job.get("distribution") or {}).get("processCountPerInstance") or 1)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        running.nodes.clear()
        for rank in range(count * per_node):
            node, local = divmod(rank, per_node)
            code = folder / f"attempt-{running.attempts}" / f"node-{node}"
            if local == 0:
                code.mkdir(parents=True)
                if job.get("codeId"):
                    where = self.plane.assets.find(job["codeId"], "codes")["properties"]["codeUri"]
                    self.plane.blobs.download(*self.plane.blobs.place(where), code)
            env = self.variables(name, job, bound, code)
            if job.get("distribution"):
                env |= {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                env |= {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(count * per_node)}
            env |= {"AZUREML_NODE_COUNT": str(count), "AZUREML_CR_NODE_RANK": str(node)}
            env |= {str(k): str(v) for k, v in (job.get("environmentVariables") or {}).items()}
            path = (
                folder
                / "logs"
                / "user_logs"
                / (f"std_log_process_{rank}.txt" if count * per_node > 1 else "std_log.txt")
            )
            with path.open("ab") as log:
                words = ["/bin/bash", "-c", bound.command]
                run = subprocess.Popen(
                    words, cwd=code, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
                )
            running.nodes.append(run)

    def variables(self, name: str, job: dict[str, Any], bound: bindings.Bound, code: Path) -> dict[str, str]:
        """The environment that Azure Machine Learning gives to a job."""
        plane, here = self.plane, Path(sys.executable).parent
        env = {key: os.environ[key] for key in KEPT if key in os.environ}
        env["PATH"] = os.pathsep.join([str(here), os.environ.get("PATH", os.defpath)])
        env |= {f"AZURE_ML_INPUT_{k}": v for k, v in bound.inputs.items()}
        env |= {f"AZURE_ML_OUTPUT_{k}": str(v) for k, v in bound.outputs.items()}
        parent = (job.get("properties") or {}).get("azureml.parentRunId")
        env |= plane.wire.variables()
        return env | {
            "AZUREML_RUN_ID": name,
            "AZUREML_ROOT_RUN_ID": parent or name,
            "AZUREML_EXPERIMENT_NAME": job["experimentName"],
            "AZUREML_ARM_SUBSCRIPTION": plane.subscription,
            "AZUREML_ARM_RESOURCEGROUP": plane.group,
            "AZUREML_ARM_WORKSPACE_NAME": plane.workspace,
            "AZUREML_ARM_PROJECT_NAME": job["experimentName"],
            "AZUREML_CR_EXECUTION_WORKING_DIR_PATH": str(code),
            "AZUREML_CR_COMPUTE_CONTEXT": "{}",
            "AZUREML_RUN_TOKEN": "none",
            "MLFLOW_TRACKING_URI": plane.tracking.uri,
            "MLFLOW_RUN_ID": name,
            "MLFLOW_EXPERIMENT_NAME": job["experimentName"],
            "PYTHONUNBUFFERED": "1",
        }

    def watch(self, name: str, job: dict[str, Any], running: Running) -> tuple[str, str | None]:
        """Wait for the nodes; the first that fails ends the others."""
        limit = seconds((job.get("limits") or {}).get("timeout"))
        began = shown = time.monotonic()
        while True:
            codes = [node.poll() for node in running.nodes]
            if running.stop.is_set() or self.plane.store.closed.is_set():
                return "Canceled", None
            if running.preempted.is_set():
                return "Canceled", "The node was preempted."
            if any(codes):
                bad = next(code for code in codes if code)
                log = (
                    "user_logs/std_log.txt" if len(codes) == 1 else f"user_logs/std_log_process_{codes.index(bad)}.txt"
                )
                text = f"Execution failed. User process '/bin/bash' exited with status code {bad}."
                return "Failed", f"{text} Please check log file '{log}' for error details."
            if all(code == 0 for code in codes):
                return "Completed", None
            if limit and time.monotonic() - began > limit:
                return "Canceled", f"Job has reached its timeout of {limit:g} seconds."
            if time.monotonic() - shown > 0.5:
                self.logs(name, running)
                shown = time.monotonic()
            time.sleep(0.02)

    def logs(self, name: str, running: Running) -> None:
        """Bring what the nodes have written to storage."""
        folder = self.plane.home / "jobs" / name / "logs"
        client = self.plane.blobs.client("azureml")
        for path in sorted(folder.rglob("*.txt")):
            data, at = path.read_bytes(), path.relative_to(folder).as_posix()
            if running.sizes.get(at) != len(data):
                blob = f"ExperimentRun/dcid.{name}/{at}"
                client.upload_blob(blob, data, overwrite=True, headers=self.plane.blobs.mine)
                running.sizes[at] = len(data)

    def kill(self, running: Running) -> None:
        """End the nodes' processes, all of them."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            for node in running.nodes:
                if how == signal.SIGKILL or node.poll() is None:
                    try:
                        os.killpg(node.pid, how)
                    except ProcessLookupError:
                        continue
            until = time.monotonic() + GRACE_S
            while how == signal.SIGTERM and time.monotonic() < until and any(n.poll() is None for n in running.nodes):
                time.sleep(0.02)
        for node in running.nodes:
            node.wait()

    def cancel(self, name: str) -> None:
        """End a job."""
        if name in self.running:
            self.running[name].stop.set()

    def preempt(self, name: str) -> bool:
        """Take the nodes of a job away; false if it has none."""
        running = self.running.get(name)
        if running is None or not any(node.poll() is None for node in running.nodes):
            return False
        running.preempted.set()
        return True
