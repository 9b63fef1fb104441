"""Kafka clients with the settings that lose nothing; topics and producers are made here and nowhere else."""

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Self

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from events.topics import ROUTES, Plain, Topic, dead_letter_topic
from mini_studio.bus.connection import client_options, unavailable
from mini_studio.errors import Unavailable
from mini_studio.settings import MIB, Kafka

log = structlog.get_logger(__name__)

TOPIC_EXISTS = 36
MAX_RECORD_BYTES, MAX_DEAD_LETTER_BYTES = 2 * MIB, 3 * MIB
"""Largest record of a topic: whatever an event topic took has room in its dead-letter topics, with why it is there."""
MAX_SENT_BYTES = 64 * MIB
"""The topics set the limit, not the client: the embedded broker takes any size, and what it took has to be put aside as well."""
USAGE_RETENTION_MS = 7 * 24 * 3600 * 1000
"""How long the topic of usage keeps its batches: time for its consumer, and other subscribers, to be away."""
HINT_MS = 3_600_000
"""How long a topic of hints keeps them: nobody reads it but for its end."""
READERS: dict[str, tuple[Topic | Plain, ...]] = {
    "datasets": (Topic.DATASETS,),
    "training": (Topic.FINE_TUNES,),
    "serving": (Topic.DEPLOYMENTS,),
    "jobs": (Topic.FINE_TUNES,),
    "routes": (Topic.DEPLOYMENTS,),
    "usage": (Plain.USAGE,),
}
"""Which consumer reads which topics."""


def all_topics() -> list[str]:
    """Every topic the studio uses: events, usage, wake-ups, routes, and each consumer's dead letters."""
    dead = [dead_letter_topic(topic, name) for name, topics in READERS.items() for topic in topics]
    return [*(topic.value for topic in (*Topic, *Plain)), ROUTES, *dead]


async def create_topics(settings: Kafka) -> list[str]:
    """Create the topics that are missing; says which. Raises `Unavailable`."""
    admin = AIOKafkaAdminClient(**client_options(settings), request_timeout_ms=5000)
    try:
        await asyncio.wait_for(admin.start(), 10)
        existing = set(await admin.list_topics())
        missing = [name for name in all_topics() if name not in existing]
        if missing:
            answer = await admin.create_topics([_new_topic(name, settings) for name in missing])
            refused = [error for error in answer.topic_errors if error[1] not in (0, TOPIC_EXISTS)]
            if refused:
                raise Unavailable(f"the broker refused to create topics: {refused}")
        return missing
    except (KafkaError, OSError, TimeoutError) as error:
        raise await unavailable(settings, error) from error
    finally:
        await let_go(admin.close())


def _new_topic(name: str, settings: Kafka) -> NewTopic:
    kept_ms = {Plain.USAGE.value: USAGE_RETENTION_MS, Plain.WAKEUPS.value: HINT_MS}
    retention_ms = kept_ms.get(name, settings.retention_ms)
    configs = {"cleanup.policy": "compact"} if name == ROUTES else {"retention.ms": str(retention_ms)}
    # A write is acknowledged by all replicas but one at least: one may be away, and none that answers lacks it.
    configs["min.insync.replicas"] = str(max(1, settings.replication - 1))
    configs["max.message.bytes"] = str(MAX_DEAD_LETTER_BYTES if name.endswith(".dead") else MAX_RECORD_BYTES)
    partitions = 1 if name in (ROUTES, Plain.WAKEUPS) else settings.partitions
    return NewTopic(name, partitions, settings.replication, topic_configs=configs)


@dataclass(frozen=True)
class Outgoing:
    """One record to publish."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    partition: int | None = None
    """None: the key says which."""


class Publisher:
    """Publishes with `acks=all` and a timeout. After a timeout the outcome is unknown, and the client is replaced."""

    def __init__(self, settings: Kafka) -> None:
        self._settings = settings
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()

    async def publish(self, records: Sequence[Outgoing]) -> None:
        """Publish in the order given and wait for every ack. Raises `Unavailable`: some may have been published."""
        try:
            async with asyncio.timeout(self._settings.publish_timeout_s):
                producer = await self._started()
                acks = [await _send(producer, record) for record in records]
                await asyncio.gather(*acks)
        except (KafkaError, OSError, TimeoutError) as error:
            await self._drop()
            raise await unavailable(self._settings, error) from error

    async def aclose(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await let_go(producer.stop())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _started(self) -> AIOKafkaProducer:
        async with self._starting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    **client_options(self._settings),
                    acks="all",
                    enable_idempotence=self._settings.idempotent,
                    request_timeout_ms=int(self._settings.publish_timeout_s * 1000),
                    # a full partition in a request or two: a quarter less work than with the default 16 KiB
                    max_batch_size=64 * 1024,
                    max_request_size=MAX_SENT_BYTES,
                )
                try:
                    await producer.start()
                except BaseException:
                    await let_go(producer.stop(), 0)
                    raise
                self._producer = producer
            return self._producer

    async def _drop(self) -> None:
        """Give the wedged client up. It ends when the broker is back and has what was in its buffer, so nobody waits for it."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await let_go(producer.stop(), 0)


async def _send(producer: AIOKafkaProducer, record: Outgoing) -> Any:
    """Hand one record to the client; the future is its ack."""
    headers = list(record.headers)
    if record.key is not None or record.value is not None:
        return await producer.send(
            record.topic, key=record.key, value=record.value, headers=headers, partition=record.partition
        )
    # Kafka takes a null key with a null value; its client only in a batch of its own.
    batch = producer.create_batch()
    batch.append(key=None, value=None, timestamp=None, headers=headers)
    batch.close()
    return await producer.send_batch(batch, record.topic, partition=record.partition or 0)


_LEAVING: set[asyncio.Task[None]] = set()


async def all_left(wait_s: float = 5.0) -> None:
    """Wait for clients that were given up: a process that ends before they do has them complain."""
    if _LEAVING:
        await asyncio.wait(_LEAVING, timeout=wait_s)


async def let_go(closing: Coroutine[Any, Any, None], wait_s: float = 5.0) -> None:
    """Close a client, and wait for it so long at most: on a dead connection some closings never end.

    It runs apart: others end with a cancellation that nobody asked for, and that would end whoever awaited it.
    """
    task = asyncio.create_task(_quietly(closing))
    _LEAVING.add(task)
    task.add_done_callback(_LEAVING.discard)
    await asyncio.wait([task], timeout=wait_s)


async def _quietly(closing: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(Exception):
        await closing
