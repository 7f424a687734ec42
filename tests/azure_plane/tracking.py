"""The MLflow run that Azure Machine Learning opens for a job: its id is the job's name.

The store is MLflow's own, on SQLite in the plane's home. It is opened with the first job that is tracked, and not at
all with `mlflow=False`: the variables are set all the same.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any


class Tracking:
    """The tracking store of the workspace."""

    def __init__(self, home: Path, on: bool) -> None:
        self.on, self.home = on, home
        self.uri = f"sqlite:///{home / 'mlflow.db'}"
        self.lock = threading.Lock()
        self.opened: Any = None

    @property
    def store(self) -> Any:
        """MLflow's store."""
        if self.opened is None:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            self.opened = SqlAlchemyStore(self.uri, (self.home / "mlruns").as_uri())
        return self.opened

    def start(self, run: str, experiment: str, display: str, tags: dict[str, str]) -> None:
        """Open the run of a job; once more for a job that starts again."""
        if not self.on:
            return
        from mlflow.store.tracking.dbmodels.models import SqlRun, SqlTag

        with self.lock:
            found = self.store.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self.store.create_experiment(experiment)
            artifacts = f"{(self.home / 'mlruns').as_uri()}/{number}/{run}/artifacts"
            with self.store.ManagedSessionMaker(read_only=False) as session:
                if session.get(SqlRun, run) is None:
                    facts = {"name": display, "source_type": "JOB", "source_name": "", "entry_point_name": ""}
                    facts |= {"user_id": "somebody", "status": "RUNNING", "start_time": int(time.time() * 1000)}
                    facts |= {"lifecycle_stage": "active", "artifact_uri": artifacts, "source_version": ""}
                    session.add(SqlRun(run_uuid=run, experiment_id=int(number), **facts))
                    session.flush()
                    for key, value in {"mlflow.runName": display, **tags}.items():
                        session.add(SqlTag(run_uuid=run, key=key, value=str(value)))

    def end(self, run: str, status: str) -> None:
        """Close the run of a job, if the job has not done so."""
        if not self.on:
            return
        from mlflow.entities import RunStatus

        state = {"Completed": "FINISHED", "Failed": "FAILED"}.get(status, "KILLED")
        with self.lock:
            if self.store.get_run(run).info.status == "RUNNING":
                self.store.update_run_info(run, RunStatus.from_string(state), int(time.time() * 1000), None)

    def metrics(self, run: str) -> dict[str, float]:
        """The last value of each metric of a job."""
        return dict(self.store.get_run(run).data.metrics) if self.on else {}

    def close(self) -> None:
        """Close the database."""
        if self.opened is not None:
            self.opened.engine.dispose()
