"""What must hold in a world in which lives ended, beside what tests/faults/checker.py says of every studio."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

from events.topics import Topic, dead_letter_topic
from mini_studio.bus.dead_letters import marked
from mini_studio.bus.dead_letters import read as dead_letter
from mini_studio.bus.delivery import redriven_for
from mini_studio.bus.kafka import READERS, all_topics
from tests.faults.checker import collect
from tests.faults.checker import violations as checked
from tests.faults.crash_client import read
from tests.faults.crash_life import World
from tests.faults.history import read as read_history
from tests.faults.standins import starts


async def violations(where: World) -> list[tuple[str, str]]:
    """What must hold and does not, each with the code of the client whose point it was."""
    dump, logs = await collect(where.settings), await read_all(where)
    if len(dump.not_events) == poisoned(where, logs):
        dump.not_events = []
    dump.dead = []  # the poison of the scenarios, which `lost_poison` looks up byte for byte
    found = checked(dump, read_history(where.history_file))
    found = [text for text in found if not (" goes from " in text and any(id in text for id in where.backwards))]
    found += [*submitted_twice(where), *lost_poison(where, logs), *not_put_back(logs)]
    owners = {envelope.subject: envelope.client_code for envelope in dump.journal}
    return [(next((code for subject, code in owners.items() if subject in text), ""), text) for text in found]


async def read_all(where: World) -> dict[str, list[Any]]:
    """Every record by topic."""
    topics = all_topics()
    return dict(
        zip(topics, await asyncio.gather(*(read(where.settings.kafka.bootstrap, t) for t in topics)), strict=True)
    )


def submitted_twice(where: World) -> Iterator[str]:
    """Every attempt was one training."""
    seen: set[tuple[str, str]] = set()
    for start in starts(where.data):
        attempt = (start["job_id"], start["attempt"])
        if attempt in seen:
            yield f"attempt {attempt[1]} of {attempt[0]} was started twice"
        seen.add(attempt)


def poisoned(where: World, logs: dict[str, list[Any]]) -> int:
    """How many records are known to be no events: those of the scenarios, and what was put back of them."""
    return sum((topic, record.value) in where.poisons for topic in Topic for record in logs[topic])


def lost_poison(where: World, logs: dict[str, list[Any]]) -> Iterator[str]:
    """What is no event is among the dead letters of everyone who reads its topic, byte for byte."""
    for topic, value in sorted(set(where.poisons)):
        for consumer in where.readers(topic):
            if value not in [record.value for record in logs[dead_letter_topic(topic, consumer)]]:
                yield f"{value!r} is not among the dead letters of {consumer}"


def not_put_back(logs: dict[str, list[Any]]) -> Iterator[str]:
    """What is marked as put back stands on its topic again, for its consumer alone."""
    for topic, consumer in [(topic, consumer) for consumer, topics in READERS.items() for topic in topics]:
        dead = logs[dead_letter_topic(topic, consumer)]
        ids = {marked(record) for record in dead}
        letters = [letter for record in dead if (letter := dead_letter(consumer, record)) and letter.id in ids]
        wanted = Counter((letter.key, letter.value) for letter in letters)
        wanted -= Counter((r.key, r.value) for r in logs[topic] if redriven_for(r) == consumer)
        for key, value in wanted:
            yield f"{value!r} of {key!r} is marked as put back for {consumer}, and is not"
