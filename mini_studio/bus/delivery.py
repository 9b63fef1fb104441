"""What happens to a delivery: handled, put off, or dead-lettered. Every subscriber runs NACK_ON_ERROR around these rules.

- A permanent failure (not an event, or an error that is not retryable) goes to `<topic>.<consumer>.dead` byte for byte.
- A retryable one sleeps with backoff and is delivered again: the partition waits, so order is kept.
- Should even the dead-letter publish fail, the delivery is put off too: nothing is lost.

Records come in batches, and a batch is acknowledged as a whole; what was handled of one that is put off comes again, and is a no-op.
What was buried of it comes again too, and is passed over.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NoReturn

import structlog
from aiokafka import ConsumerRecord
from faststream.exceptions import NackMessage
from faststream.kafka import KafkaMessage

from events.registry import UndecodableEvent
from events.topics import dead_letter_topic
from mini_studio.bus.kafka import Outgoing, Publisher
from mini_studio.bus.metrics import DEAD_LETTERS, RETRIES
from mini_studio.errors import StudioError
from mini_studio.records.projection import timestamp

log = structlog.get_logger(__name__)

BACKOFF_MIN_S, BACKOFF_MAX_S = 1.25, 10.0
"""The first with its jitter is a second: nothing that is away is asked more often by one consumer."""
MAX_SURPRISES = 5
"""Deliveries of one record that may end in an unexpected exception before it counts as permanent."""

ORIGIN = ("dlq_consumer", "dlq_reason", "dlq_topic", "dlq_partition", "dlq_offset", "dlq_time")
"""The headers that a dead letter has behind the record's own, in this order."""
REDRIVE = "dlq_redrive"
"""The last header of a record that was put back: the one consumer that it is for."""

Place = tuple[str, int, int]
Handle = Callable[[Any, dict[str, str]], Awaitable[None]]
"""Takes a record and its text headers."""


def place(record: "ConsumerRecord[Any, Any]") -> Place:
    """Topic, partition and offset."""
    return record.topic, record.partition, record.offset


def text_headers(record: "ConsumerRecord[Any, Any]") -> dict[str, str]:
    """The record's headers that are UTF-8 text; FastStream's parser would drop the whole message over any other."""
    readable = {}
    for name, value in record.headers:
        try:
            readable[name] = value.decode()
        except (UnicodeDecodeError, AttributeError):
            continue
    return readable


def last_header(record: "ConsumerRecord[Any, Any]", wanted: str) -> str | None:
    """The text of the record's last header, if that is its name: what was added to a record stands behind its own headers."""
    name, value = record.headers[-1] if record.headers else ("", b"")
    return (value or b"").decode(errors="replace") if name == wanted else None


def redriven_for(record: "ConsumerRecord[Any, Any]") -> str | None:
    """The one consumer that a record which was put back is for; None: it was not, and is for all."""
    return last_header(record, REDRIVE)


def sent_headers(record: "ConsumerRecord[Any, Any]") -> list[tuple[str, bytes]]:
    """The record's headers as it was first sent, without the one that putting it back added."""
    headers = list(record.headers)
    return headers if redriven_for(record) is None else headers[:-1]


async def parse(records: Any, original: Callable[[Any], Awaitable[KafkaMessage]]) -> KafkaMessage:
    """FastStream's batch parser without headers, which it would stumble over; `raw_message` keeps the records as they came.

    It is shown the first and the last record, after which it names the batch: nobody asks it for what is between.
    """
    message = await original(tuple(replace(record, headers=()) for record in (records[0], records[-1])))
    message.raw_message = records
    return message


def bound() -> AbstractContextManager[None]:
    """Around the deliveries of a batch: what they bind to log lines does not outlive it."""
    names = ("consumer", "event_id", "event_type", "subject", "request_id")
    return structlog.contextvars.bound_contextvars(**dict.fromkeys(names))


async def no_decoding(message: KafkaMessage) -> KafkaMessage:
    """Each record is decoded by its own delivery."""
    return message


class Delivery:
    """The rules for one consumer."""

    def __init__(self, consumer: str, publisher: Publisher) -> None:
        self.consumer = consumer
        self.publisher = publisher
        self.failures: dict[Place, int] = {}
        """Failures so far of records that are not acknowledged yet, outages included."""
        self.surprises: dict[Place, int] = {}
        """Those of them that nobody expected: an outage before must not use up what they are allowed."""
        self.buried: set[Place] = set()
        """Records that are dead-lettered and not acknowledged yet."""

    async def deliver(self, record: "ConsumerRecord[Any, Any]", headers: dict[str, str], handle: Handle) -> None:
        """Have one record handled, given with its text headers. Raises `NackMessage` when it is put off."""
        if self.buried and place(record) in self.buried:
            return
        # The next record's replace them, and `bound` takes the last ones back: that is a third of the work.
        structlog.contextvars.bind_contextvars(
            consumer=self.consumer,
            event_id=headers.get("ce_id"),
            event_type=headers.get("ce_type"),
            subject=headers.get("ce_subject"),
            request_id=headers.get("ce_correlationid"),
        )
        try:
            await handle(record, headers)
        except UndecodableEvent as error:
            await self.bury(record, error.reason)
        except StudioError as error:
            if error.retryable:
                await self.put_off(self.count_failure(record), error.message)
            await self.bury(record, error.message)
        except Exception as error:
            log.exception("delivery.failed")
            self.surprises[place(record)] = surprises = self.surprises.get(place(record), 0) + 1
            if surprises < MAX_SURPRISES:
                await self.put_off(self.count_failure(record), repr(error))
            await self.bury(record, f"failed {surprises} times; last: {error!r}")

    def count_failure(self, record: "ConsumerRecord[Any, Any]") -> int:
        self.failures[place(record)] = failures = self.failures.get(place(record), 0) + 1
        return failures

    def forget(self, records: "Sequence[ConsumerRecord[Any, Any]]") -> None:
        """The batch is through: nothing of it is delivered again."""
        for record in records if self.failures or self.buried else ():
            self.failures.pop(place(record), None)
            self.surprises.pop(place(record), None)
            self.buried.discard(place(record))

    async def put_off(self, failures: int, reason: str) -> NoReturn:
        doublings = min(failures - 1, 10)  # a long outage must not count up to a number that no float holds
        delay = min(BACKOFF_MIN_S * 2**doublings, BACKOFF_MAX_S) * random.uniform(0.8, 1.2)
        RETRIES.labels(self.consumer).inc()
        log.warning("delivery.put_off", reason=reason, failures=failures, delay_s=round(delay, 2))
        await asyncio.sleep(delay)
        raise NackMessage

    async def dead_letter(self, record: "ConsumerRecord[Any, Any]", reason: str) -> None:
        """Copy the record as it is, with where it came from and why in added headers."""
        place_and_time = (record.topic, str(record.partition), str(record.offset), timestamp(datetime.now(UTC)))
        said = (self.consumer, reason[:1000], *place_and_time)
        # A reason may quote the record, and so hold what UTF-8 has no bytes for.
        origin = [(name, text.encode(errors="replace")) for name, text in zip(ORIGIN, said, strict=True)]
        topic = dead_letter_topic(record.topic, self.consumer)
        await self.publisher.publish([Outgoing(topic, record.key, record.value, [*sent_headers(record), *origin])])
        DEAD_LETTERS.labels(self.consumer, record.topic).inc()
        log.error("delivery.dead_lettered", topic=topic, reason=reason, offset=record.offset)

    async def bury(self, record: "ConsumerRecord[Any, Any]", reason: str) -> None:
        """Dead-letter the record, or put it off when even that cannot be done."""
        try:
            await self.dead_letter(record, reason)
        except Exception as error:
            # Without the wait of a put-off, the record would come back in a busy loop.
            await self.put_off(self.count_failure(record), f"cannot be dead-lettered: {error!r}")
        self.buried.add(place(record))
