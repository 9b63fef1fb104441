"""Reads and writes a log as any Kafka client does, without the studio's own code."""

import asyncio
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

Headers = list[tuple[str, Any]]


async def read_all(bootstrap: str, topic: str) -> list[Any]:
    """Every record of a topic, partition by partition; no group, nobody's position moves."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=20,
    )
    await consumer.start()
    partitions = sorted(consumer.assignment())
    records: dict[TopicPartition, list[Any]] = {partition: [] for partition in partitions}
    async with asyncio.timeout(60):
        while not await _at_end(consumer, partitions):
            for partition, batch in (await consumer.getmany(timeout_ms=500)).items():
                records[partition] += batch
    await consumer.stop()
    return [record for partition in partitions for record in records[partition]]


async def _at_end(consumer: AIOKafkaConsumer, partitions: list[TopicPartition]) -> bool:
    """Whether all was read that there was at the last fetch; the embedded broker's end offsets are not to be trusted."""
    for partition in partitions:
        end = consumer.highwater(partition)
        if end is None or await consumer.position(partition) < end:
            return False
    return True


async def write(
    bootstrap: str, topic: str, values: list[tuple[bytes | None, Headers]], *, key: bytes, partition: int | None = None
) -> None:
    """Put records on the log as they are."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await producer.start()
    for value, headers in values:
        await producer.send_and_wait(topic, key=key, value=value, headers=headers, partition=partition)
    await producer.stop()


async def write_nulls(bootstrap: str, topic: str, headers: Headers) -> None:
    """Put a record without key and value on the log: other clients may, this one does so only in a batch of its own."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await producer.start()
    batch = producer.create_batch()
    batch.append(key=None, value=None, timestamp=None, headers=headers)
    batch.close()
    await (await producer.send_batch(batch, topic, partition=0))
    await producer.stop()
