"""Identifiers and enumerations that events and REST models share.

Every identifier has one type and one pattern, so nothing from a request reaches a path, a topic key or an object name unchecked.
"""

import hashlib
import secrets
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import StringConstraints

CLIENT_CODE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"
MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}([/:][A-Za-z0-9][A-Za-z0-9._-]{0,95}){0,4}$"

ClientCode = Annotated[str, StringConstraints(pattern=CLIENT_CODE_PATTERN)]
"""A tenant: 1 to 63 letters, digits, `-` or `_`, starting with a letter or digit."""

Owner = Annotated[str, StringConstraints(pattern=r"^$|" + CLIENT_CODE_PATTERN)]
"""A tenant, or the empty string for what all clients share."""

ModelName = Annotated[str, StringConstraints(pattern=MODEL_NAME_PATTERN, max_length=200)]
"""A catalogue name, a hub id (`org/name`) or a fine-tuned model's name (`ft:<base>:<client>:<suffix>`)."""

DatasetId = Annotated[str, StringConstraints(pattern=r"^ds_[0-9a-f]{24}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^job_[0-9a-f]{24}$")]
DeploymentId = Annotated[str, StringConstraints(pattern=r"^dep_[0-9a-f]{24}$")]
DeploymentName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""A DNS label: it names Kubernetes objects."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Suffix = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]

Method = Literal["lora", "full"]


class JobStatus(StrEnum):
    """Where a fine-tuning job stands; `succeeded`, `failed` and `cancelled` are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class DeploymentKind(StrEnum):
    BASE = "base"
    FINE_TUNED = "fine_tuned"


class DeploymentStatus(StrEnum):
    """`deploying` until the driver has the objects, `deployed` once applied, `ready` when it answers."""

    DEPLOYING = "deploying"
    DEPLOYED = "deployed"
    READY = "ready"
    FAILED = "failed"
    REMOVING = "removing"
    REMOVED = "removed"


class DatasetFormat(StrEnum):
    PROMPT_COMPLETION = "prompt_completion"
    CHAT = "chat"


def new_id(prefix: str) -> str:
    """A random identifier: `<prefix>_` and 24 hex digits."""
    return f"{prefix}_{secrets.token_hex(12)}"


def derived_id(prefix: str, *parts: str) -> str:
    """The identifier that the same parts always give (Idempotency-Key, a deployment's identity)."""
    joined = "\x00".join(parts).encode()
    return f"{prefix}_{hashlib.sha256(joined).hexdigest()[:24]}"
