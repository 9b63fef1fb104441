"""What each client used of each model in each hour, summed from topic `mini-studio.usage`.

The topic is at most once, and its sums are exactly what the topic says: an hour keeps the last batch of each gateway process that is
in it, written together with the sums, so a batch that is delivered again changes nothing. No hour is ever deleted.
"""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from events.base import Cause
from events.types import derived_id
from events.usage import UsageBatch, UsageRecord
from mini_studio.errors import Unavailable
from mini_studio.records.projection import timestamp
from mini_studio.records.record import ANYONE, CAS_TRIES, PAGE, Record, Repository
from mini_studio.records.store import Collection

NOTHING_FOLLOWS = Cause(correlation_id="usage")
"""No event ever follows from a usage record."""


class Tally(BaseModel):
    """Sums over requests, each by its weight."""

    model_config = ConfigDict(frozen=True)

    requests: float = 0.0
    errors: float = Field(0.0, description="Those with a status of 400 or more.")
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    without_tokens: float = Field(0.0, description="Requests of which the model server reported no tokens.")
    total_ms: float = 0.0
    first_byte_ms: float = 0.0
    answered: float = Field(0.0, description="Requests with a first byte.")

    @classmethod
    def of(cls, records: Sequence[UsageRecord]) -> Self:
        reported = [r for r in records if r.prompt_tokens is not None or r.completion_tokens is not None]
        answered = [r for r in records if r.first_byte_ms is not None]
        return cls(
            requests=sum(r.weight for r in records),
            errors=sum(r.weight for r in records if r.status >= 400),
            prompt_tokens=sum(r.weight * (r.prompt_tokens or 0) for r in reported),
            completion_tokens=sum(r.weight * (r.completion_tokens or 0) for r in reported),
            without_tokens=sum(r.weight for r in records if r.prompt_tokens is None and r.completion_tokens is None),
            total_ms=sum(r.weight * r.total_ms for r in records),
            first_byte_ms=sum(r.weight * (r.first_byte_ms or 0) for r in answered),
            answered=sum(r.weight for r in answered),
        )

    def __add__(self, other: "Tally") -> "Tally":
        return Tally.model_construct(
            **{name: getattr(self, name) + getattr(other, name) for name in Tally.model_fields}
        )


class Part(NamedTuple):
    """What one batch adds to one hour."""

    gateway: str
    sequence: int
    tally: Tally


class UsageHour(Record):
    """One client's requests to one model in one hour. `created_at` is the hour, so a client's hours are listed by time."""

    COLLECTION: ClassVar = Collection("usage_hours", listed_by=("client_code",))

    model: str = Field(description="Empty for requests that no route led to a model.")
    tally: Tally = Tally()
    applied: dict[str, int] = Field(default_factory=dict, description="Last batch applied, per gateway process.")
    cause: Cause = NOTHING_FOLLOWS

    @classmethod
    def begin(cls, client_code: str, model: str, hour: str) -> Self:
        id = derived_id("use", client_code, model, hour)
        return cls(id=id, client_code=client_code, created_at=hour, model=model)

    def plus(self, parts: Sequence[Part]) -> Self:
        """With these, in order, but for those that it has; the same record if it has all of them."""
        record = self
        for part in parts:
            if part.sequence > record.applied.get(part.gateway, 0):
                applied = {**record.applied, part.gateway: part.sequence}
                record = record.model_copy(update={"tally": record.tally + part.tally, "applied": applied})
        return record


class UsageHours(Repository[UsageHour]):
    async def add(self, batches: Sequence[UsageBatch]) -> None:
        """Sum the batches up, with one read and one write for all hours that nobody else writes meanwhile."""
        parts = parts_of(batches)
        for _ in range(CAS_TRIES):
            before = await self.get_all(ANYONE, list(parts))
            after = {id: before.get(id, new).plus(added) for id, (new, added) in parts.items()}
            changed = [hour for id, hour in after.items() if hour is not before.get(id)]
            parts = {id: parts[id] for id in await self.put_all(changed, before)}
            if not parts:
                return
        raise Unavailable(f"{self.collection.name} are being changed by too many at once")

    async def between(self, tenant: str, begin: datetime, end: datetime) -> AsyncIterator[UsageHour]:
        """A tenant's hours from `begin` on and before `end`, oldest first: by the index, and at most a page too many is read."""
        last = timestamp(end)
        after = (timestamp(begin), "")
        while True:
            found = await self._store.find(
                self.collection, {"client_code": tenant}, limit=PAGE, after=after, newest_first=False
            )
            for document in found:
                if document["created_at"] >= last:
                    return
                yield self._record.load(document)
            if len(found) < PAGE:
                return
            after = (found[-1]["created_at"], found[-1]["_id"])


def parts_of(batches: Sequence[UsageBatch]) -> dict[str, tuple[UsageHour, list[Part]]]:
    """By hour record: how it begins, and what the batches add to it, in their order."""
    found: dict[str, tuple[UsageHour, list[Part]]] = {}
    for batch in batches:
        hour = timestamp(whole_hour(batch.at))
        owners: dict[tuple[str, str], list[UsageRecord]] = {}
        for record in batch.records:
            owners.setdefault((record.client_code, record.model), []).append(record)
        for (client_code, model), records in owners.items():
            begun = UsageHour.begin(client_code, model, hour)
            part = Part(batch.gateway, batch.sequence, Tally.of(records))
            found.setdefault(begun.id, (begun, []))[1].append(part)
    return found


def whole_hour(time: datetime) -> datetime:
    """The beginning of its hour, in UTC."""
    return time.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
