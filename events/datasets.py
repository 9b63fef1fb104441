"""Events of a dataset; the aggregate is the dataset's id."""

from typing import ClassVar, Literal

from pydantic import Field

from events.base import Event, Source
from events.topics import Topic
from events.types import DatasetFormat, DatasetId, Sha256


class DatasetUploaded(Event):
    """A client's dataset was received, validated line by line and stored twice."""

    TOPIC: ClassVar = Topic.DATASETS
    TYPE: ClassVar = "dataset.uploaded.v1"
    SOURCE: ClassVar = Source.API

    dataset_id: DatasetId
    filename: str | None = Field(None, max_length=255, description="As the client called it; for display only.")
    dfs_path: str = Field(description="Absolute path on the shared file system.")
    s3_uri: str = Field(description="`s3://bucket/key`.")
    size_bytes: int = Field(ge=1)
    sha256: Sha256
    format: DatasetFormat
    rows: int = Field(ge=1)
    characters: int = Field(ge=0, description="Characters of all texts.")
    longest_line_bytes: int = Field(ge=0)


class DatasetProfiled(Event):
    """Both stored copies were read back and compared with what was received."""

    TOPIC: ClassVar = Topic.DATASETS
    TYPE: ClassVar = "dataset.profiled.v1"
    SOURCE: ClassVar = Source.DATASETS

    dataset_id: DatasetId
    state: Literal["verified", "damaged"]
    message: str | None = Field(None, description="Which copy is damaged, and what to do.")
    rows: int
    characters: int = Field(description="Characters of all texts that are trained on or from.")
    longest_line_bytes: int
    tokens_estimated: int = Field(
        description="Characters / 4, rounded up; a job reports the exact count of its own tokenizer."
    )


class DatasetDeleted(Event):
    """A client wants the dataset no more. Its two copies are removed after this; its id is never used again."""

    TOPIC: ClassVar = Topic.DATASETS
    TYPE: ClassVar = "dataset.deleted.v1"
    SOURCE: ClassVar = Source.API

    dataset_id: DatasetId
    dfs_path: str = Field(description="Absolute path on the shared file system, where one copy lay.")
    s3_uri: str = Field(description="`s3://bucket/key`, where the other one lay.")
