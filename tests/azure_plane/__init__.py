"""A local, strict Azure Machine Learning: the control plane that tests talk to in place of the service.

The real `MLClient` is driven against it, with public arguments only. `Plane(home)` opens https on loopback with a
certificate made at run time, and `cloud.json` in its home says how to connect (`LLMKIT_AZURE_CLOUD` names that file).
It answers the REST routes that the SDK calls for workspaces, assets, computes, jobs, schedules and online endpoints,
takes time for what takes Azure time, refuses what Azure's published limits refuse, and **does** what it is asked: a
command job runs, once per node, in a folder unpacked from the uploaded code; a deployment starts the server process of
its image's Dockerfile; the scoring address of an endpoint splits and mirrors requests. Blobs lie in Azurite where Node
has it, else in a stub. `plane.faults` (or `POST /_plane/faults`) makes it busy, slow, forgetful or absent.

    web        requests, answers, routes, the https server       store      resources, long operations, staleness
    identity   the certificate and tokens                        faults     what goes wrong, on demand
    limits     what Azure refuses                                blob*      storage: Azurite or the stub behind one door
    workspace, assets, compute, jobs, history, schedules, endpoints: the routes, a resource each
    bindings, executor, composite: a job that runs; serving, scoring: a deployment that answers
    tracking   the MLflow run of a job                           wire       the log of every connection made
"""

from .faults import Fault
from .plane import Plane, client

__all__ = ["Fault", "Plane", "client"]
