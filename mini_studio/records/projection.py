"""Records that are nothing but their events, folded: `fold(events)` gives the same document live and on replay."""

from collections.abc import Callable, Iterable, Iterator
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


def fold(projection: type[P], events: Iterable[Envelope[Any]]) -> P | None:
    """The record that these events, in order, make."""
    record: P | None = None
    for envelope in events:
        record = projection.begin(envelope) if record is None else record.apply(envelope) or record
    return record


def later(record: Projection, history: Iterable[Envelope[Any]]) -> Iterator[bool]:
    """Which of the events the record has not seen."""
    return (envelope.sequence > record.last(envelope) for envelope in history)


def advance(record: P, history: Iterable[Envelope[Any]]) -> P | None:
    """The record after these events; None when one is missing before them, or nothing is new."""
    present = record
    for envelope in history:
        if envelope.sequence > present.last(envelope) + 1:
            return None
        present = present.apply(envelope) or present
    return None if present is record else present


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

    async def apply_all(self, envelopes: Iterable[Envelope[Any]]) -> None:
        """Apply events in order, with one read, and at most one write, for each record."""
        histories: dict[str, list[Envelope[Any]]] = {}
        for envelope in envelopes:
            histories.setdefault(envelope.subject, []).append(envelope)
        for subject, history in histories.items():
            record = await self.get(ANYONE, subject)
            if record is None or any(later(record, history)):
                await self._apply_history(history)

    async def _apply_history(self, history: list[Envelope[Any]]) -> None:
        first, *rest = history
        await self.apply(first)
        if rest and await self.change(ANYONE, first.subject, lambda present: advance(present, rest)) is None:
            for envelope in rest:
                await self.apply(envelope)

    async def _begin(self, envelope: Envelope[Any]) -> P | None:
        # A later request would begin one as well, and not with what the aggregate's first one says.
        record = self._projection.begin(envelope) if envelope.sequence == 1 else None
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
        for earlier in await self._history(envelope.subject):
            if earlier.id == envelope.id:
                break
            if self._projection.begin(earlier) is not None:
                await self.apply(earlier)
                return await self.apply(envelope)
        raise Conflict(f"no request of {envelope.subject} is known, neither as a record nor in the journal")

    async def _catch_up(self, envelope: Envelope[Any], applied: int) -> None:
        for earlier in await self._history(envelope.subject):
            if earlier.source == envelope.source and applied < earlier.sequence < envelope.sequence:
                await self.change(ANYONE, envelope.subject, lambda present, missed=earlier: present.apply(missed))  # type: ignore[misc]

    async def _history(self, subject: str) -> list[Envelope[Any]]:
        entries = await self._store.read_journal(key=subject, limit=100_000)
        return [restore(entry.stored) for entry in entries]
