"""The relay: outbox -> journal -> Kafka, in order per document; an entry leaves the outbox only after the broker's ack.

Two relays on one entry make duplicates, never losses; readers drop those by sequence.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from events.topics import ROUTES
from mini_studio.bus.kafka import Outgoing, Publisher
from mini_studio.bus.metrics import EVENTS_OUT, OUTBOX_PENDING
from mini_studio.errors import Unavailable
from mini_studio.records.store import Collection, Document, RecordStore

log = structlog.get_logger(__name__)

BATCH = 500
"""Entries published at once, at most. After a failure it is a quarter, and twice as many after each success: few enough to be
acknowledged within the publish timeout, or none would ever be settled."""
BATCHES = 4
SWEEP = BATCH * BATCHES
"""Entries read and journalled at once, and then published batch by batch: few enough not to hold up other writers."""
RETRY_MIN_S, RETRY_MAX_S = 0.2, 5.0


def outgoing(stored: dict[str, Any]) -> Outgoing:
    """The Kafka record of an outbox or journal entry."""
    value = stored["value"]
    headers = [(name, text.encode()) for name, text in stored["headers"].items()]
    return Outgoing(stored["topic"], stored["key"].encode(), None if value is None else value.encode(), headers)


@dataclass(frozen=True)
class Due:
    """A document and the oldest events of its outbox."""

    collection: Collection
    id: str
    entries: list[dict[str, Any]]


def id_of(stored: dict[str, Any]) -> str:
    return str(stored["headers"]["ce_id"])


def batches(due: Sequence[Due], size: int) -> Iterator[list[Due]]:
    """In their order, as many at once as have `size` entries together; none has more."""
    batch: list[Due] = []
    room = size
    for one in due:
        if len(one.entries) > room:
            yield batch
            batch, room = [], size
        batch.append(one)
        room -= len(one.entries)
    if batch:
        yield batch


def _entries(batch: Sequence[Due]) -> list[dict[str, Any]]:
    return [entry for one in batch for entry in one.entries]


async def _together(*works: Coroutine[Any, Any, None]) -> None:
    """Do all of them to their ends, then raise the first error."""
    for error in await asyncio.gather(*works, return_exceptions=True):
        if error is not None:
            raise error


class Relay:
    """Publishes the outboxes of `collections`.

    A handler's own process runs one that is woken right after each write (`min_age_s` 0, no polling); the standalone
    relay polls, and takes only what is older than `min_age_s`: what a process left behind.
    """

    def __init__(
        self,
        store: RecordStore,
        publisher: Publisher,
        collections: Sequence[Collection],
        *,
        min_age_s: float = 0.0,
        poll_s: float | None = None,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._collections = collections
        self._min_age = timedelta(seconds=min_age_s)
        self._poll_s = poll_s
        self._woken = asyncio.Event()
        self._batch = BATCH
        self.problem: str | None = None
        """Why nothing leaves at the moment; None when all is well."""

    def wake(self) -> None:
        """A write left events in an outbox."""
        self._woken.set()

    async def run(self) -> None:
        """Relay until cancelled. Outages are waited out, and so is what nobody expected."""
        retry_s = RETRY_MIN_S
        self._woken.set()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), self._poll_s)
            self._woken.clear()
            try:
                while await self.sweep():
                    self._well()  # with a long backlog still to go
            except Exception as error:
                # Nobody watches this task: whatever went wrong, it says so and goes on.
                self._note(error)
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)
                self._woken.set()
            else:
                self._well()
                retry_s = RETRY_MIN_S

    def _well(self) -> None:
        if self.problem is not None:
            log.info("relay.recovered")
        self.problem = None

    def _note(self, error: Exception) -> None:
        if isinstance(error, Unavailable):
            if self.problem is None:
                log.warning("relay.waiting", reason=error.message)
            self.problem = error.message
        else:
            log.error("relay.failed", exc_info=error)
            self.problem = f"failed unexpectedly: {error!r}"

    async def sweep(self) -> int:
        """Publish what is pending now, up to `SWEEP` events; how many went out. Raises `Unavailable`."""
        pending = await self._store.pending(self._collections, SWEEP)
        OUTBOX_PENDING.set(len(pending))
        ready = list(batches(list(self._due(pending)), self._batch))
        # While one is published, the next is journalled and the last one settled. No two share a document, so each one's order is kept.
        steps = zip([*ready, [], []], [[], *ready, []], [[], [], *ready], strict=True)
        try:
            for next_, now, last in steps:
                await _together(self._journal(next_), self._publish(now), self._settle(last))
        except Unavailable:
            self._batch = max(1, self._batch // 4)
            raise
        self._batch = min(BATCH, self._batch * 2)
        return sum(len(_entries(batch)) for batch in ready)

    async def _journal(self, batch: list[Due]) -> None:
        if entries := [entry for entry in _entries(batch) if entry["topic"] != ROUTES]:
            await self._store.journal(entries)

    async def _publish(self, batch: list[Due]) -> None:
        if batch:
            await self._publisher.publish([outgoing(entry) for entry in _entries(batch)])

    async def _settle(self, batch: list[Due]) -> None:
        """Take what was published out of the outboxes."""
        if not batch:
            return
        await self._store.settle([(one.collection, one.id, [id_of(entry) for entry in one.entries]) for one in batch])
        entries = _entries(batch)
        for (topic, type_), count in Counter(
            (e["topic"], e["headers"].get("ce_type", "route")) for e in entries
        ).items():
            EVENTS_OUT.labels(topic, type_).inc(count)
        log.debug("relay.published", event_ids=[id_of(entry) for entry in entries])

    def _due(self, pending: list[tuple[Collection, Document]]) -> Iterator[Due]:
        """The oldest entries of each document that is due: at most a batch of one document, at most `BATCHES` batches together."""
        room = self._batch * BATCHES
        for collection, document in pending:
            if room and self._is_due(document):
                oldest = document["outbox"][: min(room, self._batch)]
                room -= len(oldest)
                yield Due(collection, document["_id"], oldest)

    def _is_due(self, document: Document) -> bool:
        time = document["outbox"][0]["headers"].get("ce_time")
        if not self._min_age or time is None:
            return True
        return datetime.now(UTC) - datetime.fromisoformat(time) >= self._min_age
