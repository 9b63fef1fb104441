"""Reads and writes a log as any Kafka client does, without the studio's own code."""

from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

Headers = list[tuple[str, Any]]


async def read_all(bootstrap: str, topic: str) -> list[Any]:
    """Every record of a topic, partition by partition; no group, nobody's position moves."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False, fetch_max_wait_ms=20
    )
    await consumer.start()
    consumer.assign([TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or {0})])
    records: list[Any] = []
    silent = 0
    while silent < 3:
        batches = await consumer.getmany(timeout_ms=500)
        silent = 0 if batches else silent + 1
        for batch in batches.values():
            records += batch
    await consumer.stop()
    return records


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
