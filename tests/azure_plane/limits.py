"""What Azure refuses: names, counts and sizes, from its published limits."""

from __future__ import annotations

import re
from typing import Any

from .web import ArmError

# https://learn.microsoft.com/azure/machine-learning/how-to-manage-quotas and the REST reference
NAMES = {
    "job": r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,254}",
    "asset": r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,254}",
    "version": r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,254}",
    "compute": r"[a-zA-Z](?=.{2,31}$)[a-zA-Z0-9-]*[a-zA-Z0-9]",  # 3 to 32 for AmlCompute
    "endpoint": r"[a-zA-Z](?=.{2,31}$)[a-zA-Z0-9-]*[a-zA-Z0-9]",  # 3 to 32
    "deployment": r"[a-zA-Z](?=.{2,31}$)[a-zA-Z0-9-]*[a-zA-Z0-9]",
    "schedule": r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,254}",
}
# GPUs and vCPUs of the VM sizes that the region has.
SIZES = {
    "standard_ds2_v2": (0, 2),
    "standard_ds3_v2": (0, 4),
    "standard_d4s_v3": (0, 4),
    "standard_e4s_v3": (0, 4),
    "standard_f4s_v2": (0, 4),
    "standard_ds4_v2": (0, 8),
    "standard_f8s_v2": (0, 8),
    "standard_d8s_v3": (0, 8),
    "standard_nc4as_t4_v3": (1, 4),
    "standard_nc24ads_a100_v4": (1, 24),
    "standard_nc48ads_a100_v4": (2, 48),
    "standard_nc96ads_a100_v4": (4, 96),
    "standard_nd96asr_v4": (8, 96),
    "standard_nd96amsr_a100_v4": (8, 96),
    "standard_nc40ads_h100_v5": (1, 40),
    "standard_nc80adis_h100_v5": (2, 80),
    "standard_nd96isr_h100_v5": (8, 96),
}
TAGS, TAG_NAME, TAG_VALUE = 50, 512, 256  # of a resource
QUOTA = 2400  # vCPUs of all clusters, at their largest
ENDPOINTS, DEPLOYMENTS, INSTANCES = 100, 20, 50  # in a workspace, of an endpoint, of a deployment
RESERVE = 1.2  # share of a deployment's instances that must be free for upgrades
PAYLOAD, TIMEOUT_S = 10 << 20, 180  # of a request to an endpoint
MIRROR = 50  # percent
NODES = 100  # of a job
COMMAND = 64 << 10  # characters


def bad(message: str, code: str = "ValidationError") -> ArmError:
    """A refusal of what was asked for."""
    return ArmError(400, code, message)


def check_name(kind: str, name: str) -> str:
    """The name, if Azure takes it."""
    if not re.fullmatch(NAMES[kind], name):
        raise bad(f"The {kind} name '{name}' is invalid. It must match {NAMES[kind]}.", "InvalidName")
    return name


def check_tags(tags: dict[str, Any] | None) -> None:
    """Not too many tags, none too long, and all of them text."""
    if len(tags or {}) > TAGS:
        raise bad(f"{len(tags or {})} tags; a resource has at most {TAGS}", "TooManyTags")
    for name, value in (tags or {}).items():
        if not isinstance(value, str) or len(name) > TAG_NAME or len(value) > TAG_VALUE:
            raise bad(
                f"tag '{name[:40]}': name up to {TAG_NAME}, value text of up to {TAG_VALUE} characters", "InvalidTag"
            )


def check_size(size: str | None) -> tuple[int, int]:
    """GPUs and vCPUs of a VM size that the region has."""
    if (size or "").lower() not in SIZES:
        text = f"The specified VM size '{size}' is not supported in location westeurope."
        raise bad(text, "InvalidVmSize")
    return SIZES[str(size).lower()]


def seconds(duration: str | None) -> float | None:
    """The seconds of an ISO 8601 duration."""
    if not duration:
        return None
    found = re.fullmatch(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:([\d.]+)S)?)?", duration)
    if not found or duration in ("P", "PT"):
        raise bad(f"'{duration}' is no ISO 8601 duration")
    days, hours, minutes, rest = (float(part or 0) for part in found.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if total <= 0:
        raise bad(f"'{duration}' must be more than nothing")
    return total


def check_shm(size: str | None) -> None:
    """A docker size such as 16g."""
    if size and not re.fullmatch(r"\d+[bkmgBKMG]?", size):
        raise bad(f"shmSize '{size}' must be a number and b, k, m or g")
