"""A projection built anew beside the live one: folded into a shadow collection, compared with the live one, and swapped in.

The swap is record by record, each a compare-and-set: a crash in the middle leaves valid records, and readers and consumers
go on meanwhile. No event is decided, and nothing is deleted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from events.base import Envelope
from mini_studio.errors import Conflict, Unavailable
from mini_studio.records.projection import Projection, Projections, fold
from mini_studio.records.record import CAS_TRIES, Record
from mini_studio.records.store import Collection, Document, DuplicateRecord, RecordStore, pages

log = structlog.get_logger(__name__)

P = TypeVar("P", bound=Projection)

PAGE = 500
"""Documents held in memory at a time."""
BOOKKEEPING = ("outbox", "version")
"""What a record holds beside what its events say."""


def shadow_of(collection: Collection) -> Collection:
    return Collection(f"{collection.name}_shadow")


@dataclass
class Outcome:
    """How the live records compare with what their events make."""

    same: int = 0
    different: int = 0
    """Live records that are not what their events make; repaired by a swap."""
    missing: int = 0
    """Events whose record is not there; inserted by a swap."""
    unexplained: int = 0
    """Live records without any event; reported, never deleted."""
    in_the_way: int = 0
    """Records that cannot be inserted because another one holds their name."""


@dataclass(frozen=True)
class View(Generic[P]):
    """A live collection, and how its records follow from a projection's: `jobs` from jobs, `routes` from deployments."""

    collection: Collection
    of: Callable[[P], Record]


class Shadow(Generic[P]):
    """The records of one projection, built anew. One replay at a time uses it."""

    def __init__(self, store: RecordStore, projection: type[P]) -> None:
        self._store = store
        self._projection = projection
        self._projections = Projections(store, projection)
        self.collection = shadow_of(projection.COLLECTION)

    async def clear(self) -> None:
        await self._store.clear(self.collection)

    async def fold(self, envelopes: Iterable[Envelope[Any]]) -> None:
        """Fold a batch of events into their records, with one read and one write for all. Raises `Conflict`."""
        told: dict[str, list[Envelope[Any]]] = {}
        for envelope in envelopes:
            told.setdefault(envelope.subject, []).append(envelope)
        present = await self._store.get_all(self.collection, list(told))
        changes: list[tuple[Document, int | None]] = []
        for id, events in told.items():
            before = self._projection.load(present[id]) if id in present else None
            after = await self._folded(id, events, before)
            if after is not None and after is not before:
                version = before.version if before else None
                changes.append((after.model_copy(update={"version": (version or 0) + 1}).document(), version))
        if not all(await self._store.put_all(self.collection, changes)):
            raise Conflict(f"another replay is writing {self.collection.name}: let it end, then run this one again")

    async def compare(self, view: View[P], *, swap: bool) -> Outcome:
        """Compare the live records with the shadow's, page by page; with `swap`, make them what their events make."""
        outcome = Outcome()
        async for page in pages(self._store, self.collection, PAGE):
            made = [view.of(self._projection.load(document)).document() for document in page]
            live = await self._store.get_all(view.collection, [document["_id"] for document in made])
            alike = {document["_id"] for document in made if content(document) == content(live.get(document["_id"]))}
            absent = [{**document, "version": 1} for document in made if document["_id"] not in live]
            missing = await self._insert(view, absent) if swap else {document["_id"] for document in absent}
            outcome.same += len(alike)
            outcome.missing += len(missing)
            for document in made:
                if document["_id"] not in alike | missing:
                    await self._settle(document["_id"], view, swap, outcome)
        async for page in pages(self._store, view.collection, PAGE):
            known = await self._store.get_all(self.collection, [document["_id"] for document in page])
            for document in page:
                if document["_id"] not in known:
                    await self._settle(document["_id"], view, swap, outcome)
        return outcome

    async def _folded(self, id: str, events: list[Envelope[Any]], record: P | None) -> P | None:
        """The record after these events; what is missing before one of them is taken from the journal."""
        for number, envelope in enumerate(events):
            last = 0 if record is None else record.last(envelope)
            begins = record is not None or self._projection.begin(envelope) is not None
            if not begins or envelope.sequence > last + 1:
                log.warning("replay.gap", subject=id, source=envelope.source.value, last=last, got=envelope.sequence)
                return fold(self._projection, [*await self._projections.history(id), *events[number:]], record)
            record = fold(self._projection, [envelope], record)
        return record

    async def _settle(self, id: str, view: View[P], swap: bool, outcome: Outcome) -> None:
        """Look at one record again, with all that is known of it by now: it may have gone on since the events were read."""
        for _ in range(CAS_TRIES):
            live = await self._store.get(view.collection, id)
            made = await self._made(id, view)
            if made is None:
                if live is not None:
                    log.warning("replay.unexplained", collection=view.collection.name, id=id)
                    outcome.unexplained += 1
            elif content(made) == content(live):
                outcome.same += 1
            else:
                try:
                    if swap and not await self._swap_in(view, made, live):
                        continue
                except DuplicateRecord as taken:
                    log.error("replay.in_the_way", id=id, field=taken.field, value=made.get(taken.field))
                    outcome.in_the_way += 1
                else:
                    outcome.missing += live is None
                    outcome.different += live is not None
            return
        raise Unavailable(f"{view.collection.name}/{id} is being changed by too many at once")

    async def _swap_in(self, view: View[P], made: Document, live: Document | None) -> bool:
        """Write the record as its events make it; False when it changed meanwhile. Raises `DuplicateRecord`: its name is another's."""
        if live is not None:
            # A route's own outbox publishes it; what a live record has yet to publish stays in its outbox.
            bookkeeping = {"version": live["version"] + 1, "outbox": [*live["outbox"], *made["outbox"]]}
            return await self._store.replace(view.collection, {**made, **bookkeeping}, live["version"])
        try:
            await self._store.insert(view.collection, made)
        except DuplicateRecord as taken:
            if taken.field != "id":
                raise
            return False
        return True

    async def _made(self, id: str, view: View[P]) -> Document | None:
        """What the events known by now make of the record, the shadow's first."""
        found = (await self._store.get_all(self.collection, [id])).get(id)
        record = self._projection.load(found) if found else None
        record = fold(self._projection, await self._projections.history(id), record)
        return None if record is None else {**view.of(record).document(), "version": 1}

    async def _insert(self, view: View[P], documents: list[Document]) -> set[str]:
        """Insert those of the records that nothing stands against. Their ids."""
        written = await self._store.put_all(view.collection, [(document, None) for document in documents])
        return {document["_id"] for document, done in zip(documents, written, strict=True) if done}


def content(document: Document | None) -> Document | None:
    """A record without its bookkeeping, and without what is not so: records of an earlier version lack the fields that this one adds."""
    return document and {
        name: value
        for name, value in document.items()
        if name not in BOOKKEEPING and value is not None and value is not False and value != {}
    }
