"""A gateway's way to topic `mini-studio.usage`."""

import asyncio
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

from events.topics import Plain
from events.usage import TYPE
from mini_studio.bus.kafka import Outgoing, Publisher
from mini_studio.errors import Unavailable
from mini_studio.records.projection import timestamp
from mini_studio.settings import Kafka

log = structlog.get_logger(__name__)

RETRY_S = 1.0


class UsageFeed:
    """Publishes batches, numbered, under a random id of this process."""

    def __init__(self, settings: Kafka) -> None:
        self.gateway = secrets.token_hex(8)
        self._publisher = Publisher(settings)
        self._sequence = 0
        self._away = False

    def batch(self, records: Sequence[dict[str, Any]]) -> Outgoing:
        """The next one, closed now. Published twice it counts once: by its sequence."""
        self._sequence += 1
        value = {
            "type": TYPE,
            "gateway": self.gateway,
            "sequence": self._sequence,
            "at": timestamp(datetime.now(UTC)),
            "records": records,
        }
        headers = [("content-type", b"application/json")]
        return Outgoing(Plain.USAGE.value, self.gateway.encode(), orjson.dumps(value), headers)

    async def publish(self, batch: Outgoing, limit_s: float) -> bool:
        """Publish a batch, again while the broker is away, for so long at most; says whether the broker has it."""
        try:
            async with asyncio.timeout(limit_s):
                while not await self._published(batch):
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            return False
        return True

    async def aclose(self) -> None:
        await self._publisher.aclose()

    async def _published(self, batch: Outgoing) -> bool:
        try:
            await self._publisher.publish([batch])
        except Unavailable as error:
            if not self._away:
                log.warning("usage.waiting", reason=error.message)
            self._away = True
            return False
        if self._away:
            log.info("usage.recovered")
        self._away = False
        return True
