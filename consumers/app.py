"""Runs consumers: any one alone, or several in one process, each with its own group."""

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from typing import Any

import structlog
from faststream.kafka import KafkaBroker

from consumers import datasets, jobs, routes, serving, training, usage
from mini_studio.bus.consumer import Consumer, start_broker
from mini_studio.bus.liveness import Liveness
from mini_studio.health import Health, serve_health
from mini_studio.settings import Settings
from mini_studio.wiring import DECIDED_BY, Studio, open_studio

log = structlog.get_logger(__name__)

CONSUMERS: dict[str, Consumer] = {
    module.consumer.name: module.consumer for module in (datasets, training, serving, jobs, routes, usage)
}


class BrokerReplaced(Exception):
    """The embedded broker was replaced by an empty one: positions in the old log mean nothing in the new one."""


async def run(names: Sequence[str], settings: Settings, health_port: int | None) -> None:
    """Run consumers until SIGTERM or SIGINT. Raises `BrokerReplaced`: the supervisor starts the process again."""
    health = Health()
    health.starting |= set(names)
    server = serve_health(health, health_port, settings.health_host) if health_port is not None else None
    relayed = [collection for name in names for collection in DECIDED_BY[name]]
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with open_studio(settings, relayed=relayed) as studio:
        health.checks["relay"] = lambda: studio.relay.problem
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(run_one(CONSUMERS[name], studio, health, stop)) for name in names
        ]
        tasks.append(asyncio.create_task(health.beat()))
        tasks.append(asyncio.create_task(watch_broker(studio)))
        stopping: asyncio.Task[Any] = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        for task in tasks[len(names) :]:
            task.cancel()
        await asyncio.wait(tasks, timeout=13)
        for task in done - {stopping}:
            task.result()
    if server is not None:
        server.shutdown()


async def run_one(consumer: Consumer, studio: Studio, health: Health, stop: asyncio.Event) -> None:
    """One consumer: its subscribers and its services."""
    broker = consumer.broker(studio.settings.kafka, studio.publisher, studio)
    liveness = Liveness(consumer, broker, studio.settings.kafka)
    health.checks[f"consumer {consumer.name}"] = liveness.problem
    health.vital[f"consumer {consumer.name}"] = liveness.lost
    stopping: asyncio.Task[Any] = asyncio.create_task(stop.wait())
    tasks = [stopping, *(asyncio.create_task(service(studio)) for service in consumer.services)]
    starting = asyncio.create_task(start_broker(broker, studio.settings.kafka))
    try:
        await asyncio.wait([starting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            log.info("consumer.started", consumer=consumer.name)
            health.starting.discard(consumer.name)
            tasks.append(asyncio.create_task(liveness.run()))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (starting, *tasks):
            task.cancel()
        await stop_broker(broker)
        for ended in await asyncio.gather(starting, *tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                log.error("consumer.broke", consumer=consumer.name, exc_info=ended)


async def stop_broker(broker: KafkaBroker) -> None:
    with contextlib.suppress(TimeoutError, Exception):
        await asyncio.wait_for(broker.stop(), 12)


async def watch_broker(studio: Studio) -> None:
    """End the process when the embedded broker was replaced."""
    epoch = studio.broker_epoch()
    while studio.broker_epoch() == epoch:
        await asyncio.sleep(1)
    raise BrokerReplaced
