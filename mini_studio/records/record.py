"""What all records share: a version, an outbox, and repositories that change them by compare-and-set.

Two kinds of record:
- a *decider* (training run, release, dataset profile) holds the state that one source decides from, and numbers its events;
- a *projection* (dataset, job, deployment) is `fold(events)`: dropped and replayed, it comes back identical.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from events.base import Cause, Envelope, Event
from events.registry import subject_of
from mini_studio.errors import Conflict, Unavailable
from mini_studio.records.store import Collection, Document, RecordStore

ANYONE: Literal["*"] = "*"
"""The tenant of callers that are not bound to one: consumers, and requests that name a record by its unguessable id."""

CAS_TRIES = 50
PAGE = 500
LAST = "~"
"""Behind every id."""


class Record(BaseModel):
    """A document of the record store."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    COLLECTION: ClassVar[Collection]

    id: str
    client_code: str
    created_at: str = Field(description="RFC 3339 in UTC with microseconds: sorts as text.")
    version: int = 1
    outbox: tuple[dict[str, Any], ...] = ()
    cause: Cause = Field(description="What the record's own next events follow from.")

    def document(self) -> dict[str, Any]:
        content = self.model_dump(mode="json", exclude={"id"})
        return {"_id": self.id, **content}

    @classmethod
    def load(cls, document: dict[str, Any]) -> Self:
        return cls.model_validate({**document, "id": document["_id"]})

    def check_owner(self, envelope: Envelope[Any]) -> None:
        """An event of another client may never change the record. Raises `Conflict`."""
        if envelope.client_code != self.client_code:
            raise Conflict(
                f"{self.id} is of client {self.client_code!r}, event {envelope.id!r} of {envelope.client_code!r}"
            )


class Decider(Record):
    """A record that one source decides from; it numbers that source's events of the aggregate."""

    sequence: int = Field(0, description="Sequence of the last event decided.")

    def deciding(self, event: Event, **changes: Any) -> Self:
        """This record with `changes` and the event that says so, ready for one write."""
        envelope: Envelope[Any] = Envelope.of(
            event, subject=subject_of(event), sequence=self.sequence + 1, client_code=self.client_code, cause=self.cause
        )
        return self.model_copy(
            update={**changes, "sequence": envelope.sequence, "outbox": (*self.outbox, envelope.stored())}
        )


R = TypeVar("R", bound=Record)
Change = Callable[[R], R | None]


class Repository(Generic[R]):
    """Reads and changes the records of one collection. `wake` is called after a write that left events in the outbox."""

    def __init__(self, store: RecordStore, record: type[R], wake: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._record = record
        self._wake = wake

    @property
    def collection(self) -> Collection:
        return self._record.COLLECTION

    async def get(self, tenant: str, id: str) -> R | None:
        """The record, or None when it is not there or another tenant's."""
        document = await self._document(tenant, id)
        return None if document is None else self._record.load(document)

    async def get_all(self, tenant: str, ids: Sequence[str]) -> dict[str, R]:
        """Those of the tenant's records that there are, by id, in one read."""
        found = await self._store.get_all(self.collection, ids)
        return {id: self._record.load(d) for id, d in found.items() if tenant in (ANYONE, d["client_code"])}

    async def put_all(self, changed: Sequence[R], before: Mapping[str, R]) -> list[str]:
        """Write many at once, each over the one in `before` that it was made from, or as a new one.

        Gives the ids of those that were not written, because somebody else had changed or made them meanwhile.
        """
        if not changed:
            return []
        writes: list[tuple[Document, int | None]] = []
        for record in changed:
            version = before[record.id].version if record.id in before else None
            writes.append(({**record.document(), "version": (version or 0) + 1}, version))
        written = await self._store.put_all(self.collection, writes)
        if any(record.outbox for record in changed):
            self._wake()
        return [record.id for record, done in zip(changed, written, strict=True) if not done]

    async def insert(self, record: R) -> None:
        """Write a new record and its events at once. Raises `DuplicateRecord`."""
        await self._store.insert(self.collection, record.document())
        if record.outbox:
            self._wake()

    async def change(self, tenant: str, id: str, change: Change[R]) -> R | None:
        """Apply the pure `change` by compare-and-set, again on a conflict. None: no such record of the tenant's, or nothing to change."""
        for _ in range(CAS_TRIES):
            document = await self._document(tenant, id)
            if document is None:
                return None
            changed = change(self._record.load(document))
            if changed is None:
                return None
            version = document["version"]
            changed = changed.model_copy(update={"version": version + 1})
            if await self._store.replace(self.collection, changed.document(), version):
                if changed.outbox:
                    self._wake()
                return changed
        raise Unavailable(f"{self.collection.name}/{id} is being changed by too many at once")

    async def page(
        self, tenant: str, *, limit: int, after: str | None = None, until: str | None = None, **where: Any
    ) -> list[R]:
        """A tenant's records, newest first, from behind the record `after` on; `until` leaves out what is newer than that."""
        position = None if until is None else (until, LAST)
        if after is not None:
            last = await self.get(tenant, after)
            behind = (last.created_at, last.id) if last else ("", "")
            position = behind if position is None else min(position, behind)
        found = await self._store.find(self.collection, owned(tenant, where), limit=limit, after=position)
        return [self._record.load(document) for document in found]

    async def where(self, tenant: str, *, limit: int = 1000, **where: Any) -> list[R]:
        """A tenant's records (reconcilers ask for `ANYONE`'s) whose fields equal `where`, oldest first."""
        found = await self._store.find(self.collection, owned(tenant, where), limit=limit, newest_first=False)
        return [self._record.load(document) for document in found]

    async def each(self, tenant: str, **where: Any) -> AsyncIterator[R]:
        """All of them, however many, oldest first."""
        after = None
        while True:
            found = await self._store.find(
                self.collection, owned(tenant, where), limit=PAGE, after=after, newest_first=False
            )
            for document in found:
                yield self._record.load(document)
            if len(found) < PAGE:
                return
            after = (found[-1]["created_at"], found[-1]["_id"])

    async def _document(self, tenant: str, id: str) -> Document | None:
        document = await self._store.get(self.collection, id)
        return document if document is not None and tenant in (ANYONE, document["client_code"]) else None


def owned(tenant: str, where: dict[str, Any]) -> dict[str, Any]:
    """`where`, for the records of one tenant only."""
    return where if tenant == ANYONE else {"client_code": tenant, **where}
