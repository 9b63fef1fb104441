"""Wake-ups: a gateway tells the serving consumers at once that a request waits for what sleeps.

At most once, and only a hint: the load that they read of the gateways says the same at their next look, so a wake-up that is lost
costs a second. Who follows the topic does so from its end, by assignment: every serving process hears of every one.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog
from aiokafka.errors import KafkaError
from pydantic import BaseModel, ConfigDict, ValidationError

from events.topics import Plain
from events.types import DeploymentId, DeploymentName
from mini_studio.bus.connection import unavailable
from mini_studio.bus.kafka import Outgoing, Publisher
from mini_studio.bus.reading import START_S, following
from mini_studio.errors import StudioError
from mini_studio.records.routes import Route
from mini_studio.settings import Kafka

log = structlog.get_logger(__name__)

AGAIN_S = 2.0
"""A deployment is told of at most once in so long."""
STALE_S = 30.0
FETCH_WAIT_MS = 100
"""The embedded broker does not wake a fetch that waits."""


class WakeUp(BaseModel):
    """The value of a wake-up; its key is the deployment's id."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    deployment_id: DeploymentId
    name: DeploymentName
    at: float
    """Unix seconds."""


class WakeUps:
    """Publishes them, apart from the requests that wait."""

    def __init__(self, settings: Kafka) -> None:
        self._publisher = Publisher(settings)
        self._asked: dict[str, Route] = {}
        self._told: dict[str, float] = {}
        self._changed = asyncio.Event()

    def publish(self, route: Route) -> None:
        """Never waits. Call it for every request that waits, and again while it does."""
        now = time.monotonic()
        if now - self._told.get(route.key, -AGAIN_S) >= AGAIN_S:
            self._told = {key: at for key, at in self._told.items() if now - at < AGAIN_S} | {route.key: now}
            self._asked[route.key] = route
            self._changed.set()

    async def run(self) -> None:
        """Send what was asked for, until cancelled."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                routes, self._asked = self._asked.values(), {}
                try:
                    await self._publisher.publish([_record(route) for route in routes])
                except StudioError as error:
                    log.warning("wake_ups.lost", reason=error.message)
                except Exception:
                    log.exception("wake_ups.failed")
        finally:
            await self._publisher.aclose()


def _record(route: Route) -> Outgoing:
    value = WakeUp(deployment_id=route.deployment_id, name=route.name, at=time.time())
    return Outgoing(Plain.WAKEUPS, route.key.encode(), value.model_dump_json().encode(), [])


async def follow(settings: Kafka, woken: Callable[[WakeUp], Awaitable[None]]) -> None:
    """Call `woken` for every wake-up from now on, until cancelled."""
    while True:
        try:
            await _follow(settings, woken)
        except (KafkaError, OSError, TimeoutError) as error:
            log.warning("wake_ups.waiting", reason=(await unavailable(settings, error)).message)
        except Exception:
            log.exception("wake_ups.failed")
        await asyncio.sleep(1)


async def _follow(settings: Kafka, woken: Callable[[WakeUp], Awaitable[None]]) -> None:
    wait_ms = min(settings.fetch_wait_ms, FETCH_WAIT_MS)
    async with following(settings, Plain.WAKEUPS, since="latest", fetch_wait_ms=wait_ms) as (consumer, partitions):
        await asyncio.wait_for(consumer.seek_to_end(*partitions), START_S)
        while True:
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for wake_up in map(_wake_up, (record.value for record in records)):
                    if wake_up is not None:
                        await woken(wake_up)


def _wake_up(value: bytes | None) -> WakeUp | None:
    """None: it is none, or of long ago, as what the embedded broker takes for its end may be."""
    try:
        wake_up = WakeUp.model_validate_json(value or b"")
    except ValidationError:
        log.warning("wake_ups.ignored", value=repr(value)[:200])
        return None
    return wake_up if abs(time.time() - wake_up.at) < STALE_S else None
