"""Events and their envelope: CloudEvents 1.0 in Kafka's binary mode (attributes in `ce_` headers, plain JSON as the value).

`sequence` is contiguous from 1 per aggregate and source, so a reader sees gaps and applies each source's events once and in order.
"""

import uuid
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from events.topics import Topic
from events.types import Owner

Text = Annotated[str, StringConstraints(min_length=1, max_length=300)]


class Source(StrEnum):
    """Who decides: each source numbers its own events of an aggregate, so no two writers race for a number."""

    API = "api"
    DATASETS = "datasets"
    TRAINING = "training"
    SERVING = "serving"


class Event(BaseModel):
    """A fact, in the past tense. Fields are what a reader needs, so nobody has to call back."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    TOPIC: ClassVar[Topic]
    TYPE: ClassVar[str]
    SOURCE: ClassVar[Source]


E = TypeVar("E", bound=Event)


class Cause(BaseModel):
    """What an event follows from: ids that tie a REST call to every event and log line it caused."""

    model_config = ConfigDict(frozen=True)

    correlation_id: Text
    causation_id: Text | None = None
    traceparent: (
        Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")] | None
    ) = None


class Envelope(BaseModel, Generic[E]):
    """One event with its CloudEvents attributes."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    id: Text
    source: Source
    type: Text
    subject: Text = Field(description="The aggregate's id, which is the Kafka key.")
    sequence: int = Field(ge=1, description="Contiguous from 1 per subject and source.")
    time: AwareDatetime
    client_code: Owner = Field(description="The tenant; empty for what all clients share.")
    cause: Cause
    data: E

    @classmethod
    def of(
        cls, data: E, *, subject: str, sequence: int, client_code: str, cause: Cause, time: datetime | None = None
    ) -> Self:
        """A new event, decided now."""
        return cls(
            id=str(uuid.uuid4()),
            source=data.SOURCE,
            type=data.TYPE,
            subject=subject,
            sequence=sequence,
            time=time or datetime.now(UTC),
            client_code=client_code,
            cause=cause,
            data=data,
        )

    @property
    def topic(self) -> str:
        return self.data.TOPIC.value

    def follows(self) -> Cause:
        """The cause of what is decided because of this event."""
        return Cause(correlation_id=self.cause.correlation_id, causation_id=self.id, traceparent=self.cause.traceparent)

    def headers(self) -> dict[str, str]:
        """CloudEvents attributes as Kafka headers, binary content mode."""
        headers = {
            "ce_specversion": "1.0",
            "ce_id": self.id,
            "ce_source": f"/mini-studio/{self.source.value}",
            "ce_type": self.type,
            "ce_subject": self.subject,
            "ce_time": self.time.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "ce_sequence": str(self.sequence),
            "ce_clientcode": self.client_code,
            "ce_correlationid": self.cause.correlation_id,
            "content-type": "application/json",
        }
        if self.cause.causation_id:
            headers["ce_causationid"] = self.cause.causation_id
        if self.cause.traceparent:
            headers["ce_traceparent"] = self.cause.traceparent
        return headers

    def body(self) -> bytes:
        return self.data.model_dump_json().encode()

    def stored(self) -> dict[str, Any]:
        """The form kept in outboxes and in the journal; `registry.restore` reads it back."""
        return {"topic": self.topic, "key": self.subject, "headers": self.headers(), "value": self.body().decode()}
