"""Datasets as `datasets` shows them, and the profiles that consumer `datasets` decides."""

from datetime import datetime
from typing import Any, ClassVar, Self

from pydantic import Field

from events.base import Envelope, Event
from events.datasets import DatasetDeleted, DatasetProfiled, DatasetUploaded
from events.types import DatasetFormat
from mini_studio.errors import NotFound
from mini_studio.records.projection import Projection, Projections, begun, timestamp
from mini_studio.records.record import ANYONE, Decider, owned
from mini_studio.records.store import Collection

DELETED = "deleted"
PAGE = 100
"""Records read at a time: deleted ones between the others cost no query each."""


class Dataset(Projection):
    """One uploaded file: where its two copies lie and what is in it."""

    COLLECTION: ClassVar = Collection("datasets", listed_by=("client_code", "dfs_path", "s3_uri"))

    filename: str | None
    dfs_path: str
    s3_uri: str
    size_bytes: int
    sha256: str
    format: DatasetFormat
    rows: int
    state: str = Field("uploaded", description="uploaded, verified, damaged, or deleted, which it stays for ever.")
    message: str | None = None
    characters: int
    longest_line_bytes: int
    tokens_estimated: int | None = None

    @classmethod
    def begin(cls, envelope: Envelope[Any]) -> Self | None:
        if not isinstance(envelope.data, DatasetUploaded):
            return None
        at = timestamp(envelope.time)
        fields = envelope.data.model_dump(exclude={"dataset_id"})
        record = cls(
            id=envelope.subject, client_code=envelope.client_code, created_at=at, updated_at=at,
            cause=envelope.follows(), **fields,
        )  # fmt: skip
        return begun(record, envelope)

    @property
    def deleted(self) -> bool:
        """A tombstone: its bytes are removed, its id and the Idempotency-Key that made it are not used again."""
        return self.state == DELETED

    def changes(self, event: Event, at: str) -> dict[str, Any]:
        match event:
            case DatasetDeleted():
                return {"state": DELETED, "message": None}
            case DatasetProfiled():
                # The two come in no fixed order, and what was deleted stays so.
                late = {"state", "message"} if self.deleted else set()
                return event.model_dump(exclude={"dataset_id", "rows", *late})
        return {}


class Datasets(Projections[Dataset]):
    """The datasets, and how requests name them. What only `get`s finds deleted ones too."""

    async def require(self, tenant: str, id: str, as_of: datetime | None = None) -> Dataset:
        """The tenant's dataset, now or as it was. Raises `NotFound` also for one that is deleted by then."""
        found = await self.at(tenant, id, as_of)
        if found is None or found.deleted:
            raise NotFound(
                f"{'there is no dataset' if found is None else 'deleted: the dataset'} {id[:200]!r}"
                f"{'' if as_of is None else f' as of {as_of.isoformat()}'}"
            )
        return found

    async def present(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        newest_first: bool = True,
        as_of: datetime | None = None,
    ) -> list[Dataset]:
        """A tenant's datasets but for deleted ones, from behind the dataset `after` on, which may be deleted by now."""
        position = None
        if after is not None:
            last = await self.get(tenant, after)
            if last is None:
                return []
            position = (last.created_at, last.id)
        found: list[Dataset] = []
        while len(found) < limit:
            wanted = max(limit - len(found), PAGE)
            documents = await self._store.find(
                self.collection, owned(tenant, {}), limit=wanted, after=position, newest_first=newest_first
            )
            for document in documents:
                if len(found) == limit:
                    break
                position = (document["created_at"], document["_id"])
                dataset = await self._as_of(Dataset.load(document), as_of)
                if dataset is not None and not dataset.deleted:
                    found.append(dataset)
            if len(documents) < wanted:
                break
        return found

    async def _as_of(self, dataset: Dataset, as_of: datetime | None) -> Dataset | None:
        if as_of is None:
            return dataset
        return None if dataset.created_at > timestamp(as_of) else await self.at(ANYONE, dataset.id, as_of)

    async def resolve(self, tenant: str, name: str, bucket_uri: str) -> Dataset:
        """The tenant's dataset by id, DFS path, or S3 key with or without `s3://bucket/`, a deleted one too. Raises `NotFound`."""
        found = await self.get(tenant, name) or await self._at(tenant, name, bucket_uri)
        if found is None:
            raise NotFound(
                f"dataset_filename: {tenant} has no dataset {name[:200]!r}; upload it to "
                f"/fine_tuning/upload-dataset/{tenant} and use the dataset_id, dataset_dfs or dataset_s3 of the answer."
            )
        return found

    async def _at(self, tenant: str, name: str, bucket_uri: str) -> Dataset | None:
        where = {"dfs_path": name} if name.startswith("/") else {"s3_uri": _uri(name, bucket_uri)}
        found = await self.where(tenant, limit=1, **where)
        return found[0] if found else None


def _uri(name: str, bucket_uri: str) -> str:
    return name if name.startswith("s3://") else f"{bucket_uri}/{name}"


class DatasetProfile(Decider):
    """What consumer `datasets` found when it read both copies back."""

    COLLECTION: ClassVar = Collection("dataset_profiles")

    removed: bool = Field(False, description="Both copies were removed, because the dataset was deleted.")
