"""Whether a record came from the studio: the relay journals every event before it publishes it.

So a record on an event topic that the journal does not have, or has otherwise, was put there or changed by somebody else.
"""

from collections.abc import Mapping
from typing import Any

from aiokafka import ConsumerRecord

from events.base import Envelope, Event
from events.registry import UndecodableEvent, decode
from mini_studio.bus.delivery import sent_headers
from mini_studio.bus.relay import outgoing

Journal = Mapping[str, dict[str, Any]]
"""Journal entries by event id."""


def event_of(record: "ConsumerRecord[Any, Any]", headers: Mapping[str, str], journal: Journal) -> Envelope[Event]:
    """The event of a record, given with its text headers. Raises `UndecodableEvent`: it is none, or did not come from the studio."""
    envelope = decode(record.key, headers, record.value)
    verify(record, envelope, journal)
    return envelope


def verify(record: "ConsumerRecord[Any, Any]", envelope: Envelope[Any], journal: Journal) -> None:
    """Compare the record with its journal entry. Raises `UndecodableEvent`: it did not come from the studio."""
    stored = journal.get(envelope.id)
    if stored is None:
        raise UndecodableEvent(f"event {envelope.id!r} is not in the journal: it did not come from the studio")
    sent = outgoing(stored)
    parts = {
        "topic": record.topic == sent.topic,
        "key": record.key == sent.key,
        "headers": sent_headers(record) == sent.headers,
        "value": record.value == sent.value,
    }
    if not all(parts.values()):
        wrong = " and ".join(name for name, same in parts.items() if not same)
        raise UndecodableEvent(
            f"event {envelope.id!r} is in the journal with another {wrong}: it was changed on its way"
        )
