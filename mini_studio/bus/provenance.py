"""Whether a record came from the studio: the relay journals every event before it publishes it.

So a record on an event topic that the journal does not have, or has otherwise, was put there or changed by somebody else.
"""

from collections.abc import Mapping
from typing import Any

from aiokafka import ConsumerRecord

from events.base import Envelope
from events.registry import UndecodableEvent
from mini_studio.bus.delivery import sent_headers
from mini_studio.bus.relay import outgoing


def verify(record: "ConsumerRecord[Any, Any]", envelope: Envelope[Any], journal: Mapping[str, dict[str, Any]]) -> None:
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
    wrong = [name for name, same in parts.items() if not same]
    if wrong:
        raise UndecodableEvent(
            f"event {envelope.id!r} is in the journal with another {' and '.join(wrong)}: it was changed on its way"
        )
