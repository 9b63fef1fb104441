"""The record store port: documents with compare-and-set, an outbox in every document, and the journal of all events.

A document is a JSON object with `_id`, `version` (1 at insert, +1 at every write) and `outbox` (events decided by the
same write, not yet on the log). Adapters: `sqlite`, `mongo`. The contract suite is tests/contracts/test_record_store.py.
"""

import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Document = dict[str, Any]


class DuplicateRecord(Exception):
    """A document with this `_id`, or with the same value under a unique index, exists; `field` says which."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


@dataclass(frozen=True)
class Collection:
    """A collection and the indexes its queries need."""

    name: str
    unique: tuple[str, ...] = ()
    """Fields with a unique index (documents without the field are not compared)."""
    listed_by: tuple[str, ...] = ()
    """Equality fields of its lists; each gets an index together with (`created_at`, `_id`)."""


@dataclass(frozen=True)
class JournalEntry:
    position: int
    """Ascending in the order of appending; has gaps."""
    event_id: str
    stored: dict[str, Any]
    """As `Envelope.stored` gave it."""


class RecordStore(Protocol):
    """Raises `Unavailable` within the busy timeout when the store is locked or away."""

    async def prepare(self) -> None:
        """Create what is missing of tables and indexes."""
        ...

    async def insert(self, collection: Collection, document: Document) -> None:
        """Write a new document, outbox included. Raises `DuplicateRecord`."""
        ...

    async def get(self, collection: Collection, id: str) -> Document | None: ...

    async def replace(self, collection: Collection, document: Document, version: int) -> bool:
        """Write the whole document if the stored one has `version`; says whether it did. Raises `DuplicateRecord`."""
        ...

    async def get_all(self, collection: Collection, ids: Sequence[str]) -> dict[str, Document]:
        """Those of the documents that there are, by id, in one read."""
        ...

    async def put_all(self, collection: Collection, changes: Sequence[tuple[Document, int | None]]) -> list[bool]:
        """Many writes at once: each document inserted (version None) or replaced if the stored one has the version.

        Says of each whether it was written; it was not where the version, the id or a unique value stood against it.
        """
        ...

    async def find(
        self,
        collection: Collection,
        where: Mapping[str, Any],
        *,
        limit: int,
        after: tuple[str, str] | None = None,
        newest_first: bool = True,
    ) -> list[Document]:
        """Documents whose top-level fields equal `where`, by (`created_at`, `_id`), from behind the `after` pair on."""
        ...

    async def scan(self, collection: Collection, *, after: str = "", limit: int) -> list[Document]:
        """Documents by ascending id, from behind the id `after` on: for going through all of them, however many."""
        ...

    async def pending(self, collections: Sequence[Collection], limit: int) -> list[tuple[Collection, Document]]:
        """Documents with a non-empty outbox."""
        ...

    async def settle(self, settled: Sequence[tuple[Collection, str, Sequence[str]]]) -> None:
        """Take published events out of their documents' outboxes, by collection, document id and event ids."""
        ...

    async def clear(self, collection: Collection) -> None:
        """Delete all documents of a collection."""
        ...

    async def journal(self, stored: Sequence[dict[str, Any]]) -> None:
        """Append events; one that is there already, by event id, is left as it is.

        Entries become readable in the order of their positions: none appears later in front of one that was read.
        """
        ...

    async def read_journal(self, *, after: int = 0, limit: int = 1000, key: str | None = None) -> list[JournalEntry]:
        """Entries behind position `after`, in order; only those of one aggregate when `key` is given."""
        ...

    async def journal_end(self) -> int:
        """Position of the last entry; 0 for an empty journal."""
        ...

    async def journalled(self, event_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those of the events that the journal has, by id, as they were stored."""
        ...

    async def aclose(self) -> None: ...


def in_turns(
    collections: Sequence[Collection], each: Sequence[Sequence[Document]]
) -> list[tuple[Collection, Document]]:
    """What each collection has, by turns: a long backlog of one must not hold up the others."""
    turns = itertools.zip_longest(*each)
    return [(c, found) for turn in turns for c, found in zip(collections, turn, strict=True) if found is not None]


async def pages(store: RecordStore, collection: Collection, size: int) -> AsyncIterator[list[Document]]:
    """All documents of a collection, `size` at a time, by ascending id."""
    after = ""
    while page := await store.scan(collection, after=after, limit=size):
        yield page
        after = page[-1]["_id"]
