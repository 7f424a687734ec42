"""Schedules: kept and checked; what one would start is started by a trigger, not by the clock."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from typing import TYPE_CHECKING, Any

from .limits import bad, check_name, check_tags
from .store import page
from .web import Reply, Request

if TYPE_CHECKING:
    from .plane import Plane

FREQUENCIES = ("minute", "hour", "day", "week", "month")


class Schedules:
    """The schedules of the workspace."""

    def __init__(self, plane: Plane) -> None:
        self.plane, self.store = plane, plane.store

    def routes(self) -> None:
        """What is answered."""
        self.plane.on("GET", "/schedules", self.list)
        self.plane.on("GET", "/schedules/{name}", self.get)
        self.plane.on("PUT", "/schedules/{name}", self.put)
        self.plane.on("DELETE", "/schedules/{name}", self.delete)
        self.plane.on("POST", "/schedules/{name}/trigger", self.trigger)

    def list(self, request: Request) -> Reply:
        """Those that are on, or all."""
        view = request.query.get("listviewtype", "EnabledOnly")
        found = self.store.under("/schedules")
        return page(
            request, [s for s in found if view == "All" or s["properties"]["isEnabled"] == (view == "EnabledOnly")]
        )

    def get(self, request: Request, name: str) -> Reply:
        """One schedule."""
        return Reply(200, self.store.read(f"/schedules/{name}"))

    def put(self, request: Request, name: str) -> Reply:
        """Create or replace a schedule."""
        check_name("schedule", name)
        properties = request.json.get("properties") or {}
        check_tags(properties.get("tags"))
        self.check_trigger(properties.get("trigger") or {})
        action = properties.get("action") or {}
        if action.get("actionType") != "CreateJob" or not action.get("jobDefinition"):
            raise bad("a schedule here creates a job, and this one has none")
        if not action["jobDefinition"].get("sourceJobId"):
            self.plane.jobs.check(action["jobDefinition"])
        path = f"/schedules/{name}"
        self.store.idle(path)
        known = self.store.find(path) is not None
        base = {"isEnabled": True, "tags": {}, "properties": {}, "provisioningState": "Creating"}
        self.store.put(path, base | {k: v for k, v in properties.items() if v is not None})
        return self.store.begin(request, path, "Updating" if known else "Creating", lambda: None)

    def check_trigger(self, trigger: dict[str, Any]) -> None:
        """A cron expression of five fields, or a frequency and an interval."""
        if trigger.get("triggerType") == "Cron":
            if not re.fullmatch(r"(\S+\s+){4}\S+", trigger.get("expression") or ""):
                raise bad(f"cron expression '{trigger.get('expression')}' does not have five fields", "InvalidTrigger")
        elif trigger.get("triggerType") == "Recurrence":
            interval = trigger.get("interval")
            if (
                str(trigger.get("frequency")).lower() not in FREQUENCIES
                or not isinstance(interval, int)
                or interval < 1
            ):
                raise bad(f"recurrence every {interval} {trigger.get('frequency')} is none", "InvalidTrigger")
        else:
            raise bad(f"trigger type '{trigger.get('triggerType')}' is unknown", "InvalidTrigger")

    def delete(self, request: Request, name: str) -> Reply:
        """Remove a schedule that is off."""
        path = f"/schedules/{name}"
        found = self.store.find(path)
        if found is None:
            return Reply(204)
        if found["properties"]["isEnabled"]:
            raise bad(f"Schedule {name} is enabled. Disable it before you delete it.", "ScheduleEnabled")
        return self.store.begin(request, path, "Deleting", lambda: self.store.delete(path), 202)

    def trigger(self, request: Request, name: str) -> Reply:
        """Start the job of a schedule now."""
        action = self.store.get(f"/schedules/{name}")["properties"]["action"]
        job, made = f"{name}-{uuid.uuid4().hex[:8]}", dict(action["jobDefinition"])
        if source := made.get("sourceJobId"):
            made = self.plane.jobs.sent[source.rsplit("/", 1)[-1]]
        self.plane.jobs.create(job, made | {"tags": {"azureml.schedule": name}})
        (self.plane.executor if made["jobType"] == "Command" else self.plane.composite).start(job)
        return Reply(
            200, {"jobName": job, "scheduleActionType": "CreateJob", "triggerTime": dt.datetime.now(dt.UTC).isoformat()}
        )
