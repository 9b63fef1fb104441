"""What must hold in a world in which lives ended, beside what tests/faults/checker.py says of every studio."""

from collections import Counter
from collections.abc import Iterator

from events.topics import Topic, dead_letter_topic
from mini_studio.bus.dead_letters import marked
from mini_studio.bus.dead_letters import read as dead_letter
from mini_studio.bus.delivery import redriven_for
from mini_studio.bus.kafka import READERS
from tests.faults.checker import collect
from tests.faults.checker import violations as checked
from tests.faults.crash_client import read
from tests.faults.crash_life import World
from tests.faults.history import read as read_history
from tests.faults.standins import starts


async def violations(where: World) -> list[tuple[str, str]]:
    """What must hold and does not, each with the code of the client whose point it was."""
    dump = await collect(where.settings)
    if len(dump.not_events) == await poisoned(where):
        dump.not_events = []
    dump.dead = []  # the poison of the scenarios, which `lost_poison` looks up byte for byte
    found = checked(dump, read_history(where.history_file))
    found += [*submitted_twice(where), *await lost_poison(where), *await not_put_back(where)]
    owners = {envelope.subject: envelope.client_code for envelope in dump.journal}
    return [(next((code for subject, code in owners.items() if subject in text), ""), text) for text in found]


def submitted_twice(where: World) -> Iterator[str]:
    """Every attempt was one training."""
    seen: set[tuple[str, str]] = set()
    for start in starts(where.data):
        attempt = (start["job_id"], start["attempt"])
        if attempt in seen:
            yield f"attempt {attempt[1]} of {attempt[0]} was started twice"
        seen.add(attempt)


async def poisoned(where: World) -> int:
    """How many records are known to be no events: those of the scenarios, and what was put back of them."""
    logs = [(topic.value, await read(where.settings.kafka.bootstrap, topic)) for topic in Topic]
    return sum((topic, record.value) in where.poisons for topic, records in logs for record in records)


async def lost_poison(where: World) -> list[str]:
    """What is no event is among the dead letters of everyone who reads its topic, byte for byte."""
    found = []
    pairs = {(poisoned, reader) for poisoned, _ in where.poisons for reader in where.readers(poisoned)}
    for topic, consumer in sorted(pairs):
        dead = [r.value for r in await read(where.settings.kafka.bootstrap, dead_letter_topic(topic, consumer))]
        missing = {value for on, value in where.poisons if on == topic} - set(dead)
        found += [f"{value!r} is not among the dead letters of {consumer}" for value in missing]
    return found


async def not_put_back(where: World) -> list[str]:
    """What is marked as put back stands on its topic again, for its consumer alone."""
    found, bootstrap = [], where.settings.kafka.bootstrap
    for topic, consumer in [(topic, consumer) for consumer, topics in READERS.items() for topic in topics]:
        dead = await read(bootstrap, dead_letter_topic(topic, consumer))
        ids = {marked(record) for record in dead}
        letters = [letter for record in dead if (letter := dead_letter(consumer, record)) and letter.id in ids]
        wanted = Counter((letter.key, letter.value) for letter in letters)
        log = await read(bootstrap, topic) if wanted else []
        wanted -= Counter((record.key, record.value) for record in log if redriven_for(record) == consumer)
        found += [f"{value!r} of {key!r} is marked as put back for {consumer}, and is not" for key, value in wanted]
    return found
