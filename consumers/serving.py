"""Consumer `serving`: takes note of what should be served; the watcher beside it makes the driver do so."""

from typing import Any

from consumers.watchers import serving as watcher
from events.base import Envelope
from events.deployments import DeployRequested, UndeployRequested
from mini_studio.bus.consumer import Consumer
from mini_studio.records.record import ANYONE
from mini_studio.records.releases import Release
from mini_studio.records.store import DuplicateRecord
from mini_studio.wiring import Studio

consumer = Consumer("serving")
consumer.service(watcher.watch)


@consumer.on(DeployRequested)
async def want(envelope: Envelope[DeployRequested], studio: Studio) -> None:
    """Desire the deployment as requested."""
    if await studio.releases.get(ANYONE, envelope.subject) is None:
        try:
            await studio.releases.insert(Release.claim(envelope))
        except DuplicateRecord:
            pass
        else:
            studio.releases_changed.set()
            return
    await follow(envelope, studio)


@consumer.on(UndeployRequested)
async def follow(envelope: Envelope[Any], studio: Studio) -> None:
    """Follow a newer generation of a known deployment."""
    tenant, id = envelope.client_code, envelope.subject
    if await studio.releases.change(tenant, id, lambda release: release.want(envelope)) is not None:
        studio.releases_changed.set()
