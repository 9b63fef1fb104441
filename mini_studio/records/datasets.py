"""Datasets as `datasets` shows them, and the profiles that consumer `datasets` decides."""

from typing import Any, ClassVar, Self

from events.base import Envelope, Event
from events.datasets import DatasetProfiled, DatasetUploaded
from events.types import DatasetFormat
from mini_studio.errors import NotFound
from mini_studio.records.projection import Projection, Projections, begun, timestamp
from mini_studio.records.record import Decider
from mini_studio.records.store import Collection


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
    state: str = "uploaded"
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

    def changes(self, event: Event, at: str) -> dict[str, Any]:
        if isinstance(event, DatasetProfiled):
            return event.model_dump(exclude={"dataset_id", "rows"})
        return {}


class Datasets(Projections[Dataset]):
    """The datasets, and how requests name them."""

    async def resolve(self, tenant: str, name: str, bucket_uri: str) -> Dataset:
        """The tenant's dataset by id, DFS path, or S3 key with or without `s3://bucket/`. Raises `NotFound`."""
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
