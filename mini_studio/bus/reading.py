"""Reads topics by assignment, whole or as they grow: no group, so nobody's position moves."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Literal

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError

from mini_studio.bus.connection import client_options, unavailable
from mini_studio.bus.kafka import let_go
from mini_studio.errors import NotFound
from mini_studio.settings import Kafka

AT_ONCE = 2000
REQUEST_S = 10
PATIENCE_S = 30.0
"""The client waits for ever for a broker that is away; whoever reads a whole topic wants to know."""
FETCH_WAIT_MS = 20
STOP_S = 0.2
START_S = 5.0


async def read_whole(
    settings: Kafka, topics: Sequence[str], *, at_once: int = AT_ONCE, patience_s: float = PATIENCE_S
) -> AsyncGenerator[list[ConsumerRecord[bytes, bytes]]]:
    """All records from each topic's beginning to its end, in order within a partition. Raises `NotFound`, `Unavailable`."""
    # Topics given here are all assigned when there is no group; a broker need not tell of partitions nobody asked for.
    consumer = AIOKafkaConsumer(
        *topics,
        **client_options(settings),
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=FETCH_WAIT_MS,
        request_timeout_ms=REQUEST_S * 1000,
    )
    try:
        await asyncio.wait_for(consumer.start(), patience_s)
        partitions = sorted(consumer.assignment())
        deadline = time.monotonic() + patience_s
        while not await at_end(consumer, partitions):
            found = await consumer.getmany(timeout_ms=100, max_records=at_once)
            if found:
                yield [record for records in found.values() for record in records]
                deadline = time.monotonic() + patience_s
            elif time.monotonic() > deadline:
                raise TimeoutError(f"nothing came for {patience_s:g} s")
    except UnknownTopicOrPartitionError as error:
        raise NotFound("the broker lacks a topic; `mini-studio journal refill` makes it again") from error
    except (KafkaError, OSError, TimeoutError) as error:
        raise await unavailable(settings, error) from error
    finally:
        await let_go(consumer.stop(), STOP_S)


@contextlib.asynccontextmanager
async def following(
    settings: Kafka, topic: str, *, since: Literal["earliest", "latest"], fetch_wait_ms: int
) -> AsyncIterator[tuple[AIOKafkaConsumer, list[TopicPartition]]]:
    """A consumer that has all of the topic's partitions. Raises `KafkaError`, `OSError`, `TimeoutError`."""
    consumer = AIOKafkaConsumer(
        **client_options(settings),
        auto_offset_reset=since,
        enable_auto_commit=False,
        fetch_max_wait_ms=fetch_wait_ms,
    )
    try:
        await asyncio.wait_for(consumer.start(), START_S)
        partitions = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or {0})]
        consumer.assign(partitions)
        yield consumer, partitions
    finally:
        await let_go(_leave(consumer))


async def _leave(consumer: AIOKafkaConsumer) -> None:
    """Stop it. The stop alone stumbles over a fetch that waits to be tried again, and leaves the client open."""
    if consumer.assignment():
        consumer.unsubscribe()
        await asyncio.sleep(0.1)
    await consumer.stop()


async def at_end(consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]) -> bool:
    """Whether everything has been read that the log held at the last fetch."""
    for partition in partitions:
        highwater = consumer.highwater(partition)
        # None until a first fetch has been answered; 0, not None, when that found an empty partition.
        if highwater is None or await consumer.position(partition) < highwater:
            return False
    return True
