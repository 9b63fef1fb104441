"""Reads and writes a log as any Kafka client does, without the studio's own code."""

import asyncio
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

READ_S = 60.0
Headers = list[tuple[str, Any]]


async def read_all(bootstrap: str, topic: str) -> list[Any]:
    """Every record of a topic, partition by partition; no group, nobody's position moves."""
    # A real broker tells only of the partitions of topics that are asked for here; without a group all are assigned.
    consumer = AIOKafkaConsumer(
        topic,  # without a group it gets all partitions; by `assign` only those that it happens to know of
        bootstrap_servers=bootstrap,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=20,
    )
    await consumer.start()
    records: dict[int, list[Any]] = {p.partition: [] for p in consumer.assignment()}
    left = set(consumer.assignment())
    async with asyncio.timeout(READ_S):
        while left:
            for partition, batch in (await consumer.getmany(timeout_ms=100)).items():
                records[partition.partition] += batch
            # not `end_offsets`, which is wrong on the embedded broker
            left = {p for p in left if (end := consumer.highwater(p)) is None or await consumer.position(p) < end}
    await consumer.stop()
    return [record for partition in sorted(records) for record in records[partition]]


async def write(
    bootstrap: str, topic: str, values: list[tuple[bytes | None, Headers]], *, key: bytes, partition: int | None = None
) -> None:
    """Put records on the log as they are."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await producer.start()
    for value, headers in values:
        await producer.send_and_wait(topic, key=key, value=value, headers=headers, partition=partition)
    await producer.stop()


async def write_nulls(bootstrap: str, topic: str, headers: Headers) -> int:
    """Put a record without key and value on partition 0: other clients may, this one does so only in a batch of its own. Its offset."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await producer.start()
    batch = producer.create_batch()
    batch.append(key=None, value=None, timestamp=None, headers=headers)
    batch.close()
    put = await (await producer.send_batch(batch, topic, partition=0))
    await producer.stop()
    return int(put.offset)
