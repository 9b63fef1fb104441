"""How far a consumer is behind, and whether it moves: a ping sees only the admin client, a dead consumer still pings."""

import asyncio
import time

from faststream.kafka import KafkaBroker

from mini_studio.bus.metrics import LAG

STUCK_AFTER_S = 60.0


class LagMeter:
    """Reads positions of the broker's subscribers every few seconds."""

    def __init__(self, consumer: str, broker: KafkaBroker, every_s: float = 5.0) -> None:
        self._consumer = consumer
        self._broker = broker
        self._every_s = every_s
        self._moved = time.monotonic()
        self._seen: dict[tuple[str, int], int] = {}
        self._lag = 0

    def problem(self) -> str | None:
        """Why the consumer does not look well; None when it does."""
        silent = time.monotonic() - self._moved
        if self._lag and silent > STUCK_AFTER_S:
            return f"{self._lag} records behind and none handled for {silent:.0f} s"
        return None

    async def run(self) -> None:
        while True:
            await self.measure()
            await asyncio.sleep(self._every_s)

    async def measure(self) -> None:
        total, seen = 0, {}
        for subscriber in self._broker.subscribers:
            consumer = getattr(subscriber, "consumer", None)
            if consumer is None:
                continue
            for partition in consumer.assignment():
                end = consumer.highwater(partition)
                if end is None:  # nothing was fetched yet
                    continue
                position = await consumer.position(partition)
                lag = max(0, end - position)
                LAG.labels(self._consumer, partition.topic, partition.partition).set(lag)
                seen[(partition.topic, partition.partition)] = position
                total += lag
        if seen != self._seen or not total:
            self._moved = time.monotonic()
        self._seen, self._lag = seen, total
