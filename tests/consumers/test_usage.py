"""Consumer `usage` over a real broker and record store: what the topic says is summed up, once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from api.gateway.usage import UsageLog, Used
from consumers.app import run_one
from consumers.usage import consumer
from events.topics import Plain, dead_letter_topic
from events.types import new_id
from events.usage import TYPE, UsageBatch
from mini_studio.bus.kafka import Outgoing, create_topics
from mini_studio.health import Health
from mini_studio.records.usage import Tally, UsageHour, whole_hour
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import Studio, ended, open_studio
from tests.consumers.cases import crash_after, eventually
from tests.fakes.broker import running_broker
from tests.fakes.log import read_all
from tests.fakes.waiting import until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

NOON = datetime(2026, 1, 31, 12, 30, tzinfo=UTC)
GATEWAY, ANOTHER = "00000000000000aa", "00000000000000bb"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def studio(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Studio]:
    """The consumer runs in it, as its process runs it."""
    data: Path = tmp_path_factory.mktemp("usage")
    with running_broker() as bootstrap:
        settings = Settings(data=data, kafka=Kafka(bootstrap=bootstrap, partitions=2, fetch_wait_ms=20))
        await create_topics(settings.kafka)
        async with open_studio(settings) as studio:
            stop = asyncio.Event()
            running: asyncio.Task[Any] = asyncio.create_task(run_one(consumer, studio, Health(), stop))
            yield studio
            stop.set()
            with contextlib.suppress(asyncio.CancelledError):
                await running


@pytest.fixture
def client() -> str:
    """Nobody else's."""
    return new_id("client")


def used(client: str, **fields: Any) -> dict[str, Any]:
    return {"client_code": client, "model": "m", "status": 200, "total_ms": 10.0, **fields}


def batch(sequence: int, *records: dict[str, Any], gateway: str = GATEWAY, at: datetime = NOON) -> Outgoing:
    value = {"type": TYPE, "gateway": gateway, "sequence": sequence, "at": at.isoformat(), "records": records}
    return Outgoing(Plain.USAGE.value, gateway.encode(), orjson.dumps(value), [])


async def hours(studio: Studio, client: str) -> list[UsageHour]:
    return [hour async for hour in studio.usage.between(client, NOON - timedelta(days=1), NOON + timedelta(days=1))]


async def summed(studio: Studio, client: str, requests: float) -> list[UsageHour]:
    """The client's hours, once they have as many requests."""

    async def look() -> list[UsageHour] | None:
        found = await hours(studio, client)
        return found if sum(hour.tally.requests for hour in found) == requests else None

    found: list[UsageHour] = await eventually(look)
    return found


async def all_taken(studio: Studio) -> None:
    """What was published up to now has been read, on every partition."""
    mark = new_id("mark")
    for partition in range(2):
        value = batch(1, used(mark), gateway=f"{new_id('x')[-16:]}")
        await studio.publisher.publish([Outgoing(value.topic, value.key, value.value, [], partition)])
    await summed(studio, mark, 2)


async def test_requests_are_summed_by_model_and_hour(studio: Studio, client: str) -> None:
    first = batch(
        1,
        used(client, prompt_tokens=3, completion_tokens=4, first_byte_ms=5.0),
        used(client, prompt_tokens=10, status=499, weight=2.0),
        used(client, model="", status=404),
    )
    await studio.publisher.publish([first, batch(2, used(client), at=NOON + timedelta(minutes=30))])
    noon, nowhere, later = sorted(await summed(studio, client, 5), key=lambda h: (h.created_at, h.model == ""))
    assert (noon.model, noon.created_at, nowhere.model) == ("m", "2026-01-31T12:00:00.000000Z", "")
    assert later.created_at == "2026-01-31T13:00:00.000000Z"
    assert noon.tally == Tally(
        requests=3, errors=2, prompt_tokens=23, completion_tokens=4, total_ms=30, first_byte_ms=5, answered=1
    )
    assert nowhere.tally == Tally(requests=1, errors=1, without_tokens=1, total_ms=10)
    assert (noon.applied, later.applied) == ({GATEWAY: 1}, {GATEWAY: 2})


async def test_what_is_delivered_again_counts_once(studio: Studio, client: str) -> None:
    batches = [batch(11, used(client)), batch(12, used(client), used(client))]
    other = batch(11, used(client), gateway=ANOTHER)
    await studio.publisher.publish([*batches, other, *batches, *batches[::-1], other])
    await all_taken(studio)
    (hour,) = await summed(studio, client, 4)
    assert hour.applied == {GATEWAY: 12, ANOTHER: 11}


async def test_a_crash_after_the_write_sums_once(studio: Studio, client: str) -> None:
    crashed = crash_after(studio, "put_all", "usage_hours")
    await studio.publisher.publish([batch(21, used(client), used(client, model="n"))])
    await until(lambda: crashed)
    await all_taken(studio)
    await summed(studio, client, 2)


async def test_another_member_that_writes_meanwhile_loses_nothing(studio: Studio, client: str) -> None:
    batches = [
        UsageBatch.read(batch(1, used(client), gateway=f"{number:016x}").value) for number in range(10) for _ in "ab"
    ]
    await asyncio.gather(*(studio.usage.add([each]) for each in batches))
    (hour,) = await hours(studio, client)
    assert (hour.tally.requests, len(hour.applied)) == (10, 10)


async def test_what_is_no_batch_is_put_aside_byte_for_byte_and_the_rest_is_summed(studio: Studio, client: str) -> None:
    good = batch(31, used(client))
    value = orjson.loads(good.value or b"")
    broken = [
        b"{not json", b"", orjson.dumps({**value, "type": "usage.batch.v9"}), orjson.dumps({**value, "gateway": "a.b"}),
        orjson.dumps({**value, "at": "0001-01-01T00:00:00+14:00"}), orjson.dumps({**value, "records": [{"status": 1}]}),
        None,
    ]  # fmt: skip
    poison = [Outgoing(good.topic, client.encode(), value, [("ce_type", b"\xff")]) for value in broken]
    await studio.publisher.publish([good, *poison, batch(32, used(client))])
    await summed(studio, client, 2)
    await all_taken(studio)
    dead = await read_all(studio.settings.kafka.bootstrap, dead_letter_topic(Plain.USAGE, "usage"))
    mine = [record for record in dead if record.key == client.encode()]
    assert [record.value for record in mine] == broken
    assert all(b"no batch of usage records" in dict(record.headers)["dlq_reason"] for record in mine)
    letters = await studio.dead_letters.page(consumer="usage", limit=100)
    assert len(letters) == len(dead)


async def test_every_record_of_a_gateway_arrives_and_is_summed(studio: Studio, client: str) -> None:
    """From `add` to the hour's record, exactly."""
    log = UsageLog(studio.settings)
    publishing = asyncio.create_task(log.run())
    began = datetime.now(UTC)
    for number in range(1000):
        log.add(Used(client, f"m{number % 3}", "dep_x", 1, number, 2 * number, 200 if number % 10 else 502, 1.5, 2.5))
    found: list[UsageHour] = []

    async def all_there() -> bool:
        found[:] = [hour async for hour in studio.usage.between(client, whole_hour(began), began + timedelta(hours=2))]
        return sum(hour.tally.requests for hour in found) == 1000

    await eventually(all_there)
    await ended(publishing)
    await log.aclose()
    assert {hour.model for hour in found} == {"m0", "m1", "m2"}
    assert sum((hour.tally for hour in found), Tally()) == Tally(
        requests=1000, errors=100, prompt_tokens=sum(range(1000)), completion_tokens=2 * sum(range(1000)),
        total_ms=2500, first_byte_ms=1500, answered=1000,
    )  # fmt: skip
