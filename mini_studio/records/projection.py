"""Records that are nothing but their events, folded: `fold(events)` gives the same document live and on replay."""

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

from pydantic import Field

from events.base import Cause, Envelope, Event, Source
from events.registry import restore
from mini_studio.errors import Conflict
from mini_studio.records.record import ANYONE, Record, Repository
from mini_studio.records.store import DuplicateRecord, RecordStore


def timestamp(time: datetime) -> str:
    """RFC 3339 in UTC with microseconds, always of the same length, so text order is time order."""
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Projection(Record):
    """A record that changes only because of events."""

    applied: dict[str, int] = Field(default_factory=dict, description="Last sequence applied, per source.")
    updated_at: str

    @classmethod
    def begin(cls, envelope: Envelope[Any]) -> Self | None:
        """The record after its aggregate's first event; None when `envelope` is not such an event."""
        raise NotImplementedError

    def changes(self, event: Event, at: str) -> dict[str, Any]:
        """What `event` changes; fields that stay are left out."""
        raise NotImplementedError

    def last(self, envelope: Envelope[Any]) -> int:
        return self.applied.get(envelope.source.value, 0)

    def asking(self, event: Event, cause: Cause) -> Self:
        """The record after a further request that the API decides, with its event in the outbox, ready for one write."""
        sequence = self.applied.get(event.SOURCE.value, 0) + 1
        envelope: Envelope[Any] = Envelope.of(
            event, subject=self.id, sequence=sequence, client_code=self.client_code, cause=cause
        )
        changed = self.apply(envelope) or self
        return changed.model_copy(update={"outbox": (*self.outbox, envelope.stored())})

    def apply(self, envelope: Envelope[Any]) -> Self | None:
        """The record with the event applied; None when it, or a later one of its source, was applied before.

        Raises `Conflict` for another client's event.
        """
        self.check_owner(envelope)
        if envelope.sequence <= self.last(envelope):
            return None
        at = timestamp(envelope.time)
        applied = {**self.applied, envelope.source.value: envelope.sequence}
        return self.model_copy(
            update={
                **self.changes(envelope.data, at),
                "applied": applied,
                "updated_at": max(self.updated_at, at),
                # A projection's own next events are the API's; other sources' events come in no fixed order with those.
                "cause": envelope.follows() if envelope.source is Source.API else self.cause,
            }
        )


P = TypeVar("P", bound=Projection)


def requested(projection: type[P], event: Event, *, subject: str, client_code: str, cause: Cause) -> P:
    """A new record from the API's own first event, which is in its outbox, ready for one insert."""
    envelope: Envelope[Any] = Envelope.of(event, subject=subject, sequence=1, client_code=client_code, cause=cause)
    record = projection.begin(envelope)
    if record is None:
        raise TypeError(f"{projection.__name__} does not begin with {type(event).__name__}")
    return record.model_copy(update={"outbox": (envelope.stored(),)})


def begun(record: P, envelope: Envelope[Any]) -> P:
    """A projection's bookkeeping after its first event."""
    return record.model_copy(update={"applied": {envelope.source.value: envelope.sequence}})


def beginning(projection: type[P], envelope: Envelope[Any]) -> P | None:
    """The record that begins with this event; None when it begins with an earlier one, or with none of the kind."""
    return projection.begin(envelope) if envelope.sequence == 1 else None


def fold(projection: type[P], events: Iterable[Envelope[Any]], record: P | None = None) -> P | None:
    """The record that these events, in order, make, or make of `record`. What it has applied before changes nothing."""
    for envelope in events:
        record = beginning(projection, envelope) if record is None else record.apply(envelope) or record
    return record


def advance(record: P, history: Iterable[Envelope[Any]]) -> P | None:
    """The record after these events, the same one if nothing is new; None when an event is missing before them."""
    for envelope in history:
        if envelope.sequence > record.last(envelope) + 1:
            return None
        record = record.apply(envelope) or record
    return record


class Projections(Repository[P]):
    """Keeps one collection of projections up to date with the log."""

    def __init__(self, store: RecordStore, record: type[P], wake: Callable[[], None] = lambda: None) -> None:
        super().__init__(store, record, wake)
        self._projection = record

    async def apply(self, envelope: Envelope[Any]) -> P | None:
        """Apply one event; None when it had been applied before. Events that were missed are taken from the journal."""
        record = await self.get(ANYONE, envelope.subject)
        if record is None:
            return await self._begin(envelope)
        if envelope.sequence > record.last(envelope) + 1:
            await self._catch_up(envelope, record.last(envelope))
        return await self.change(ANYONE, envelope.subject, lambda present: present.apply(envelope))

    async def history(self, id: str) -> list[Envelope[Any]]:
        """All that was decided of the aggregate: the journal, and what still waits in the record's own outbox.

        The outbox is read first: what leaves it in between is in the journal by then.
        """
        document = await self._store.get(self.collection, id)
        waiting = document["outbox"] if document else []
        entries = await self._store.read_journal(key=id, limit=100_000)
        known = {entry.event_id for entry in entries}
        told = [*(e.stored for e in entries), *(w for w in waiting if w["headers"]["ce_id"] not in known)]
        # A long history takes a while to decode, and others wait for this loop.
        return await asyncio.to_thread(lambda: [restore(stored) for stored in told])

    async def at(self, tenant: str, id: str, time: datetime | None) -> P | None:
        """The record as its events had it at `time`, or now; None when it was not there, or is another tenant's."""
        if time is None:
            return await self.get(tenant, id)
        events = await self.history(id)
        record = fold(self._projection, (envelope for envelope in events if envelope.time <= time))
        return record if record is not None and tenant in (ANYONE, record.client_code) else None

    async def page_at(self, tenant: str, time: datetime | None, *, limit: int, after: str | None = None) -> list[P]:
        """A tenant's records as they were at `time`, or are, newest first, from behind the record `after` on."""
        found = await self.page(tenant, limit=limit, after=after, until=None if time is None else timestamp(time))
        if time is None:
            return found
        return [record for each in found if (record := await self.at(tenant, each.id, time)) is not None]

    async def apply_all(self, envelopes: Iterable[Envelope[Any]]) -> None:
        """Apply events in order, with one read and one write for all their records.

        Records that somebody else changed meanwhile, and those of which events are missing, are done one event at a time.
        """
        histories: dict[str, list[Envelope[Any]]] = {}
        for envelope in envelopes:
            histories.setdefault(envelope.subject, []).append(envelope)
        before = await self.get_all(ANYONE, list(histories))
        after = {id: self._after(before.get(id), history) for id, history in histories.items()}
        changed = [record for id, record in after.items() if record is not None and record is not before.get(id)]
        lost = await self.put_all(changed, before)
        for id in (*lost, *(id for id, record in after.items() if record is None)):
            for envelope in histories[id]:
                await self.apply(envelope)

    def _after(self, record: P | None, history: list[Envelope[Any]]) -> P | None:
        """The record after these events; None when an event is missing before them."""
        present = record or beginning(self._projection, history[0])
        return None if present is None else advance(present, history)

    async def _begin(self, envelope: Envelope[Any]) -> P | None:
        record = beginning(self._projection, envelope)
        if record is None:
            return await self._replay(envelope)
        try:
            await self.insert(record)
        except DuplicateRecord as taken:
            if taken.field != "id":
                raise
            return await self.apply(envelope)
        return record

    async def _replay(self, envelope: Envelope[Any]) -> P | None:
        """The aggregate's first events are unknown here, though its later one was published: the journal has them."""
        for earlier in await self.history(envelope.subject):
            if earlier.id == envelope.id:
                break
            if beginning(self._projection, earlier) is not None:
                await self.apply(earlier)
                return await self.apply(envelope)
        raise Conflict(f"no request of {envelope.subject} is known, neither as a record nor in the journal")

    async def _catch_up(self, envelope: Envelope[Any], applied: int) -> None:
        for earlier in await self.history(envelope.subject):
            if earlier.source == envelope.source and applied < earlier.sequence < envelope.sequence:
                await self.change(ANYONE, envelope.subject, lambda present, missed=earlier: present.apply(missed))  # type: ignore[misc]
