"""Refilling a log that lost its topics, from the journal: ids, sequences and order unchanged."""

import structlog

from mini_studio.bus.kafka import Publisher
from mini_studio.bus.relay import outgoing
from mini_studio.records.record import ANYONE, Repository
from mini_studio.records.routes import RouteRecord
from mini_studio.records.store import RecordStore

log = structlog.get_logger(__name__)

BATCH = 2000


async def refill(store: RecordStore, publisher: Publisher, routes: Repository[RouteRecord]) -> int:
    """Publish the whole journal and the present routes; how many events went out. Repeating it makes duplicates only."""
    position = total = 0
    while entries := await store.read_journal(after=position, limit=BATCH):
        await publisher.publish([outgoing(entry.stored) for entry in entries])
        position, total = entries[-1].position, total + len(entries)
        log.info("refill.progress", events=total)
    await publisher.publish([outgoing(record.stored()) for record in await routes.where(ANYONE, limit=1_000_000)])
    return total
