"""Reads whole topics by assignment: no group, so nobody's position moves."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from mini_studio.bus.kafka import quietly
from mini_studio.errors import NotFound, Unavailable
from mini_studio.settings import Kafka

BATCH = 2000
SILENCE_S = 30.0
"""The client waits for ever for a broker that is away; whoever reads a whole topic wants to know."""


async def read_whole(settings: Kafka, topics: Sequence[str]) -> AsyncIterator[list[ConsumerRecord[bytes, bytes]]]:
    """All records from each topic's beginning to its end, in batches, in order within a partition. Raises `NotFound`, `Unavailable`."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.bootstrap,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=settings.fetch_wait_ms,
    )
    try:
        await asyncio.wait_for(consumer.start(), 10)
        partitions = [partition for topic in topics for partition in _partitions(consumer, topic)]
        consumer.assign(partitions)
        deadline = time.monotonic() + SILENCE_S
        while not await at_end(consumer, partitions):
            found = await consumer.getmany(timeout_ms=200, max_records=BATCH)
            if found:
                yield [record for records in found.values() for record in records]
                deadline = time.monotonic() + SILENCE_S
            elif time.monotonic() > deadline:
                raise TimeoutError(f"nothing came for {SILENCE_S:.0f} s")
    except (KafkaError, OSError, TimeoutError) as error:
        raise Unavailable(f"the broker at {settings.bootstrap} is away: {error!r}") from error
    finally:
        await quietly(asyncio.wait_for(consumer.stop(), 5))


async def at_end(consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]) -> bool:
    """Whether everything has been read that the log held at the last fetch."""
    for partition in partitions:
        highwater = consumer.highwater(partition)
        # None until a first fetch has been answered; 0, not None, when that found an empty partition.
        if highwater is None or await consumer.position(partition) < highwater:
            return False
    return True


def _partitions(consumer: AIOKafkaConsumer, topic: str) -> list[Any]:
    numbers = consumer.partitions_for_topic(topic)
    if not numbers:
        raise NotFound(f"the broker has no topic {topic}; `mini-studio journal refill` makes it again")
    return [TopicPartition(topic, number) for number in sorted(numbers)]
