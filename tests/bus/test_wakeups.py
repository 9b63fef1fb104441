"""Wake-ups over a real broker: they come from now on, and nobody waits for a broker that is away."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from events.topics import Plain
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.bus.kafka import Outgoing, Publisher, create_topics
from mini_studio.bus.wakeups import WakeUp, WakeUps, follow
from mini_studio.records.routes import Route
from mini_studio.settings import Kafka
from mini_studio.wiring import ended
from tests.fakes.broker import free_port
from tests.fakes.waiting import until


def route(number: int) -> Route:
    return Route(
        deployment_id=f"dep_{number:024}", name=f"base-{number}", client_code="", kind=DeploymentKind.BASE, model="m",
        base_model="m", status=DeploymentStatus.READY, replicas=0, requested_at="", revision=1,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def following(settings: Kafka) -> AsyncIterator[list[str]]:
    heard: list[str] = []

    async def woken(wake_up: WakeUp) -> None:
        heard.append(wake_up.name)

    task = asyncio.create_task(follow(settings, woken))
    yield heard
    await ended(task)


@contextlib.asynccontextmanager
async def telling(settings: Kafka) -> AsyncIterator[WakeUps]:
    wake_ups = WakeUps(settings)
    task = asyncio.create_task(wake_ups.run())
    yield wake_ups
    await ended(task)


async def test_every_follower_hears_of_what_comes_and_of_nothing_old(bootstrap: str) -> None:
    settings = Kafka(bootstrap=bootstrap, fetch_wait_ms=20)
    await create_topics(settings)
    async with telling(settings) as wake_ups, Publisher(settings) as publisher:
        old = WakeUp(deployment_id=route(9).key, name="old", at=time.time() - 3600).model_dump_json().encode()
        await publisher.publish([Outgoing(Plain.WAKEUPS, b"old", old, [])] * 3)
        async with following(settings) as one, following(settings) as two:
            number = 0
            while not (one and two):  # they have begun to listen
                number += 1
                wake_ups.publish(route(number))
                await asyncio.sleep(0.1)
            await publisher.publish([Outgoing(Plain.WAKEUPS, None, value, []) for value in (None, b"{", b"{}")])
            wake_ups.publish(route(number + 1))
            for heard in (one, two):
                await until(lambda heard=heard: heard[-1] == f"base-{number + 1}")  # type: ignore[misc]
                assert "old" not in heard
                assert len(heard) == len(set(heard))


async def test_many_that_wait_for_one_deployment_are_one_wake_up(bootstrap: str) -> None:
    settings = Kafka(bootstrap=bootstrap, fetch_wait_ms=20)
    await create_topics(settings)
    async with telling(settings) as wake_ups, following(settings) as heard:
        number = 0
        while not heard:
            number += 1
            wake_ups.publish(route(number))
            await asyncio.sleep(0.1)
        for _ in range(100):
            wake_ups.publish(route(0))
        wake_ups.publish(route(number + 1))
        await until(lambda: f"base-{number + 1}" in heard)
        assert heard.count("base-0") == 1


async def test_a_broker_that_is_away_costs_the_wake_up_and_nothing_else(bootstrap: str) -> None:
    settings = Kafka(bootstrap=f"127.0.0.1:{free_port()}", publish_timeout_s=0.2)
    async with telling(settings) as wake_ups:
        wake_ups.publish(route(1))
        await until(lambda: not wake_ups._asked)
        await asyncio.sleep(0.5)
        wake_ups.publish(route(2))
        await until(lambda: not wake_ups._asked)
