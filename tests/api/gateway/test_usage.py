"""The gateway's usage log: off the hot path, bounded, sampled without bias, and silent about what was said."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from jsonschema import Draft202012Validator

from api.gateway import usage
from api.gateway.usage import BATCH, DROPPED, MOST, PUBLISHED, UsageLog, Used
from events.topics import Plain
from events.usage import UsageBatch
from mini_studio.bus.kafka import create_topics
from mini_studio.settings import Gateway, Kafka, Settings
from mini_studio.wiring import ended
from tests.fakes.broker import broker_process, free_port, running_broker
from tests.fakes.log import read_all
from tests.fakes.waiting import until


def settings(bootstrap: str, sample: float = 1.0) -> Settings:
    kafka = Kafka(bootstrap=bootstrap, partitions=1, publish_timeout_s=1)
    return Settings(kafka=kafka, gateway=Gateway(usage_sample=sample))


def used(number: int = 0, **fields: Any) -> Used:
    return Used("acme", "m", "dep_x", 7, number, 2, 200, 1.5, 2.5)._replace(**fields)


@contextlib.asynccontextmanager
async def running(log: UsageLog) -> AsyncIterator[None]:
    publishing = asyncio.create_task(log.run())
    try:
        yield
    finally:
        await ended(publishing)
        await log.aclose()


async def batches(bootstrap: str) -> list[UsageBatch]:
    return [UsageBatch.read(record.value) for record in await read_all(bootstrap, Plain.USAGE.value)]


def count(counter: Any) -> int:
    return int(counter._value.get())


async def test_batches_are_numbered_and_no_larger_than_they_may_be() -> None:
    with running_broker() as bootstrap:
        await create_topics(settings(bootstrap).kafka)
        log, before = UsageLog(settings(bootstrap)), count(PUBLISHED)
        async with running(log):
            for number in range(1203):
                log.add(used(number))
            await until(lambda: count(PUBLISHED) == before + 1203)
            log.add(used(1203))
        found = await batches(bootstrap)
    assert [each.sequence for each in found] == [1, 2, 3, 4]
    assert [len(each.records) for each in found] == [BATCH, BATCH, 203, 1], "and the last one at the end"
    assert [record.prompt_tokens for each in found for record in each.records] == list(range(1204))
    assert len({each.gateway for each in found}) == 1


async def test_a_few_wait_for_others_and_an_idle_gateway_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "EVERY_S", 0.05)
    with running_broker() as bootstrap:
        await create_topics(settings(bootstrap).kafka)
        log, before = UsageLog(settings(bootstrap)), count(PUBLISHED)
        async with running(log):
            await asyncio.sleep(0.5)  # ten of its turns
            assert await batches(bootstrap) == []
            log.add(used())
            log.add(used())
            await until(lambda: count(PUBLISHED) == before + 2)
        assert len(await batches(bootstrap)) == 1


async def test_a_record_has_what_was_used_and_nothing_that_a_caller_wrote() -> None:
    with running_broker() as bootstrap:
        await create_topics(settings(bootstrap).kafka)
        async with running(log := UsageLog(settings(bootstrap))):
            log.add(used(3, completion_tokens=None, first_byte_ms=None, status=499))
            log.add(used(model="tell me a secret", deployment_id="", revision=0, client_code="", status=404))
        (record,) = await read_all(bootstrap, Plain.USAGE.value)
    value = orjson.loads(record.value)
    assert record.key == value["gateway"].encode()
    first, second = value["records"]
    assert first == {
        "client_code": "acme", "model": "m", "deployment_id": "dep_x", "revision": 7, "prompt_tokens": 3,
        "status": 499, "total_ms": 2.5,
    }  # fmt: skip
    assert second == {"prompt_tokens": 0, "completion_tokens": 2, "status": 404, "total_ms": 2.5, "first_byte_ms": 1.5}
    Draft202012Validator(UsageBatch.model_json_schema()).validate(value)


async def test_a_sample_stands_for_all() -> None:
    random.seed(6)
    with running_broker() as bootstrap:
        await create_topics(settings(bootstrap).kafka)
        async with running(log := UsageLog(settings(bootstrap, 0.25))):
            for number in range(20_000):
                log.add(used(number % 100))
        records = [record for each in await batches(bootstrap) for record in each.records]
    assert {record.weight for record in records} == {4.0}
    # the standard deviation of the count is 61, scaled up 245
    assert abs(sum(record.weight for record in records) - 20_000) < 1_500
    tokens = sum(record.weight * (record.prompt_tokens or 0) for record in records)
    assert abs(tokens - 20_000 * 49.5) < 100_000


async def test_with_a_sample_of_nothing_nothing_is_kept() -> None:
    log = UsageLog(settings("127.0.0.1:1", 0.0))
    for _ in range(1000):
        log.add(used())
    assert log._waiting == []


async def test_what_waits_is_bounded_and_what_is_too_much_is_counted() -> None:
    log, before = UsageLog(settings(f"127.0.0.1:{free_port()}")), count(DROPPED)
    for number in range(MOST + 10):
        log.add(used(number))
    assert len(log._waiting) == MOST
    assert log._waiting[0].prompt_tokens == 0, "those that came first"
    await log.aclose()
    assert count(DROPPED) == before + MOST + 10


async def test_while_the_broker_is_away_what_is_old_is_dropped_and_what_is_new_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(usage, "EVERY_S", 0.05)
    monkeypatch.setattr(usage, "AWAY_S", 3.0)
    port = free_port()
    log = UsageLog(settings(f"127.0.0.1:{port}"))
    dropped, published = count(DROPPED), count(PUBLISHED)
    async with running(log):
        for number in range(BATCH + 100):
            log.add(used(number))
        await until(lambda: count(DROPPED) == dropped + BATCH + 100)
        assert count(PUBLISHED) == published
        with broker_process(port) as (bootstrap, _):
            await create_topics(settings(bootstrap).kafka)
            log.add(used(9))
            await until(lambda: count(PUBLISHED) == published + 1)
            (only,) = await batches(bootstrap)
            assert [record.prompt_tokens for record in only.records] == [9]
            assert only.sequence > 1, "what was dropped left a gap"


async def test_a_batch_in_hand_at_the_end_is_published_once_more_under_its_number() -> None:
    """The broker may have it already: the number says so."""
    with running_broker() as bootstrap:
        await create_topics(settings(bootstrap).kafka)
        log = UsageLog(settings(bootstrap))
        publish, published = log._feed.publish, asyncio.Event()

        async def unheard(batch: Any, limit_s: float) -> bool:
            await publish(batch, limit_s)
            published.set()
            return await asyncio.Future()

        log._feed.publish = unheard  # type: ignore[method-assign]
        publishing = asyncio.create_task(log.run())
        log.add(used(1))
        await published.wait()
        log.add(used(2))
        await ended(publishing)
        log._feed.publish = publish  # type: ignore[method-assign]
        await log.aclose()
        found = [(each.sequence, [r.prompt_tokens for r in each.records]) for each in await batches(bootstrap)]
    assert found == [(1, [1]), (1, [1]), (2, [2])]


async def test_the_end_waits_two_seconds_for_a_broker_that_is_away() -> None:
    log, before = UsageLog(settings(f"127.0.0.1:{free_port()}")), count(DROPPED)
    log.add(used())
    async with asyncio.timeout(10):
        await log.aclose()
    assert count(DROPPED) == before + 1


async def test_the_log_outlives_what_nobody_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "EVERY_S", 0.05)
    with running_broker() as bootstrap:
        await create_topics(settings(bootstrap).kafka)
        log, dropped, published = UsageLog(settings(bootstrap)), count(DROPPED), count(PUBLISHED)
        async with running(log):
            log.add(None)  # type: ignore[arg-type]
            await until(lambda: log._waiting == [])
            log.add(used())
            await until(lambda: count(PUBLISHED) == published + 1)
        assert count(DROPPED) == dropped + 1
