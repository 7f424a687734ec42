"""Jobs of jobs: a pipeline runs its nodes in order of what they hand on, a sweep runs one command with many values."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
import threading
from typing import TYPE_CHECKING, Any

from . import bindings
from .limits import bad

if TYPE_CHECKING:
    from .plane import Plane

PARENT = re.compile(r"\$\{\{\s*parent\.(inputs|outputs|jobs)\.([\w-]+)(?:\.outputs\.([\w-]+))?\s*\}\}")
Properties = dict[str, Any]


def links(node: Properties) -> list[tuple[str, str, str]]:
    """What a node's inputs and outputs refer to: kind, name, output."""
    given = [*(node.get("inputs") or {}).values(), *(node.get("outputs") or {}).values()]
    texts = [str((g.get("value") or g.get("uri") or "") if isinstance(g, dict) else g) for g in given]
    return [(m[1], m[2], m[3] or "") for text in texts for m in PARENT.finditer(text)]


class Composite:
    """Pipelines and sweeps."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.stopped: dict[str, threading.Event] = {}

    def check(self, properties: Properties) -> None:
        """Refuse what the service refuses."""
        if properties["jobType"] == "Sweep":
            self.check_sweep(properties)
            return
        nodes = properties.get("jobs") or {}
        if not nodes:
            raise bad("a pipeline without jobs")
        for name, node in nodes.items():
            self.plane.jobs.check_command(self.child(properties, name, node, {}))
            for kind, other, output in links(node):
                if kind == "jobs" and (other not in nodes or not self.produces(nodes[other], output)):
                    raise bad(
                        f"job '{name}' reads output '{output}' of '{other}', which there is not", "InvalidBinding"
                    )
                if kind != "jobs" and other not in (properties.get(kind) or {}):
                    raise bad(
                        f"job '{name}' names {kind} '{other}', which the pipeline does not have", "InvalidBinding"
                    )
        self.order(nodes)

    def produces(self, node: Properties, output: str) -> bool:
        """Whether a node has an output."""
        spec = self.plane.assets.find(node["componentId"], "components")["properties"]["componentSpec"]
        return output in (spec.get("outputs") or {})

    def order(self, nodes: dict[str, Properties]) -> dict[str, set[str]]:
        """What each node waits for; a circle is refused."""
        waits = {name: {o for k, o, _ in links(node) if k == "jobs"} for name, node in nodes.items()}
        done: set[str] = set()
        while len(done) < len(nodes):
            ready = {name for name, others in waits.items() if name not in done and others <= done}
            if not ready:
                raise bad(f"the jobs {', '.join(sorted(set(nodes) - done))} wait for each other", "CyclicPipeline")
            done |= ready
        return waits

    def check_sweep(self, properties: Properties) -> None:
        """A trial that is a command, a search space, limits within bounds."""
        trial, bounds = properties.get("trial") or {}, properties.get("limits") or {}
        for name in re.findall(r"\$\{\{\s*search_space\.(\w+)", trial.get("command") or ""):
            if name not in (properties.get("searchSpace") or {}):
                raise bad(f"the command names search_space.{name}, which the search space does not have")
        if not properties.get("searchSpace"):
            raise bad("a sweep without a search space")
        if (
            not 1 <= int(bounds.get("maxTotalTrials") or 1) <= 1000
            or not 1 <= int(bounds.get("maxConcurrentTrials") or 1) <= 100
        ):
            raise bad("a sweep has from 1 to 1000 trials, from 1 to 100 at once")
        self.plane.jobs.check_command(self.trial(properties, {}))

    def child(self, parent: Properties, name: str, node: Properties, made: dict[str, str], job: str = "") -> Properties:
        """The command job of a node; `made` has the names of the jobs of other nodes."""
        spec = self.plane.assets.find(node.get("componentId"), "components")["properties"]["componentSpec"]
        settings = {k.lower().replace("_", ""): v for k, v in (parent.get("settings") or {}).items()}
        resources = {**(spec.get("resources") or {}), **(node.get("resources") or {})}
        count = resources.get("instance_count") or resources.get("instanceCount") or 1
        distribution = node.get("distribution") or spec.get("distribution")
        if distribution:
            kind = str(distribution.get("type") or distribution.get("distribution_type")).lower()
            kinds = {"pytorch": "PyTorch", "mpi": "Mpi", "tensorflow": "TensorFlow"}
            per = distribution.get("process_count_per_instance") or 1
            distribution = {"distributionType": kinds.get(kind, kind), "processCountPerInstance": per}
        inputs = {
            k: self.input(parent, v, (node.get("inputs") or {}).get(k), made)
            for k, v in (spec.get("inputs") or {}).items()
        }
        outputs = {
            k: self.output(parent, v, (node.get("outputs") or {}).get(k), job)
            for k, v in (spec.get("outputs") or {}).items()
        }
        return {
            "jobType": "Command",
            "command": spec["command"],
            "codeId": spec.get("code"),
            "environmentId": spec["environment"],
            "computeId": node.get("computeId") or parent.get("computeId") or settings.get("defaultcompute"),
            "displayName": node.get("display_name") or name,
            "experimentName": parent.get("experimentName") or "Default",
            "environmentVariables": node.get("environment_variables") or spec.get("environment_variables") or {},
            "distribution": distribution,
            "resources": {"instanceCount": count, "shmSize": resources.get("shm_size")},
            "inputs": inputs,
            "outputs": outputs,
        }

    def input(self, parent: Properties, spec: Properties, given: Any, made: dict[str, str]) -> Properties | None:
        """An input of a node, followed to where it comes from."""
        if given is None:
            value = spec.get("default")
            return None if value is None else {"jobInputType": "literal", "value": str(value)}
        text = str(given.get("value", given.get("uri", "")) if isinstance(given, dict) else given)
        kind = str(spec.get("type"))
        if found := PARENT.fullmatch(text):
            if found[1] == "inputs":
                return copy.deepcopy((parent.get("inputs") or {}).get(found[2]))
            job = made.get(found[2], "later")
            uri = bindings.destination(
                job, found[3], self.plane.jobs.sent.get(job, {}).get("outputs", {}).get(found[3])
            )
            return {"jobInputType": kind, "uri": uri}
        if isinstance(given, dict) and given.get("uri"):
            return {"jobInputType": given.get("job_input_type") or kind, "uri": given["uri"], "mode": given.get("mode")}
        return {"jobInputType": "literal", "value": text}

    def output(self, parent: Properties, spec: Properties, given: Any, job: str) -> Properties:
        """An output of a node, put where the pipeline's own output is if it is bound to one."""
        output = {"jobOutputType": spec.get("type") or "uri_folder"}
        text = str(given.get("value", "")) if isinstance(given, dict) else str(given or "")
        if (found := PARENT.fullmatch(text)) and found[1] == "outputs":
            output["uri"] = bindings.destination(job, found[2], (parent.get("outputs") or {}).get(found[2]))
        return output

    def start(self, name: str) -> None:
        """Run a pipeline or a sweep in the background."""
        self.stopped[name] = threading.Event()
        kind = self.plane.store.get(f"/jobs/{name}")["properties"]["jobType"]
        work = self.pipeline if kind == "Pipeline" else self.sweep
        self.plane.store.background(lambda: self.guard(name, work), f"job {name}")

    def guard(self, name: str, work: Any) -> None:
        """Run it, and say how it ended."""
        self.plane.jobs.status(name, "Running")
        try:
            properties = self.plane.store.get(f"/jobs/{name}")["properties"]
            ends = work(name, properties)
            bad_ones = [f"{child}: {end}" for child, end in ends.items() if end != "Completed"]
            end = "Canceled" if self.stopped[name].is_set() else "Failed" if bad_ones else "Completed"
            if end == "Completed":
                bindings.publish(self.plane, name, properties)
            self.plane.jobs.status(name, end, error=", ".join(bad_ones) or None)
        except Exception as e:  # noqa: BLE001 - whatever it is, the job must end and say so
            self.plane.jobs.status(name, "Failed", error=str(e))

    def pipeline(self, name: str, properties: Properties) -> dict[str, str]:
        """Run the nodes, each when what it waits for has ended well; how they ended."""
        nodes, waits = properties["jobs"], self.order(properties["jobs"])
        ends: dict[str, str] = {}
        made: dict[str, str] = {}
        threads: dict[str, threading.Thread] = {}

        def run(node: str) -> None:
            child = f"{name}-{node}"
            self.plane.jobs.create(child, self.child(properties, node, nodes[node], made, name), parent=name)
            made[node] = child
            ends[node] = self.plane.executor.run(child)

        while len(ends) < len(nodes) and not self.stopped[name].is_set() and not self.plane.store.closed.is_set():
            for node in nodes:
                if node not in threads and any(ends.get(o, "Completed") != "Completed" for o in waits[node]):
                    threads[node], ends[node] = threading.current_thread(), "NotStarted"
                elif node not in threads and all(ends.get(o) == "Completed" for o in waits[node]):
                    threads[node] = threading.Thread(target=run, args=(node,), daemon=True)
                    threads[node].start()
            self.stopped[name].wait(0.02)
        for thread in set(threads.values()) - {threading.current_thread()}:
            thread.join()
        return ends

    def sweep(self, name: str, properties: Properties) -> dict[str, str]:
        """Run the trials, some at once; the best by the primary metric is kept."""
        bounds, ends = properties.get("limits") or {}, {}
        trials = list(points(properties))
        slots = threading.Semaphore(int(bounds.get("maxConcurrentTrials") or 1))

        def run(child: str, values: Properties) -> None:
            with slots:
                if not self.stopped[name].is_set():
                    self.plane.jobs.create(child, self.trial(properties, values), parent=name)
                    ends[child] = self.plane.executor.run(child)

        threads = [threading.Thread(target=run, args=(f"{name}_{i}", v), daemon=True) for i, v in enumerate(trials)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        goal = properties.get("objective") or {}
        scores = {c: self.plane.tracking.metrics(c).get(goal.get("primaryMetric", "")) for c in ends}
        known = {c: s for c, s in scores.items() if s is not None}
        if known:
            best = (max if str(goal.get("goal")).lower() == "maximize" else min)(known, key=known.__getitem__)
            properties["properties"] |= {"best_child_run_id": best, "score": str(known[best])}
        return ends

    def trial(self, properties: Properties, values: Properties) -> Properties:
        """The command job of one trial."""
        trial = copy.deepcopy(properties["trial"])
        command = re.sub(
            r"\$\{\{\s*search_space\.(\w+)\s*\}\}", lambda m: str(values.get(m[1], m[0])), trial["command"]
        )
        kept = {k: copy.deepcopy(properties.get(k)) or {} for k in ("inputs", "outputs")}
        tags = {f"search_space.{k}": str(v) for k, v in values.items()}
        more = {"jobType": "Command", "command": command, "computeId": properties.get("computeId"), "tags": tags}
        return trial | kept | more | {"experimentName": properties.get("experimentName") or "Default"}

    def cancel(self, name: str) -> None:
        """Start no more children."""
        if name in self.stopped:
            self.stopped[name].set()


def points(properties: Properties) -> list[Properties]:
    """The values of each trial: all combinations for a grid, else drawn."""
    space = properties["searchSpace"]
    most = int((properties.get("limits") or {}).get("maxTotalTrials") or 1000)
    if (properties.get("samplingAlgorithm") or {}).get("samplingAlgorithmType") == "Grid":
        if any(kind != "choice" for kind, _ in space.values()):
            raise bad("a grid takes choices only")
        rows = itertools.product(*(args[0] for _, args in space.values()))
        return [dict(zip(space, row, strict=True)) for row in itertools.islice(rows, most)]
    rng = random.Random((properties.get("samplingAlgorithm") or {}).get("seed") or 0)
    return [{name: draw(rng, kind, args) for name, (kind, args) in space.items()} for _ in range(min(most, 1000))]


def draw(rng: random.Random, kind: str, args: list[Any]) -> Any:
    """One value of a distribution."""
    if kind == "choice":
        return rng.choice(args[0])
    if kind == "randint":
        return rng.randrange(int(args[0]))
    base = kind.removeprefix("q")
    value = rng.gauss(*args[:2]) if base.endswith("normal") else rng.uniform(*args[:2])
    value = math.exp(value) if base.startswith("log") else value
    return round(value / args[2]) * args[2] if kind.startswith("q") else value
