"""Consumer `serving`: takes note of what should be served; the watcher beside it makes the driver do so."""

import contextlib
from typing import Any

from consumers.watchers import serving as watcher
from events.base import Envelope
from events.deployments import DeployRequested, UndeployRequested
from events.registry import restore
from mini_studio.bus.consumer import Consumer
from mini_studio.errors import Conflict
from mini_studio.records.record import ANYONE
from mini_studio.records.releases import Release
from mini_studio.records.store import DuplicateRecord
from mini_studio.wiring import Studio

consumer = Consumer("serving")
consumer.service(watcher.watch)


@consumer.on(DeployRequested, UndeployRequested)
async def want(envelope: Envelope[Any], studio: Studio) -> None:
    """Desire the deployment as this request has it, unless a newer one did."""
    known = await studio.releases.get(ANYONE, envelope.subject) is not None
    if not known:
        await claim(await first_request(envelope, studio), studio)
    wanted = await studio.releases.change(ANYONE, envelope.subject, lambda release: release.want(envelope))
    if wanted is not None or not known:
        studio.releases_changed.set()


async def first_request(envelope: Envelope[Any], studio: Studio) -> Envelope[DeployRequested]:
    """The deployment's first request; the journal has it where a later one came before it. Raises `Conflict`."""
    if envelope.sequence == 1:
        return envelope
    for entry in await studio.store.read_journal(key=envelope.subject, limit=1):
        first: Envelope[Any] = restore(entry.stored)
        if isinstance(first.data, DeployRequested):
            return first
    raise Conflict(f"no request of {envelope.subject} is in the journal")


async def claim(envelope: Envelope[DeployRequested], studio: Studio) -> None:
    with contextlib.suppress(DuplicateRecord):
        await studio.releases.insert(Release.claim(envelope))
