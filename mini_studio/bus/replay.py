"""Refilling a log that lost its topics, from the journal: ids, sequences, keys, headers and order unchanged."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from events.topics import ROUTES, Topic
from mini_studio.bus.delivery import text_headers
from mini_studio.bus.kafka import Publisher, create_topics
from mini_studio.bus.reading import read_whole
from mini_studio.bus.relay import BATCH, outgoing
from mini_studio.records.routes import RouteRecord
from mini_studio.records.store import RecordStore, pages
from mini_studio.settings import Kafka

READ = 2000
"""Entries held in memory at a time. What is published at once is `BATCH`: a batch has to be acknowledged within the publish timeout."""


@dataclass
class Refilled:
    """What a refill did so far."""

    published: int = 0
    held: int = 0
    """What the topics held already."""


async def refill(
    settings: Kafka, store: RecordStore, publisher: Publisher, progress: Callable[[Refilled], None]
) -> Refilled:
    """Create missing topics, and publish what they lack of the journal up to its present end, then of the present routes.

    Raises `Unavailable`. Run again after that, or after a crash, it goes on with what is not there: an event that the
    topics hold, by its id, is not published again. The ids held are kept in memory, about 100 bytes each.
    """
    end = await store.journal_end()
    created = await create_topics(settings)
    held = await _ids(settings, [topic for topic in (*Topic, ROUTES) if topic not in created])
    done = Refilled()
    for source in (_journal(store, end), _routes(store)):
        async for stored in source:
            lacking = [outgoing(entry) for entry in stored if entry["headers"]["ce_id"] not in held]
            for first in range(0, len(lacking), BATCH):
                await publisher.publish(lacking[first : first + BATCH])
            done.published += len(lacking)
            done.held += len(stored) - len(lacking)
            progress(done)
    return done


async def _ids(settings: Kafka, topics: Sequence[str]) -> set[str]:
    """The ids of everything that the topics hold."""
    if not topics:
        return set()
    batches = read_whole(settings, topics)
    return {text_headers(record).get("ce_id", "") async for records in batches for record in records}


async def _journal(store: RecordStore, end: int) -> AsyncIterator[list[dict[str, Any]]]:
    position = 0
    while position < end and (entries := await store.read_journal(after=position, limit=READ)):
        yield [entry.stored for entry in entries if entry.position <= end]
        position = entries[-1].position


async def _routes(store: RecordStore) -> AsyncIterator[list[dict[str, Any]]]:
    async for page in pages(store, RouteRecord.COLLECTION, READ):
        yield [RouteRecord.load(document).stored() for document in page]
