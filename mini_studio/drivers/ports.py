"""The ports: what the studio needs of the systems outside it. One contract suite per port runs on every adapter (tests/contracts)."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from events.types import DeploymentKind


class BlobWriter(Protocol):
    """A blob being written. Nothing is visible under its key until the context ends without an error."""

    async def write(self, chunk: bytes) -> None: ...


class BlobStore(Protocol):
    """Bytes under keys such as `datasets/<client>/<id>.jsonl`. Raises `Unavailable` when the store is away."""

    def writer(self, key: str) -> AbstractAsyncContextManager[BlobWriter]:
        """Stream one blob in. On an error inside the context nothing is left behind."""
        ...

    def read(self, key: str) -> AsyncIterator[bytes]:
        """The blob's bytes in chunks of up to 1 MiB. Raises `NotFound`."""
        ...

    async def delete(self, key: str) -> None:
        """Delete a blob; one that is not there is fine."""
        ...

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        """Key, size in bytes and modification time (Unix seconds) of every blob below `prefix`."""
        ...

    async def sweep(self, prefix: str, older_than_s: float) -> int:
        """Delete what writers that were killed left of blobs below `prefix`, if it is as old; how many."""
        ...

    def location(self, key: str) -> str:
        """How users name the blob: an absolute path, or `s3://bucket/key`."""
        ...


class RunState(StrEnum):
    """What the cluster says of a submission. `LOST`: it does not know it (any more)."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"


@dataclass(frozen=True)
class RunReport:
    state: RunState
    message: str = ""


@dataclass(frozen=True)
class Workers:
    """What one training needs: so many workers at once, each with so much of a single node."""

    count: int = 1
    cpus: float = 1.0
    gpus: float = 0.0


class TrainingCluster(Protocol):
    """Runs training programs. Every call ends within the cluster's timeout setting; `Unavailable` when it is away, and `Denied`
    when it does not take the studio's token."""

    async def has_room(self, workers: Workers, *, running: int) -> bool:
        """Whether one more training can start now, beside `running` ones that the cluster may not count yet.

        Raises `Refused` when it never can on the cluster as it is.
        """
        ...

    async def submit(self, submission_id: str, spec_file: Path, *, workers: Workers, metadata: dict[str, str]) -> None:
        """Start `python -m workloads.train <spec_file>`. A submission id that exists already is success. Raises `Refused`."""
        ...

    async def report(self, submission_id: str) -> RunReport: ...

    async def stop(self, submission_id: str) -> None:
        """Ask it to stop; one that is unknown or over is fine."""
        ...

    async def logs(self, submission_id: str, lines: int) -> list[str]:
        """The last lines of its output; empty when they cannot be had."""
        ...

    async def status(self) -> dict[str, Any]:
        """`{"available": bool, "reason": str | None, "resources": {...total and used...}, "nodes": int}`; never raises."""
        ...


@dataclass(frozen=True)
class ReleaseSpec:
    """The desired state of one deployment's objects. `name` and `deployment_id` are compared before anything is touched."""

    name: str
    deployment_id: str
    generation: int
    kind: DeploymentKind
    client_code: str
    model: str
    """The name it is served under."""
    base_model: str
    weights_path: Path | None
    """Folder of fine-tuned weights; None serves the base model."""
    gpu_count: int
    min_replicas: int
    max_replicas: int
    prometheus_threshold: float


class ReleaseState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class ReleaseReport:
    name: str
    deployment_id: str
    generation: int
    state: ReleaseState
    replicas: int = 0
    """Replicas that answer. None of a ready one: it sleeps, and requests that wait for it wake it."""
    endpoints: list[str] = field(default_factory=list)
    """Base URLs where they answer: of each, e.g. `http://127.0.0.1:41234`, or one that stands before all of them, also while it sleeps."""
    message: str = ""


class ServingDriver(Protocol):
    """Keeps model servers running. Level-based: `apply` may be called again and again with the same or a newer spec."""

    async def apply(self, spec: ReleaseSpec) -> None:
        """Create, change or repair what `spec` asks for. Raises `Refused` (for good) or `Unavailable`; `Conflict` when
        the name belongs to another deployment or to a newer generation."""
        ...

    async def observe(self, name: str) -> ReleaseReport | None: ...

    async def remove(self, name: str, deployment_id: str, generation: int) -> None:
        """Remove the objects of this deployment up to this generation; absent is fine, another's are left alone.

        Raises `Unavailable` while some of them are still ending: call it again.
        """
        ...

    async def wake(self, name: str, deployment_id: str) -> None:
        """A request waits for the release: start it at the next `apply`, if it sleeps. Whatever else it is, nothing happens."""
        ...

    def list(self) -> AsyncIterator[ReleaseReport]: ...
