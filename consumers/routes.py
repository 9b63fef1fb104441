"""Consumer `routes`: deployment records and the gateways' routes follow the log."""

from typing import Any

from events.base import Envelope
from events.deployments import (
    DeploymentApplied,
    DeploymentFailed,
    DeploymentReady,
    DeploymentRemoved,
    DeployRequested,
    UndeployRequested,
)
from mini_studio.bus.consumer import Consumer
from mini_studio.records.record import ANYONE
from mini_studio.records.routes import RouteRecord
from mini_studio.wiring import Studio

consumer = Consumer("routes", routes=True)


@consumer.projects(
    DeployRequested, UndeployRequested, DeploymentApplied, DeploymentReady, DeploymentFailed, DeploymentRemoved
)
async def project(envelopes: list[Envelope[Any]], studio: Studio) -> None:
    """Apply the events to their deployment records, and publish the routes that they change."""
    await studio.deployments.apply_all(envelopes)
    ids = list(dict.fromkeys(envelope.subject for envelope in envelopes))
    deployments = await studio.deployments.get_all(ANYONE, ids)
    before = await studio.routes.get_all(ANYONE, ids)
    after = [before[id].following(d) if id in before else RouteRecord.of(d) for id, d in deployments.items()]
    for id in await studio.routes.put_all([route for route in after if route is not None], before):
        await follow(id, studio)


async def follow(id: str, studio: Studio) -> None:
    """Bring a route that somebody else wrote meanwhile in line with its deployment."""
    deployment = await studio.deployments.get(ANYONE, id)
    if deployment is not None:
        await studio.routes.change(ANYONE, id, lambda route: route.following(deployment))
