"""What consumer `serving` decides: desired and observed state of one deployment's objects. Pure transitions."""

from typing import Any, ClassVar, Self

from pydantic import Field

from events.base import Envelope
from events.deployments import (
    DeploymentApplied,
    DeploymentFailed,
    DeploymentReady,
    DeploymentRemoved,
    DeployRequested,
    UndeployRequested,
)
from events.types import DeploymentStatus
from mini_studio.records.projection import timestamp
from mini_studio.records.record import Decider
from mini_studio.records.store import Collection

_SILENT: dict[str, Any] = {"endpoints": [], "replicas": 0}


class Release(Decider):
    """One deployment as the driver should have it, and as it was last reported."""

    COLLECTION: ClassVar = Collection("releases", listed_by=("settled",))

    request: DeployRequested
    wanted: bool = True
    generation: int
    status: DeploymentStatus = DeploymentStatus.DEPLOYING
    endpoints: list[str] = Field(default_factory=list)
    replicas: int = 0
    message: str | None = None
    applied_at: float = 0.0
    settled: bool = Field(False, description="Removed or refused for good: the reconciler leaves it alone.")

    @classmethod
    def claim(cls, envelope: Envelope[DeployRequested]) -> Self:
        return cls(
            id=envelope.subject,
            client_code=envelope.client_code,
            created_at=timestamp(envelope.time),
            cause=envelope.follows(),
            request=envelope.data,
            generation=envelope.data.generation,
        )

    def want(self, envelope: Envelope[Any]) -> Self | None:
        """Follow a newer request; older generations and repeats change nothing. Raises `Conflict` for another client's."""
        self.check_owner(envelope)
        event = envelope.data
        if event.generation <= self.generation:
            return None
        desired: dict[str, Any] = {"generation": event.generation, "settled": False, "cause": envelope.follows()}
        if isinstance(event, UndeployRequested):
            return self.model_copy(update={**desired, "wanted": False, "status": DeploymentStatus.REMOVING})
        reset: dict[str, Any] = {"status": DeploymentStatus.DEPLOYING, **_SILENT, "message": None}
        return self.model_copy(update={**desired, **reset, "wanted": True, "request": event})

    @property
    def may_sleep(self) -> bool:
        """Whether having no replica is a state that it was asked for."""
        return self.request.scale.min_replicas == 0

    @property
    def asleep(self) -> bool:
        """Whether it has no replica because nobody asks for it, or none that answers yet since somebody did."""
        return self.status is DeploymentStatus.READY and self.replicas == 0

    def _current(self, generation: int) -> bool:
        return generation == self.generation and not self.settled

    def applied(self, generation: int, at: float, message: str | None) -> Self | None:
        if not self._current(generation) or self.status is not DeploymentStatus.DEPLOYING:
            return None
        event = DeploymentApplied(deployment_id=self.id, generation=generation, name=self.request.name, message=message)
        return self.deciding(event, status=DeploymentStatus.DEPLOYED, applied_at=at, message=message)

    def ready(self, generation: int, endpoints: list[str], replicas: int, message: str | None) -> Self | None:
        """It answers; announced again when endpoints or replicas change."""
        known = (self.status, self.endpoints, self.replicas)
        same = known == (DeploymentStatus.READY, endpoints, replicas)
        if not self._current(generation) or same or not self.wanted:
            return None
        event = DeploymentReady(
            deployment_id=self.id,
            generation=generation,
            name=self.request.name,
            endpoints=endpoints,
            replicas=replicas,
            message=message,
        )
        return self.deciding(
            event, status=DeploymentStatus.READY, endpoints=endpoints, replicas=replicas, message=message
        )

    def restarting(self, generation: int, at: float, message: str | None) -> Self | None:
        """It was ready and answers no more; it is being started again."""
        if not self._current(generation) or self.status is not DeploymentStatus.READY:
            return None
        event = DeploymentApplied(deployment_id=self.id, generation=generation, name=self.request.name, message=message)
        return self.deciding(event, status=DeploymentStatus.DEPLOYED, **_SILENT, applied_at=at, message=message)

    def fail(self, generation: int, message: str, *, refused: bool = False) -> Self | None:
        """It cannot be served. A refused one is left alone; a failed one is watched, in case it recovers."""
        if not self._current(generation) or (self.status is DeploymentStatus.FAILED and self.message == message):
            return None
        event = DeploymentFailed(
            deployment_id=self.id, generation=generation, name=self.request.name, message=message, refused=refused
        )
        return self.deciding(event, status=DeploymentStatus.FAILED, **_SILENT, message=message, settled=refused)

    def removed(self, generation: int) -> Self | None:
        if not self._current(generation) or self.wanted:
            return None
        event = DeploymentRemoved(deployment_id=self.id, generation=generation, name=self.request.name)
        return self.deciding(event, status=DeploymentStatus.REMOVED, **_SILENT, settled=True)
