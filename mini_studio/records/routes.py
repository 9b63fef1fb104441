"""Routes: what the gateways need to answer a request, one per deployment. Published whole to the compacted topic."""

from datetime import UTC, datetime
from typing import Any, ClassVar, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field

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
    predict_path: str = "/predict"
    requested_at: str
    revision: int
    message: str | None = None

    @property
    def key(self) -> str:
        return self.deployment_id


class RouteRecord(Record):
    """The route of one deployment, derived from its deployment record; the outbox publishes every change of it."""

    COLLECTION: ClassVar = Collection("routes")

    route: Route | None = None
    revision: int = 0
    followed: int = Field(0, description="How many of the deployment's events the route has followed.")

    @classmethod
    def of(cls, deployment: Deployment) -> Self:
        return cls(
            id=deployment.id,
            client_code=deployment.client_code,
            created_at=deployment.created_at,
            cause=deployment.cause,
        ).following(deployment)  # fmt: skip

    def following(self, deployment: Deployment) -> Self:
        """The route as the deployment now has it; unchanged (same revision) when nothing a gateway needs has changed.

        A consumer that read the deployment before another one went on must not bring back an older route.
        """
        followed = sum(deployment.applied.values())
        if followed < self.followed:
            return self
        route = None
        if deployment.status not in (DeploymentStatus.REMOVING, DeploymentStatus.REMOVED):
            fields = deployment.model_dump(include=set(Route.model_fields) - {"revision"})
            route = Route(deployment_id=deployment.id, revision=self.revision, **fields)
        if self.revision and route == self.route:
            return self if followed == self.followed else self.model_copy(update={"followed": followed})
        # a route that was dropped and is built anew from the log must not start below what gateways have seen
        revision = max(self.revision + 1, followed)
        route = route and route.model_copy(update={"revision": revision})
        news = {"route": route, "revision": revision, "followed": followed, "cause": deployment.cause}
        changed = self.model_copy(update=news)
        return changed.model_copy(update={"outbox": (*self.outbox, changed.stored())})

    def stored(self) -> dict[str, Any]:
        """What goes to the compacted topic: the whole route, or a tombstone."""
        value = None if self.route is None else orjson.dumps(self.route.model_dump(mode="json")).decode()
        headers = {
            "ce_id": f"{self.id}/{self.revision}",
            "ce_time": timestamp(datetime.now(UTC)),  # the standalone relay leaves what is fresh to this process's own
            "content-type": "application/json",
        }
        return {"topic": ROUTES, "key": self.id, "headers": headers, "value": value}
