"""The chart's values and their schema, without Helm."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from tests.fakes.helm import CHART, VALUES

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
NAMES = sorted(path.stem for path in VALUES.glob("*.yaml"))


def merged(under: Any, over: Any) -> Any:
    """As Helm merges values: maps key by key, everything else whole."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {**under, **{key: merged(under.get(key), value) for key, value in over.items()}}
    return over


def values(*changes: Any) -> Any:
    result = merged(DEFAULTS, yaml.safe_load((VALUES / "minimal.yaml").read_text()))
    for change in changes:
        result = merged(result, change)
    return result


def objects(schema: Any) -> Iterator[Any]:
    if isinstance(schema, dict):
        if schema.get("properties") and "type" in schema:
            yield schema
        for part in schema.values():
            yield from objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part)


def test_the_schema_takes_no_name_that_it_does_not_know() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    known = list(objects(SCHEMA))
    assert len(known) > 20
    assert all(part["additionalProperties"] is False for part in known)


@pytest.mark.parametrize("name", NAMES)
def test_the_value_sets_of_the_tests_are_valid(name: str) -> None:
    jsonschema.validate(values(yaml.safe_load((VALUES / f"{name}.yaml").read_text())), SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        {"kafka": {"bootstrap": ""}},
        {"kafka": {"bootstrap": "kafka"}},
        {"kafka": {"security": "sasl_ssl"}},  # and no secret named
        {"kafka": {"partitions": 0}},
        {"s3": {"bucket": ""}},
        {"api": {"replicas": "2"}},
        {"api": {"image": "other"}},
        {"secrets": {"admin": {"name": "", "key": "token"}}},
        {"secrets": {"admin": {"value": "letmein"}}},
        {"settings": {"MINI_STUDIO_API__ADMIN_TOKEN": "letmein"}},
        {"settings": {"MINI_STUDIO_RECORDS__MONGO_URL": "mongodb://user:password@mongo"}},
        {"settings": {"PATH": "/"}},
        {"settings": {"MINI_STUDIO_GATEWAY__HOLD_S": 300}},
        {"modelsNamespace": {"podSecurity": "none"}},
        {"ray": {"enabled": False}},  # and no address
        {"ingress": {"enabled": True}},  # and no host
        {"modelServers": {"hubEgress": ["everywhere"]}},
        {"unknown": True},
    ],
    ids=json.dumps,
)
def test_wrong_values_are_refused(change: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values(change), SCHEMA)
