"""What keeps the log whole beside the handlers: preparing a broker, and the standalone relay."""

import asyncio
import signal

import structlog

from mini_studio.bus.kafka import create_topics
from mini_studio.bus.replay import refill
from mini_studio.health import Health, serve_health
from mini_studio.settings import Settings
from mini_studio.wiring import COLLECTIONS, broker_epoch_file, open_studio

log = structlog.get_logger(__name__)


async def prepare(settings: Settings) -> None:
    """Topics, bucket, and (embedded) the journal's events; then the broker counts as a new one."""
    async with open_studio(settings) as studio:
        await create_topics(settings.kafka)
        await studio.prepare_buckets()
        if settings.kafka.refill:
            count = await refill(studio.store, studio.publisher, studio.routes)
            epoch = broker_epoch_file(settings)
            epoch.parent.mkdir(parents=True, exist_ok=True)
            epoch.touch()
            log.info("prepare.refilled", events=count)


async def relay(settings: Settings, health_port: int | None) -> None:
    """The standalone relay, until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    health = Health()
    server = serve_health(health, health_port) if health_port is not None else None
    async with open_studio(settings, relayed=COLLECTIONS, sweeper=True) as studio:
        health.checks["relay"] = lambda: studio.relay.problem
        beat = asyncio.create_task(health.beat())
        await stop.wait()
        beat.cancel()
    if server is not None:
        server.shutdown()
