"""REST models of dead letters."""

import base64
from typing import Literal, Self

from pydantic import BaseModel, Field


class Content(BaseModel):
    """Bytes as they were: as text where they are UTF-8, else in base64."""

    encoding: Literal["text", "base64"]
    content: str

    @classmethod
    def of(cls, data: bytes | None) -> Self | None:
        """None for null, which is not the same as no bytes."""
        if data is None:
            return None
        try:
            return cls(encoding="text", content=data.decode())
        except UnicodeDecodeError:
            return cls(encoding="base64", content=base64.b64encode(data).decode())


class HeaderView(BaseModel):
    name: str
    value: Content | None


class DeadLetterView(BaseModel):
    """A record that a consumer could not handle."""

    id: str
    consumer: str
    state: Literal["open", "redriven"]
    reason: str = Field(description="Why the consumer cannot handle it.")
    time: str = Field(description="When it was put aside.")
    topic: str = Field(description="Where it came from, with partition and offset.")
    partition: int
    offset: int
    size: int = Field(description="Bytes of its value.")
    event_id: str | None = Field(description="Of the header, if it has one; so are type and subject.")
    event_type: str | None
    subject: str | None


class DeadLetterDetail(DeadLetterView):
    """The same with the record, byte for byte; null is null."""

    key: Content | None
    headers: list[HeaderView] = Field(description="As they were sent, in order.")
    value: Content | None


class DeadLetterListResponse(BaseModel):
    """Newest first; `after=<last id>` gives the next page while `has_more`."""

    ok: bool = True
    dead_letters: list[DeadLetterView]
    has_more: bool
    last_id: str | None


class DeadLetterResponse(BaseModel):
    ok: bool = True
    dead_letter: DeadLetterDetail


class RedriveResponse(BaseModel):
    ok: bool = True
    redriven: int = Field(description="How many were put back. One that fails again is a new dead letter.")
