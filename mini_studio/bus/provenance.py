"""Whether a record came from the studio: the relay journals every event before it publishes it.

So a record on an event topic that the journal does not have, or has otherwise, was put there or changed by somebody else.
"""

from collections.abc import Mapping
from typing import Any

from aiokafka import ConsumerRecord

from events.base import Envelope, Event
from events.registry import UndecodableEvent, decode
from mini_studio.bus.delivery import redriven_for

Journal = Mapping[str, dict[str, Any]]
"""Journal entries by event id."""


def event_of(record: "ConsumerRecord[Any, Any]", headers: Mapping[str, str], journal: Journal) -> Envelope[Event]:
    """The event of a record, given with its text headers. Raises `UndecodableEvent`: it is none, or did not come from the studio."""
    envelope = decode(record.key, headers, record.value)
    verify(record, headers, envelope, journal)
    return envelope


def verify(
    record: "ConsumerRecord[Any, Any]", headers: Mapping[str, str], envelope: Envelope[Any], journal: Journal
) -> None:
    """Compare the record with its journal entry. Raises `UndecodableEvent`: it did not come from the studio."""
    stored = journal.get(envelope.id)
    if stored is None:
        raise UndecodableEvent(f"event {envelope.id!r} is not in the journal: it did not come from the studio")
    sent, value = list(stored["headers"].items()), stored["value"]
    added = 0 if redriven_for(record) is None else 1
    parts = {
        "topic": record.topic == stored["topic"],
        "key": record.key == stored["key"].encode(),
        # As many, and all of them text: comparing that costs half of what comparing bytes does.
        "headers": len(record.headers) == len(sent) + added and list(headers.items())[: len(sent)] == sent,
        "value": record.value == (None if value is None else value.encode()),
    }
    if not all(parts.values()):
        wrong = " and ".join(name for name, same in parts.items() if not same)
        raise UndecodableEvent(
            f"event {envelope.id!r} is in the journal with another {wrong}: it was changed on its way"
        )
