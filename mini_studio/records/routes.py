"""Routes: what the gateways need to answer a request, one per deployment. Published whole to the compacted topic."""

from datetime import UTC, datetime
from typing import Any, ClassVar, Self

import orjson
from pydantic import BaseModel, ConfigDict

from events.topics import ROUTES
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.records.deployments import Deployment
from mini_studio.records.projection import timestamp
from mini_studio.records.record import Record
from mini_studio.records.store import Collection


class Route(BaseModel):
    """The value of a route on `mini-studio.routes`; its key is the deployment's id."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    deployment_id: str
    name: str
    client_code: str
    kind: DeploymentKind
    model: str
    base_model: str
    status: DeploymentStatus
    endpoints: list[str] = []
    replicas: int = 1
    """Earlier versions' routes do not say: none of theirs slept."""
    predict_path: str = "/predict"
    requested_at: str
    revision: int
    message: str | None = None

    @property
    def key(self) -> str:
        return self.deployment_id

    @property
    def asleep(self) -> bool:
        """Scaled to zero: a request that waits for it wakes it. It may have an address even so, which stands before its replicas."""
        return self.replicas == 0 and (bool(self.endpoints) or self.status is DeploymentStatus.READY)


class RouteRecord(Record):
    """The route of one deployment: a pure function of its deployment record, so one that is built anew is identical."""

    COLLECTION: ClassVar = Collection("routes")

    route: Route | None = None
    revision: int = 0

    @classmethod
    def of(cls, deployment: Deployment) -> Self:
        """The route as the deployment has it, to be published. Every event of the deployment makes a newer revision."""
        revision = sum(deployment.applied.values())
        route = None
        if deployment.status not in (DeploymentStatus.REMOVING, DeploymentStatus.REMOVED):
            fields = deployment.model_dump(include=set(Route.model_fields) - {"revision"})
            route = Route(deployment_id=deployment.id, revision=revision, **fields)
        record = cls(
            id=deployment.id, client_code=deployment.client_code, created_at=deployment.created_at,
            cause=deployment.cause, route=route, revision=revision,
        )  # fmt: skip
        return record.model_copy(update={"outbox": (record.stored(),)})

    def following(self, deployment: Deployment) -> Self | None:
        """The route as the deployment now has it, to be published as well; None unless that is newer."""
        now = self.of(deployment)
        if now.revision <= self.revision:
            return None
        return now.model_copy(update={"version": self.version, "outbox": (*self.outbox, *now.outbox)})

    def stored(self) -> dict[str, Any]:
        """What goes to the compacted topic: the whole route, or a tombstone."""
        value = None if self.route is None else orjson.dumps(self.route.model_dump(mode="json")).decode()
        headers = {
            "ce_id": f"{self.id}/{self.revision}",
            "ce_time": timestamp(datetime.now(UTC)),  # the standalone relay leaves what is fresh to this process's own
            "content-type": "application/json",
        }
        return {"topic": ROUTES, "key": self.id, "headers": headers, "value": value}
