"""What clients used."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query

from api.deps import Moment, TheStudio, UserId, check_tenant
from events.types import Owner
from mini_studio.errors import Invalid
from mini_studio.records.projection import timestamp
from mini_studio.records.usage import Tally, whole_hour
from schemas.fine_tuning import ErrorResponse
from schemas.usage import ModelUsage, UsageResponse, UsageSums

router = APIRouter(tags=["usage"], responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}})

RESOLUTION, HOUR, DAY = timedelta(microseconds=1), timedelta(hours=1), timedelta(days=1)
LONGEST = 366 * DAY
FIRST_YEAR, LAST_YEAR = 2000, 9000

From = Annotated[
    Moment,
    Query(
        alias="from",
        description="An RFC 3339 time with a zone, rounded down to its hour; by default 24 hours before `to`.",
        examples=["2026-01-31T12:00:00Z"],
    ),
]
To = Annotated[
    Moment,
    Query(
        alias="to",
        description="An RFC 3339 time with a zone, rounded up to an hour, which is not counted any more; by default now. "
        "After `from`, by 366 days at most.",
        examples=["2026-02-01T12:00:00Z"],
    ),
]


@router.get("/usage")
async def get_usage(
    studio: TheStudio, user: UserId = None, client_code: Owner = "", begin: From = None, end: To = None
) -> UsageResponse:
    """What a client's requests to models used in [from, to), by model; or (empty `client_code`) those of callers that named no client.

    An account by the hour, a few seconds behind, of the share of requests that `gateway.usage_sample` says, scaled up. It is
    at-most-once: what a gateway knew when it was killed, or could not publish, is missing. So it is not a bill.
    """
    check_tenant(user, client_code)
    owner = user or client_code
    first, last = period(begin, end, datetime.now(UTC))
    tallies: dict[str, Tally] = {}
    async for hour in studio.usage.between(owner, first, last):
        tallies[hour.model] = tallies.get(hour.model, Tally()) + hour.tally
    models = [ModelUsage(model=model, **sums(tally)) for model, tally in sorted(tallies.items())]
    total = UsageSums(**sums(sum(tallies.values(), Tally())))
    return UsageResponse(client_code=owner, begin=timestamp(first), end=timestamp(last), models=models, total=total)


def period(begin: datetime | None, end: datetime | None, now: datetime) -> tuple[datetime, datetime]:
    """The whole hours that are meant. Raises `Invalid`, which names the field."""
    for field, time in (("from", begin), ("to", end)):
        if time is not None and not FIRST_YEAR <= time.year <= LAST_YEAR:
            raise invalid(field, f"must be in the years {FIRST_YEAR} to {LAST_YEAR}")
    end = end or now
    begin = begin or end - DAY
    if begin >= end:
        raise invalid("from", "must be before to, which is now by default")
    if end - begin > LONGEST:
        raise invalid("from", f"must be {LONGEST.days} days before to at most")
    return whole_hour(begin), whole_hour(end + HOUR - RESOLUTION)


def invalid(field: str, message: str) -> Invalid:
    return Invalid(f"{field}: {message}", details=[{"field": field, "message": message}])


def sums(tally: Tally) -> dict[str, int | float | None]:
    """As they are answered: counts are whole, also those of a sample."""
    return {
        "requests": round(tally.requests),
        "errors": round(tally.errors),
        "prompt_tokens": round(tally.prompt_tokens),
        "completion_tokens": round(tally.completion_tokens),
        "requests_without_tokens": round(tally.without_tokens),
        "mean_total_ms": mean(tally.total_ms, tally.requests),
        "mean_first_byte_ms": mean(tally.first_byte_ms, tally.answered),
    }


def mean(total: float, count: float) -> float | None:
    return round(total / count, 3) if count else None
