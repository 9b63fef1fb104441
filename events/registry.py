"""Every event type there is, and how a Kafka record becomes an `Envelope`.

A change that an old reader cannot take is a new class with a new `TYPE`, and an upcaster in `UPCASTERS` from the old one.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from events.base import Cause, Envelope, Event, Source
from events.datasets import DatasetDeleted, DatasetProfiled, DatasetUploaded
from events.deployments import (
    DeploymentApplied,
    DeploymentFailed,
    DeploymentReady,
    DeploymentRemoved,
    DeployRequested,
    UndeployRequested,
)
from events.fine_tuning import (
    FineTuneCancelled,
    FineTuneCancelRequested,
    FineTuneFailed,
    FineTuneProgressed,
    FineTuneQueued,
    FineTuneRequested,
    FineTuneStarted,
    FineTuneSucceeded,
)

EVENTS: tuple[type[Event], ...] = (
    DatasetUploaded,
    DatasetProfiled,
    DatasetDeleted,
    FineTuneRequested,
    FineTuneCancelRequested,
    FineTuneQueued,
    FineTuneStarted,
    FineTuneProgressed,
    FineTuneSucceeded,
    FineTuneFailed,
    FineTuneCancelled,
    DeployRequested,
    UndeployRequested,
    DeploymentApplied,
    DeploymentReady,
    DeploymentFailed,
    DeploymentRemoved,
)

BY_TYPE: dict[str, type[Event]] = {event.TYPE: event for event in EVENTS}

Upcaster = Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]
UPCASTERS: dict[str, Upcaster] = {}
"""Old type -> function from its data to (newer type, newer data). Empty while every type is at its first version."""

SOURCE_PREFIX = "/mini-studio/"


class UndecodableEvent(ValueError):
    """The record is not an event of ours; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnknownEventType(UndecodableEvent):
    """The record is a well-formed event of a type that this version does not know."""


def decode(key: bytes | None, headers: Mapping[str, str], value: bytes | None) -> Envelope[Event]:
    """The event in a Kafka record. Raises `UndecodableEvent` for whatever is not one."""
    if not value:
        raise UndecodableEvent("the record has no value")
    if headers.get("ce_specversion") != "1.0":
        raise UndecodableEvent("header ce_specversion is not 1.0: not a CloudEvent in binary mode")
    type_ = headers.get("ce_type", "")
    if not type_:
        raise UndecodableEvent("header ce_type is missing")
    data = _json_object(value)
    while type_ in UPCASTERS:
        type_, data = UPCASTERS[type_](data)
    event_class = BY_TYPE.get(type_)
    if event_class is None:
        raise UnknownEventType(f"unknown event type {type_!r}")
    envelope = _envelope(headers, event_class, data)
    if key is not None and key != envelope.subject.encode():
        raise UndecodableEvent(f"the record's key does not name the event's subject {envelope.subject!r}")
    return envelope


def restore(stored: Mapping[str, Any]) -> Envelope[Event]:
    """Read back what `Envelope.stored` gave."""
    return decode(stored["key"].encode(), stored["headers"], stored["value"].encode())


def _not_json(constant: str) -> None:
    """Python reads NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{constant} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_not_json)
"""Made once: `json.loads` makes a new one whenever it is told something, which takes longer than to read an event."""


def _json_object(value: bytes) -> dict[str, Any]:
    try:
        data = _DECODER.decode(value.decode())
    except RecursionError:
        raise UndecodableEvent("the value is nested too deeply") from None
    except ValueError as error:
        raise UndecodableEvent(f"the value is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UndecodableEvent("the value is not a JSON object")
    return data


_OF_ANY = Envelope[Any]
"""Looked up once."""


def _envelope(headers: Mapping[str, str], event_class: type[Event], data: dict[str, Any]) -> Envelope[Event]:
    source = headers.get("ce_source", "").removeprefix(SOURCE_PREFIX)
    if source != event_class.SOURCE:
        raise UndecodableEvent(f"{event_class.TYPE} may not come from source {headers.get('ce_source')!r}")
    try:
        envelope: Envelope[Event] = _OF_ANY(
            id=headers.get("ce_id", ""),
            source=Source(source),
            type=event_class.TYPE,
            subject=headers.get("ce_subject", ""),
            sequence=int(headers.get("ce_sequence", "")),
            time=headers.get("ce_time", ""),  # pydantic parses RFC 3339
            client_code=headers.get("ce_clientcode", ""),
            cause=Cause(
                correlation_id=headers.get("ce_correlationid", ""),
                causation_id=headers.get("ce_causationid"),
                traceparent=headers.get("ce_traceparent"),
            ),
            data=event_class.model_validate(data),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "value"
        raise UndecodableEvent(f"{event_class.TYPE}: {where}: {first['msg']}") from None
    except ValueError:
        raise UndecodableEvent("header ce_sequence is not a number") from None
    if subject_of(envelope.data) != envelope.subject:
        raise UndecodableEvent("ce_subject is not the aggregate that the value names")
    return envelope


def subject_of(event: Event) -> str:
    """The id of the aggregate that an event belongs to."""
    for field in ("job_id", "deployment_id", "dataset_id"):
        if field in type(event).model_fields:
            return str(getattr(event, field))
    raise TypeError(f"{type(event).__name__} names no aggregate")
