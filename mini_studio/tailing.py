"""Prints events as any Kafka client sees them."""

import asyncio
import sys
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer

from events.registry import UndecodableEvent, decode
from events.topics import Topic
from mini_studio.bus.connection import client_options
from mini_studio.bus.delivery import text_headers
from mini_studio.bus.reading import at_end
from mini_studio.settings import Settings


async def tail(settings: Settings, *, follow: bool, subject: str | None, as_json: bool) -> None:
    """Every event from the beginning of the log, without a group: nobody's position moves."""
    consumer = AIOKafkaConsumer(
        *(topic.value for topic in Topic),  # without a group all their partitions are assigned
        **client_options(settings.kafka),
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=settings.kafka.fetch_wait_ms,
    )
    await asyncio.wait_for(consumer.start(), 10)
    try:
        partitions = list(consumer.assignment())
        while follow or not await at_end(consumer, partitions):
            batches = await consumer.getmany(timeout_ms=500)
            records = [record for batch in batches.values() for record in batch]
            for record in sorted(records, key=lambda r: r.timestamp):
                line = render(record, subject, as_json)
                if line is not None:
                    sys.stdout.write(line + "\n")
            sys.stdout.flush()
    finally:
        await consumer.stop()


def render(record: Any, subject: str | None, as_json: bool) -> str | None:
    """One record as a line; None when it is not of `subject`."""
    headers = text_headers(record)
    if subject is not None and headers.get("ce_subject") != subject:
        return None
    try:
        envelope = decode(record.key, headers, record.value)
    except UndecodableEvent as error:
        return f"?? {record.topic}/{record.partition}@{record.offset}: {error.reason}"
    if as_json:
        place = {"topic": record.topic, "partition": record.partition, "offset": record.offset}
        return orjson.dumps({**place, **headers, "data": envelope.data.model_dump(mode="json")}).decode()
    data = {k: v for k, v in envelope.data.model_dump(mode="json", exclude_none=True).items() if v != envelope.subject}
    time = envelope.time.astimezone().strftime("%H:%M:%S.%f")[:-3]
    return f"{time} {envelope.type:32} {envelope.subject} #{envelope.sequence} {orjson.dumps(data).decode()[:160]}"
