"""`GET /usage`: sums of whole hours, by model, for whom they belong to."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from events.usage import TYPE, UsageBatch, UsageRecord
from mini_studio.records import usage
from mini_studio.wiring import Studio

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


async def give(studio: Studio, sequence: int, at: datetime, *records: UsageRecord) -> None:
    batch = UsageBatch(type=TYPE, gateway="a" * 16, sequence=sequence, at=at, records=list(records))
    await studio.usage.add([batch])


def used(client: str = "acme", model: str = "m", status: int = 200, **fields: Any) -> UsageRecord:
    return UsageRecord(client_code=client, model=model, status=status, total_ms=10, **fields)


async def ask(client: httpx.AsyncClient, user: str | None = None, **params: str) -> dict[str, Any]:
    answer = await client.get("/usage", params=params, headers={"X-User-ID": user} if user else {})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_hours_are_summed_by_model(client: httpx.AsyncClient, studio: Studio) -> None:
    tokens = {"prompt_tokens": 3, "completion_tokens": 5, "first_byte_ms": 2.0}
    await give(studio, 1, NOON, used(**tokens), used(), used(model="n", status=502), used("rival"), used(""))
    await give(studio, 2, NOON + timedelta(hours=1), used(**tokens, weight=2.5))
    answer = await ask(client, "acme", **{"from": "2026-01-31T12:00:00Z", "to": "2026-01-31T14:00:00Z"})
    nothing = {"prompt_tokens": 0, "completion_tokens": 0}
    assert answer == {
        "ok": True, "client_code": "acme",
        "from": "2026-01-31T12:00:00.000000Z", "to": "2026-01-31T14:00:00.000000Z",
        "models": [
            {"model": "m", "requests": 4, "errors": 0, "prompt_tokens": 10, "completion_tokens": 18,
             "requests_without_tokens": 1, "mean_total_ms": 10.0, "mean_first_byte_ms": 2.0},
            {"model": "n", "requests": 1, "errors": 1, **nothing,
             "requests_without_tokens": 1, "mean_total_ms": 10.0, "mean_first_byte_ms": None},
        ],
        "total": {"requests": 6, "errors": 1, "prompt_tokens": 10, "completion_tokens": 18,
                  "requests_without_tokens": 2, "mean_total_ms": 10.0, "mean_first_byte_ms": 2.0},
    }  # fmt: skip
    assert await ask(client, client_code="acme", **{"from": answer["from"], "to": answer["to"]}) == answer


async def test_times_are_rounded_to_whole_hours_outwards(client: httpx.AsyncClient, studio: Studio) -> None:
    for number in range(5):
        await give(studio, number + 1, NOON + timedelta(hours=number), used())

    async def requests(begin: str, end: str) -> tuple[str, str, int]:
        found = await ask(client, "acme", **{"from": f"2026-01-31T{begin}", "to": f"2026-01-31T{end}"})
        return found["from"][11:16], found["to"][11:16], found["total"]["requests"]

    assert await requests("13:00:00Z", "14:00:00Z") == ("13:00", "14:00", 1)
    assert await requests("13:59:59Z", "14:00:00.000001Z") == ("13:00", "15:00", 2)
    assert await requests("15:30:00+02:00", "15:45:00+02:00") == ("13:00", "14:00", 1), "a zone is a zone"
    assert await requests("00:00:00Z", "12:00:00Z") == ("00:00", "12:00", 0)


async def test_the_last_24_hours_are_the_default(client: httpx.AsyncClient, studio: Studio) -> None:
    now = datetime.now(UTC)
    for number, hours in enumerate((0, 23, 26), start=1):
        await give(studio, number, now - timedelta(hours=hours), used())
    found = await ask(client, "acme")
    assert found["total"]["requests"] == 2
    assert timedelta(hours=24) <= times(found)[1] - times(found)[0] <= timedelta(hours=25)
    only = await ask(client, "acme", to=(now - timedelta(hours=25)).isoformat())
    assert only["total"]["requests"] == 1
    since = await ask(client, "acme", **{"from": (now - timedelta(hours=30)).isoformat()})
    assert since["total"]["requests"] == 3


def times(found: dict[str, Any]) -> tuple[datetime, datetime]:
    return datetime.fromisoformat(found["from"]), datetime.fromisoformat(found["to"])


async def test_a_client_sees_its_own(client: httpx.AsyncClient, studio: Studio) -> None:
    await give(studio, 1, datetime.now(UTC), used(), used(), used(""), used("rival"))
    assert (await ask(client, "acme"))["total"]["requests"] == 2
    assert (await ask(client, "acme", client_code="acme"))["total"]["requests"] == 2
    assert (await ask(client))["total"]["requests"] == 1, "those that named no client"
    assert (await ask(client, client_code="rival"))["total"]["requests"] == 1
    assert (await ask(client, client_code="nobody"))["models"] == []
    answer = await client.get("/usage", params={"client_code": "acme"}, headers={"X-User-ID": "rival"})
    assert answer.status_code == 404


async def test_a_long_time_is_read_by_pages(
    client: httpx.AsyncClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "PAGE", 7)
    reads: list[int] = []
    find = studio.store.find

    async def counting(*args: Any, **options: Any) -> Any:
        reads.append(len(found := await find(*args, **options)))
        return found

    for number in range(60):
        await give(studio, number + 1, NOON + timedelta(hours=number), used(model="m"), used(model="n"))
    monkeypatch.setattr(studio.store, "find", counting)
    found = await ask(client, "acme", **{"from": "2026-01-31T22:00:00Z", "to": "2026-02-01T06:00:00Z"})
    assert [model["requests"] for model in found["models"]] == [8, 8]
    assert reads == [7, 7, 7], "a page too many at most"


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"from": "yesterday"}, "from"),
        ({"to": "2026-01-31T12:00:00"}, "to"),
        ({"from": "2026-01-31T12:00:00Z", "to": "2026-01-31T12:00:00Z"}, "from"),
        ({"from": "2999-01-31T12:00:00Z"}, "from"),
        ({"from": "2025-01-31T12:00:00Z", "to": "2026-02-02T12:00:00Z"}, "from"),
        ({"from": "0001-01-01T00:00:00+14:00", "to": "0001-01-02T00:00:00Z"}, "from"),
        ({"to": "9999-12-31T23:59:59Z"}, "to"),
        ({"client_code": "*"}, "client_code"),
    ],
)
async def test_what_is_wrong_is_named(client: httpx.AsyncClient, params: dict[str, str], field: str) -> None:
    answer = await client.get("/usage", params=params)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
    assert field in [detail["field"] for detail in answer.json()["details"]]
    assert field in answer.json()["error"]
