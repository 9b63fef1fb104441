"""What the consumers could never handle: look at it, and put it back once its cause is gone.

The dead-letter topics are the store, and nothing in them is ever changed. A redrive publishes the record as it was first sent
to where it came from, with a header that names the one consumer which failed on it, and then appends a marker to the
dead-letter topic. A crash between the two makes a duplicate, never a loss. A record that fails again is a new dead letter.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import structlog
from aiokafka import ConsumerRecord

from events.topics import dead_letter_topic
from mini_studio.bus.delivery import ORIGIN, REDRIVE, last_header
from mini_studio.bus.kafka import READERS, Outgoing, Publisher
from mini_studio.bus.reading import read_whole
from mini_studio.errors import Conflict, NotFound
from mini_studio.records.projection import timestamp
from mini_studio.settings import Kafka

log = structlog.get_logger(__name__)

MARKER = "dlq_redriven"
"""The last header of a marker: the id of the dead letter that was put back. A dead letter's own last header is of `ORIGIN`."""
ANSWER_S = 1.5
"""Silence of the broker after which it counts as away: whoever asks gets an answer within two seconds."""
READ_AT_ONCE = 200
"""Records read, and so put back, at once: few enough to be acknowledged within the publish timeout."""

State = Literal["open", "redriven", "all"]
Header = tuple[str, bytes | None]


@dataclass(frozen=True)
class DeadLetter:
    """One record that a consumer could not handle, as it was first sent, with why and where it came from."""

    id: str
    """Consumer, topic, and the partition and offset on the dead-letter topic."""
    consumer: str
    reason: str
    topic: str
    partition: int
    offset: int
    time: str
    """RFC 3339: when it was put aside."""
    key: bytes | None
    value: bytes | None
    """None in lists, too: `size` says how long it is."""
    size: int
    headers: Sequence[Header]
    redriven: bool = False

    def header(self, name: str) -> str | None:
        """The text of a header; None when it is missing or not text."""
        value = dict(self.headers).get(name)
        try:
            return None if value is None else value.decode()
        except UnicodeDecodeError:
            return None

    def put_back(self) -> Outgoing:
        """The record as it was first sent, to where it was, for the consumer that failed on it alone."""
        headers: Any = [*self.headers, (REDRIVE, self.consumer.encode())]
        return Outgoing(self.topic, self.key, self.value, headers, self.partition)

    def marker(self) -> Outgoing:
        """What says on the dead-letter topic that the record was put back."""
        headers = [("dlq_time", timestamp(datetime.now(UTC)).encode()), (MARKER, self.id.encode())]
        return Outgoing(dead_letter_topic(self.topic, self.consumer), self.id.encode(), None, headers)


def read(consumer: str, record: "ConsumerRecord[Any, Any]") -> DeadLetter | None:
    """The dead letter in a record of the consumer's dead-letter topic; None for a marker, or what is neither."""
    added = record.headers[-len(ORIGIN) :]
    if tuple(name for name, _ in added) != ORIGIN:
        return None
    origin = {name: (value or b"").decode(errors="replace") for name, value in added}
    topic, partition, offset = origin["dlq_topic"], origin["dlq_partition"], origin["dlq_offset"]
    if topic not in READERS[consumer] or not (partition.isdecimal() and offset.isdecimal()):
        return None
    return DeadLetter(
        id=f"{consumer}.{topic.rpartition('.')[2]}.{record.partition}.{record.offset}",
        consumer=consumer,
        reason=origin["dlq_reason"],
        topic=topic,
        partition=int(partition),
        offset=int(offset),
        time=origin["dlq_time"],
        key=record.key,
        value=record.value,
        size=len(record.value or b""),
        headers=record.headers[: -len(ORIGIN)],
    )


def marked(record: "ConsumerRecord[Any, Any]") -> str | None:
    """The id of the dead letter that this marker says was put back; None for what is no marker."""
    return last_header(record, MARKER)


class DeadLetters:
    """The dead letters of all consumers. Everything raises `Unavailable` within two seconds when the broker is away."""

    def __init__(self, settings: Kafka, publisher: Publisher) -> None:
        self._settings = settings
        self._publisher = publisher

    async def page(
        self, *, consumer: str | None = None, state: State = "all", limit: int, after: str | None = None
    ) -> list[DeadLetter]:
        """Newest first, from behind `after` on, without values. Raises `NotFound` for a consumer that does not exist."""
        letters = await self._all(consumer)
        if after is not None:
            ids = [letter.id for letter in letters]
            letters = letters[ids.index(after) + 1 :] if after in ids else []
        return [letter for letter in letters if state in ("all", "redriven" if letter.redriven else "open")][:limit]

    async def get(self, id: str) -> DeadLetter:
        """One with its value. Raises `NotFound`."""
        found, redriven = None, False
        consumer = id.partition(".")[0]
        async for records in self._batches(consumer):
            for record in records:
                letter = read(consumer, record)
                found = letter if letter is not None and letter.id == id else found
                redriven = redriven or marked(record) == id
        if found is None:
            raise NotFound(f"there is no dead letter {id[:200]!r}")
        return replace(found, redriven=redriven)

    async def redrive(self, id: str) -> DeadLetter:
        """Put one back. Raises `NotFound`, and `Conflict` when that was done before."""
        letter = await self.get(id)
        if letter.redriven:
            raise Conflict(f"{id} was put back before; if it failed again, it is a newer dead letter")
        await self._put_back([letter])
        return replace(letter, redriven=True)

    async def redrive_all(self, consumer: str) -> int:
        """Put all open ones of a consumer back, those of one key in order; how many. Raises `NotFound`."""
        waiting = {letter.id for letter in await self._all(consumer) if not letter.redriven}
        count = len(waiting)
        async with aclosing(self._batches(consumer)) as batches:
            async for records in batches:
                letters = [letter for r in records if (letter := read(consumer, r)) and letter.id in waiting]
                await self._put_back(letters)
                waiting -= {letter.id for letter in letters}
                if not waiting:
                    break
        return count - len(waiting)

    async def _put_back(self, letters: Sequence[DeadLetter]) -> None:
        await self._publisher.publish([letter.put_back() for letter in letters])
        await self._publisher.publish([letter.marker() for letter in letters])
        for letter in letters:
            log.info("dead_letters.redriven", id=letter.id, consumer=letter.consumer)

    async def _all(self, consumer: str | None) -> list[DeadLetter]:
        """Newest first, without values."""
        found, redriven = [], set()
        for name in [consumer] if consumer is not None else READERS:
            async for records in self._batches(name):
                found += [replace(letter, value=None) for r in records if (letter := read(name, r))]
                redriven |= {id for r in records if (id := marked(r))}
        letters = [replace(letter, redriven=letter.id in redriven) for letter in found]
        return sorted(letters, key=lambda letter: (letter.time, letter.id), reverse=True)

    async def _batches(self, consumer: str) -> AsyncGenerator[list["ConsumerRecord[Any, Any]"]]:
        """All records of the consumer's dead-letter topics. Raises `NotFound` and `Unavailable`."""
        if consumer not in READERS:
            raise NotFound(f"there is no consumer {consumer[:100]!r}; there are {', '.join(READERS)}")
        topics = [dead_letter_topic(topic, consumer) for topic in READERS[consumer]]
        whole = read_whole(self._settings, topics, at_once=READ_AT_ONCE, patience_s=ANSWER_S)
        async with aclosing(whole) as batches:
            async for records in batches:
                yield records
