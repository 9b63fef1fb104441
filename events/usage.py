"""What gateways say on topic `mini-studio.usage`: batches of what requests used. No events, and never a prompt or an answer.

At most once: a gateway that dies takes with it what it has not said, and what nobody takes in time is dropped.
"""

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from events.registry import UndecodableEvent

TYPE: Literal["usage.batch.v1"] = "usage.batch.v1"
MAX_RECORDS = 1000
MAX_TOKENS = 10**12


class UsageRecord(BaseModel):
    """One request that went to a model, or would have. Fields that say nothing are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    client_code: str = Field("", max_length=300, description="Who asked; empty for who named no client.")
    model: str = Field("", max_length=300, description="The model that was asked; empty where no route led to one.")
    deployment_id: str = Field("", max_length=100, description="The deployment that answered, or should have.")
    revision: int = Field(0, ge=0, description="The revision of its route.")
    prompt_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="As the model server reported it.")
    completion_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="As the model server reported it.")
    status: int = Field(ge=100, le=599, description="HTTP status that the client got; 499: it hung up before.")
    first_byte_ms: float | None = Field(
        None, ge=0, description="From the request's arrival to the first byte of the answer."
    )
    total_ms: float = Field(ge=0, description="From the request's arrival to the end of the answer.")
    weight: float = Field(1.0, ge=1, description="How many requests it stands for: 1 / the share that is recorded.")


class UsageBatch(BaseModel):
    """One Kafka record: what one gateway process saw in the last second or so."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Literal["usage.batch.v1"]
    gateway: str = Field(pattern=r"^[0-9a-f]{16}$", description="The gateway process, by a random id; the Kafka key.")
    sequence: int = Field(ge=1, description="From 1 per gateway; one that is not greater than the last is a repeat.")
    at: AwareDatetime = Field(description="When the batch was closed, RFC 3339 in UTC; all of it counts for that hour.")
    records: list[UsageRecord] = Field(max_length=MAX_RECORDS)

    @field_validator("at")
    @classmethod
    def _within_the_calendar(cls, at: datetime) -> datetime:
        if not 2000 <= at.year <= 9000:
            raise ValueError("is no time of this calendar's")
        return at

    @classmethod
    def read(cls, value: bytes | None) -> Self:
        """The batch in a record of the topic. Raises `UndecodableEvent`."""
        try:
            return cls.model_validate_json(value or b"")
        except ValidationError as error:
            wrong: list[Any] = error.errors(include_url=False, include_input=False)
            said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in wrong[:5])
            raise UndecodableEvent(f"no batch of usage records: {said}") from error
