"""What stands between `${{` and `}}`: inputs brought to the node, outputs mounted, values put into the command."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .limits import bad

if TYPE_CHECKING:
    from .plane import Plane

BINDING = re.compile(r"\$\{\{\s*([^}\s]+)\s*\}\}")
OPTIONAL = re.compile(r"\$\[\[(.*?)\]\]", re.S)
FILES = ("uri_file",)


@dataclass
class Bound:
    """A command that can be run, and where its outputs are."""

    command: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Path] = field(default_factory=dict)
    uris: dict[str, str] = field(default_factory=dict)  # where each output goes in storage


def check(properties: dict[str, Any]) -> None:
    """Refuse a command that names an input or an output that the job does not have."""
    inputs, outputs = properties.get("inputs") or {}, properties.get("outputs") or {}
    command = properties.get("command") or ""
    if command.count("$[[") != command.count("]]"):
        raise bad("the command has an unbalanced $[[ ... ]]")
    for name in BINDING.findall(command):
        kind, _, rest = name.partition(".")
        known = {"inputs": inputs, "outputs": outputs, "search_space": None}.get(kind, {})
        if known is not None and rest not in known:
            raise bad(
                f"the command names ${{{{{name}}}}}, and the job has no such {kind.rstrip('s')}", "InvalidBinding"
            )
    for name, given in inputs.items():
        if given and given.get("jobInputType") != "literal" and not given.get("uri"):
            raise bad(f"input '{name}' has no uri")


def destination(job: str, name: str, output: dict[str, Any] | None) -> str:
    """Where an output is stored: where it was told to, or the default place."""
    given = (output or {}).get("uri")
    return str(given) if given else f"azureml://datastores/workspaceblobstore/paths/azureml/{job}/{name}/"


def resolve(plane: Plane, uri: str) -> str:
    """A storage address for whatever names data: a datastore path, an asset's ARM id or short name, a job's output."""
    for kind, field_ in (("data", "dataUri"), ("models", "modelUri")):
        if re.search(rf"/{kind}/[^/]+/versions/", uri) and "datastores" not in uri:
            return str(plane.assets.find(uri, kind)["properties"][field_])
    if found := re.match(r"azureml://jobs/([^/]+)/outputs/([^/]+)", uri):
        job = plane.store.get(f"/jobs/{found[1]}")["properties"]
        return destination(found[1], found[2], (job.get("outputs") or {}).get(found[2]))
    if re.match(r"azureml:[^/:]+(:|@)", uri):
        return str(plane.assets.find(uri, "data")["properties"]["dataUri"])
    return uri


def fetch(plane: Plane, kind: str, uri: str, folder: Path) -> Path:
    """Copy an input to the node; the file itself for a file."""
    container, path = plane.blobs.place(resolve(plane, uri))
    if not plane.blobs.download(container, path, folder):
        raise bad(f"nothing lies at {uri}", "DataNotFound")
    return folder / Path(path).name if kind in FILES else folder


def bind(plane: Plane, job: str, properties: dict[str, Any], folder: Path) -> Bound:
    """Bring the inputs, make the outputs' folders, and put both into the command."""
    bound = Bound()
    for name, given in (properties.get("inputs") or {}).items():
        kind = given.get("jobInputType") if given else None
        if given is None or (kind == "literal" and given.get("value") is None):
            continue
        if kind == "literal":
            bound.inputs[name] = str(given["value"])
        elif given.get("mode") == "Direct":
            bound.inputs[name] = resolve(plane, given["uri"])
        else:
            bound.inputs[name] = str(fetch(plane, str(kind), given["uri"], folder / "inputs" / name))
    for name, output in (properties.get("outputs") or {}).items():
        bound.uris[name] = destination(job, name, output)
        bound.outputs[name] = folder / "outputs" / name
        where = bound.outputs[name]
        (where.parent if (output or {}).get("jobOutputType") in FILES else where).mkdir(parents=True, exist_ok=True)
    values = {f"inputs.{k}": v for k, v in bound.inputs.items()}
    values |= {f"outputs.{k}": str(v) for k, v in bound.outputs.items()}

    def optional(found: re.Match[str]) -> str:
        return found[1] if all(n in values for n in BINDING.findall(found[1])) else ""

    command = OPTIONAL.sub(optional, properties["command"])
    bound.command = BINDING.sub(lambda m: values[m[1]], command)
    return bound


def store(plane: Plane, bound: Bound) -> None:
    """Bring the outputs to storage."""
    for name, path in bound.outputs.items():
        container, prefix = plane.blobs.place(bound.uris[name])
        if path.is_dir():
            plane.blobs.upload(path, container, prefix)
        elif path.is_file():
            client = plane.blobs.client(container)
            client.upload_blob(prefix.strip("/"), path.read_bytes(), overwrite=True, headers=plane.blobs.mine)


def publish(plane: Plane, job: str, properties: dict[str, Any]) -> None:
    """Register the outputs of a job that were given a name: each the next version of a model or of data."""
    for name, output in (properties.get("outputs") or {}).items():
        asset, kind = (output or {}).get("assetName"), str((output or {}).get("jobOutputType"))
        uri = destination(job, name, output)
        if asset and kind.endswith("_model"):
            plane.assets.publish("models", asset, {"modelUri": uri, "modelType": kind})
        elif asset:
            plane.assets.publish("data", asset, {"dataUri": uri, "dataType": kind})
