"""Events are kept for ever: a stored sample of every version has to decode, field by field, in every later version of the code."""

import json
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary_event
from cloudevents.core.formats.json import JSONFormat
from jsonschema import Draft202012Validator

from events.base import Envelope
from events.registry import BY_TYPE, UPCASTERS, decode, restore
from mini_studio.bus.relay import outgoing

SAMPLES = Path(__file__).with_name("samples")
PUBLISHED = Path(__file__).parents[2] / "schemas" / "published"


def sample(type_: str) -> dict[str, Any]:
    stored = json.loads((SAMPLES / f"{type_}.json").read_text())
    return {**stored, "value": json.dumps(stored["value"])}


def test_every_version_ever_published_has_a_sample() -> None:
    assert {path.name.removesuffix(".json") for path in SAMPLES.iterdir()} == {*BY_TYPE, *UPCASTERS}


@pytest.mark.parametrize("type_", sorted(BY_TYPE))
def test_a_stored_sample_decodes_with_every_field(type_: str) -> None:
    stored = sample(type_)
    envelope = restore(stored)
    assert envelope.type == type_
    assert json.loads(envelope.body()) == json.loads(stored["value"]), (
        "a field was removed, renamed or changed its type"
    )
    assert envelope.headers() == stored["headers"]


@pytest.mark.parametrize("type_", sorted(BY_TYPE))
def test_optional_fields_may_be_missing_and_new_ones_come(type_: str) -> None:
    stored = sample(type_)
    schema = BY_TYPE[type_].model_json_schema()
    value = {name: json.loads(stored["value"])[name] for name in schema["required"]}
    assert restore({**stored, "value": json.dumps({**value, "of_tomorrow": 1})}).type == type_


@pytest.mark.parametrize("type_", sorted(BY_TYPE))
def test_a_sample_is_valid_by_the_published_schema(type_: str) -> None:
    schema = json.loads((PUBLISHED / f"{type_}.json").read_text())
    Draft202012Validator(schema).validate(json.loads(sample(type_)["value"]))


@pytest.mark.parametrize("type_", sorted(BY_TYPE))
def test_a_cloudevents_library_reads_it(type_: str) -> None:
    stored = sample(type_)
    record = outgoing(stored)
    assert record.value is not None
    message = KafkaMessage(headers=dict(record.headers), key=record.key, value=record.value)
    event = from_binary_event(message, JSONFormat())
    assert (event.get_id(), event.get_type(), event.get_subject()) == (
        stored["headers"]["ce_id"], type_, stored["key"],
    )  # fmt: skip
    assert event.get_data() == json.loads(stored["value"])
    assert event.get_extension("sequence") == "1"


def test_an_old_envelope_without_optional_attributes_decodes() -> None:
    stored = sample("dataset.uploaded.v1")
    headers = {k: v for k, v in stored["headers"].items() if k not in ("ce_causationid", "ce_traceparent")}
    envelope: Envelope[Any] = decode(stored["key"].encode(), headers, stored["value"].encode())
    assert envelope.cause.causation_id is None
