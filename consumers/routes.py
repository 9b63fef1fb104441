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
from mini_studio.records.deployments import Deployment
from mini_studio.records.record import ANYONE
from mini_studio.records.routes import RouteRecord
from mini_studio.records.store import DuplicateRecord
from mini_studio.wiring import Studio

consumer = Consumer("routes")


@consumer.projects(
    DeployRequested, UndeployRequested, DeploymentApplied, DeploymentReady, DeploymentFailed, DeploymentRemoved
)
async def project(envelopes: list[Envelope[Any]], studio: Studio) -> None:
    """Apply the events to their deployment records, and publish the routes that they change."""
    await studio.deployments.apply_all(envelopes)
    for id in dict.fromkeys(envelope.subject for envelope in envelopes):
        deployment = await studio.deployments.get(ANYONE, id)
        if deployment is not None:
            await follow(deployment, studio)


async def follow(deployment: Deployment, studio: Studio) -> None:
    """Bring the route in line with the deployment, again even after a crash between the two writes."""
    if await studio.routes.get(ANYONE, deployment.id) is None:
        try:
            await studio.routes.insert(RouteRecord.of(deployment))
        except DuplicateRecord:
            pass
        else:
            return
    await studio.routes.change(deployment.client_code, deployment.id, lambda route: route.following(deployment))
