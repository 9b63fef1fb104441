"""Deployments as GET returns them: a projection of `Deploy*` events. The record's id is the deployment's identity, for ever."""

import re
from typing import Any, ClassVar, Self

import structlog
from pydantic import Field

from events.base import Cause, Envelope, Event
from events.deployments import (
    DeploymentApplied,
    DeploymentFailed,
    DeploymentReady,
    DeploymentRemoved,
    DeployRequested,
    ReleaseEvent,
    Scale,
    UndeployRequested,
)
from events.types import DeploymentKind, DeploymentStatus, derived_id
from mini_studio.errors import Conflict
from mini_studio.records.jobs import Job
from mini_studio.records.projection import Projection, Projections, begun, requested, timestamp
from mini_studio.records.record import ANYONE
from mini_studio.records.store import Collection, DuplicateRecord

log = structlog.get_logger(__name__)


def deployment_id(client_code: str, kind: DeploymentKind, model: str, weights_path: str | None) -> str:
    """The identity: deploying the same thing twice is the same deployment."""
    return derived_id("dep", client_code, kind.value, model, weights_path or "")


class Deployment(Projection):
    """One model being served, or that was."""

    COLLECTION: ClassVar = Collection("deployments", unique=("name",), listed_by=("client_code",))

    name: str
    kind: DeploymentKind
    model: str
    base_model: str
    weights_path: str | None = None
    scale: Scale
    generation: int
    removal: int = Field(0, description="Generation of the last removal asked for.")
    reported: int = Field(0, description="Latest generation that serving has reported of.")
    answered: int = Field(0, description="Generation of the report that says where it answers; 0: none does.")
    requested_at: str
    status: DeploymentStatus = DeploymentStatus.DEPLOYING
    refused: bool = False
    message: str | None = None
    replicas: int = 0
    endpoints: list[str] = Field(default_factory=list)
    predict_path: str = "/predict"

    @classmethod
    def begin(cls, envelope: Envelope[Any]) -> Self | None:
        event = envelope.data
        if not isinstance(event, DeployRequested):
            return None
        at = timestamp(envelope.time)
        fields = event.model_dump(exclude={"deployment_id"})
        record = cls(
            id=envelope.subject, client_code=envelope.client_code, created_at=at, updated_at=at, requested_at=at,
            cause=envelope.follows(), **fields,
        )  # fmt: skip
        return begun(record, envelope)

    def changes(self, event: Event, at: str) -> dict[str, Any]:
        """The same for every order of the two sources' events, each source's own being in order.

        What serving reported last answers requests, also while a newer generation is asked for or starting (a rescale
        does not interrupt), but none from before a removal does; and a report says the status of its own generation alone.
        A report may come before the request that it answers: then the request has nothing to say about the status any more.
        """
        match event:
            case DeployRequested():
                desired = event.model_dump(include={"model", "base_model", "generation"})
                reset = {} if self.reported >= event.generation else _unreported(DeploymentStatus.DEPLOYING)
                return {**desired, "scale": event.scale, "requested_at": at, **reset}
            case UndeployRequested():
                removal = {"generation": event.generation, "removal": event.generation}
                silenced = {**_SILENT, "answered": 0} if self.answered < event.generation else {}
                reset = {} if self.reported >= event.generation else _unreported(DeploymentStatus.REMOVING)
                return {**removal, **reset, **silenced}
            case ReleaseEvent():
                reported = {"reported": max(self.reported, event.generation)}
                if event.generation < self.removal:
                    return reported
                begins = isinstance(event, DeploymentApplied) and event.generation > self.reported
                answers = {} if begins else {**_answers(event), "answered": event.generation}
                return {**reported, **answers, **(_status(event) if event.generation >= self.generation else {})}
        return {}


def _unreported(status: DeploymentStatus) -> dict[str, Any]:
    """A generation of which nothing is known yet."""
    return {"status": status, "refused": False, "message": None}


def _answers(event: ReleaseEvent) -> dict[str, Any]:
    """Where the model answers, by this report."""
    if isinstance(event, DeploymentReady):
        return {"replicas": event.replicas, "endpoints": event.endpoints, "predict_path": event.predict_path}
    return _SILENT


def _status(event: ReleaseEvent) -> dict[str, Any]:
    """What has become of the generation that this report is of."""
    match event:
        case DeploymentApplied():
            return {"status": DeploymentStatus.DEPLOYED, "refused": False, "message": event.message}
        case DeploymentReady():
            return {"status": DeploymentStatus.READY, "refused": False, "message": event.message}
        case DeploymentFailed():
            return {"status": DeploymentStatus.FAILED, "refused": event.refused, "message": event.message}
        case DeploymentRemoved():
            return {"status": DeploymentStatus.REMOVED, "refused": False, "message": None}
    return {}


class Deployments(Projections[Deployment]):
    """The deployments, by identity or by name."""

    async def named(self, tenant: str, name: str) -> Deployment | None:
        """The deployment of that name, if it is the tenant's own or shared. No two have one name, whoever's they are."""
        found = await self.where(ANYONE, limit=1, name=name)
        return found[0] if found and found[0].client_code in ("", tenant) else None

    async def request(self, tenant: str, event: DeployRequested, cause: Cause) -> Deployment:
        """Deploy: a first time, or again with a higher generation when something is to change. Same again: no event."""
        names = dict.fromkeys((event.name, suffixed(event.name, event.deployment_id)))
        for name in names:
            try:
                return await self._request(tenant, event.model_copy(update={"name": name}), cause)
            except DuplicateRecord:
                log.info("deployment.name_taken", name=name)
        raise Conflict(f"the names {', '.join(names)} are all taken")

    async def request_once(self, tenant: str, event: DeployRequested, cause: Cause) -> None:
        """Deploy what nobody ever asked for. What was once removed stays so, however often this is said again."""
        if await self._store.read_journal(key=event.deployment_id, limit=1):
            return  # its record may be on its way to be rebuilt
        for name in (event.name, suffixed(event.name, event.deployment_id)):
            first = event.model_copy(update={"name": name})
            try:
                await self.insert(
                    requested(Deployment, first, subject=event.deployment_id, client_code=tenant, cause=cause)
                )
            except DuplicateRecord as taken:
                if taken.field == "id":
                    return
            else:
                return
        raise Conflict(f"the names for {event.deployment_id} are all taken")

    async def _request(self, tenant: str, event: DeployRequested, cause: Cause) -> Deployment:
        if await self.get(ANYONE, event.deployment_id) is None:
            record = requested(Deployment, event, subject=event.deployment_id, client_code=tenant, cause=cause)
            try:
                await self.insert(record)
            except DuplicateRecord as taken:
                if taken.field != "id":
                    raise
            else:
                return record
        changed = await self.change(tenant, event.deployment_id, lambda present: again(present, event, cause))
        present = changed or await self.get(ANYONE, event.deployment_id)
        if present is None:
            raise Conflict(f"deployment {event.deployment_id} is gone")
        return present


def of_job(job: Job, scale: Scale) -> DeployRequested:
    """The request to serve what a succeeded job made: the deployment that `deploy/fine_tuned` makes of the same weights."""
    kind = DeploymentKind.FINE_TUNED
    return DeployRequested(
        deployment_id=deployment_id(job.client_code, kind, job.model, job.fine_tuned_weights_path),
        generation=1,
        name=readable_name(kind, job.client_code, job.model),
        kind=kind,
        model=job.fine_tuned_model,
        base_model=job.model,
        weights_path=job.fine_tuned_weights_path,
        scale=scale,
    )


def again(present: Deployment, event: DeployRequested, cause: Cause) -> Deployment | None:
    """The deployment with a new generation, unless it is already as requested and has not failed."""
    over = present.status in (DeploymentStatus.FAILED, DeploymentStatus.REMOVING, DeploymentStatus.REMOVED)
    same = (present.scale, present.model, present.base_model) == (event.scale, event.model, event.base_model)
    if same and not over:
        return None
    next_one = {"name": present.name, "generation": present.generation + 1}
    return present.asking(event.model_copy(update=next_one), cause)


def removal(present: Deployment, cause: Cause) -> Deployment | None:
    """The deployment asked to be removed; None when it is already on its way out."""
    if present.status in (DeploymentStatus.REMOVING, DeploymentStatus.REMOVED):
        return None
    event = UndeployRequested(deployment_id=present.id, generation=present.generation + 1, name=present.name)
    return present.asking(event, cause)


def readable_name(kind: DeploymentKind, client_code: str, model: str) -> str:
    """`vllm-base-facebook-opt-125m`, `vllm-ft-acme-gpt-neo`: a DNS label of at most 63 characters."""
    words = f"vllm-base-{model}" if kind is DeploymentKind.BASE else f"vllm-ft-{client_code}-{model}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:MAX_NAME].strip("-")


def suffixed(name: str, id: str) -> str:
    """The name for a deployment whose readable name another one holds: with 12 hex digits of its identity."""
    mark = f"-{id.removeprefix('dep_')[:12]}"
    return name if name.endswith(mark) else name[: MAX_NAME - len(mark)].strip("-") + mark


MAX_NAME = 63
_SILENT: dict[str, Any] = {"replicas": 0, "endpoints": [], "predict_path": "/predict"}
