"""What keeps the log whole beside the handlers: preparing a broker, and the standalone relay."""

import asyncio
import signal
from collections.abc import Callable

import structlog

from mini_studio.bus.kafka import create_topics
from mini_studio.bus.replay import Refilled, refill
from mini_studio.health import Health, serve_health
from mini_studio.settings import Settings
from mini_studio.wiring import COLLECTIONS, broker_epoch_file, open_studio

log = structlog.get_logger(__name__)


async def prepare(settings: Settings) -> None:
    """Indexes, topics, bucket, and (embedded) the journal's events; then the broker counts as a new one."""
    async with open_studio(settings) as studio:
        await studio.store.prepare()
        await studio.prepare_buckets()
        if not settings.kafka.refill:
            await create_topics(settings.kafka)
        else:
            done = await refill(settings.kafka, studio.store, studio.publisher, progress=told)
            epoch = broker_epoch_file(settings)
            epoch.parent.mkdir(parents=True, exist_ok=True)
            epoch.touch()
            log.info("prepare.refilled", published=done.published, held=done.held)


async def refill_topics(settings: Settings, progress: Callable[[Refilled], None]) -> Refilled:
    """What the topics lack of the journal and of the routes, on any broker."""
    async with open_studio(settings) as studio:
        return await refill(settings.kafka, studio.store, studio.publisher, progress)


def told(done: Refilled) -> None:
    log.info("refill.progress", published=done.published, held=done.held)


async def relay(settings: Settings, health_port: int | None) -> None:
    """The standalone relay, until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    health = Health()
    server = serve_health(health, health_port, settings.health_host) if health_port is not None else None
    async with open_studio(settings, relayed=COLLECTIONS, sweeper=True) as studio:
        health.checks["relay"] = lambda: studio.relay.problem
        beat = asyncio.create_task(health.beat())
        await stop.wait()
        beat.cancel()
    if server is not None:
        server.shutdown()
