"""Writes `schemas/published`, `docs/events.md` and `docs/settings.md` from the models: `python -m mini_studio.publishing [--check]`."""

import argparse
import itertools
import json
import sys
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from api.app import create_app
from events import usage
from events.base import Event
from events.registry import EVENTS
from events.topics import ROUTES, Plain, Topic
from mini_studio.bus.kafka import READERS
from mini_studio.settings import Settings
from mini_studio.variables import variables

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "schemas" / "published"
SUBSCRIBING = """## Subscribe

Any Kafka client reads the log; `bootstrap` stands in `<data>/run/studio.json` of a running studio, or in `MINI_STUDIO_KAFKA__BOOTSTRAP`.

```
mini-studio events tail --data .studio                      # every event, from the first one on
kcat -C -b 127.0.0.1:20000 -t mini-studio.fine-tunes -X fetch.wait.max.ms=20 -f '%k %h %s\\n'
```

```python
consumer = AIOKafkaConsumer(
    "mini-studio.fine-tunes",
    bootstrap_servers=bootstrap,
    group_id="my-service",
    auto_offset_reset="earliest",
    fetch_max_wait_ms=20,  # the embedded broker does not wake a waiting fetch; Apache Kafka does
)
```

Delivery is at least once. Keep the last sequence per subject and source, and drop what is not newer.
The embedded broker starts empty and is refilled at every start, so offsets change there while ids and sequences stay: a
subscriber begins again at offset 0 when the broker's positions are lower than its own. What a consumer of the studio can never
handle goes, byte for byte, to `<topic>.<consumer>.dead`, with the reason and the place it came from in added headers
(`dlq_reason`, `dlq_topic`, `dlq_partition`, `dlq_offset`). `mini-studio dead-letters` and `/admin/dead-letters` show it, and put
it back when its cause is gone: then the event comes once more, the same but for a last header `dlq_redrive` that names the one
consumer it is for. What the journal does not have, or has otherwise, is put aside too: only the studio's own relay makes events.
"""
HEADERS = """| header | meaning |
|---|---|
| `ce_specversion` | `1.0` |
| `ce_id` | the event's id, unique for ever; drop repeats by it or by sequence |
| `ce_source` | who decided: `/mini-studio/api`, `datasets`, `training` or `serving` |
| `ce_type` | the event's type with its version |
| `ce_subject` | the aggregate's id; also the record's key |
| `ce_time` | RFC 3339, UTC |
| `ce_sequence` | contiguous from 1 per subject and source: a gap is a missing event, a repeat a duplicate |
| `ce_clientcode` | the tenant; empty for what all clients share |
| `ce_correlationid` | the REST request's `X-Request-ID` |
| `ce_causationid` | the event that this one follows from |
| `ce_traceparent` | W3C trace context, where the request had one |
"""
USAGE = """No events: not in the journal, not refilled, kept for seven days. A record's value is one JSON batch (`usage.batch.v1`, schema in
`schemas/published/usage.batch.v1.json`), its key the gateway process. At most once: a gateway that dies takes what it has not said with
it, and drops what the broker does not take in time (docs/inference.md, "Usage"). Within a gateway, a sequence that is not greater than
the last one is a repeat; a gap is a loss. Never a prompt or an answer. First the batch, then each of its records:
"""
SETTINGS = """# Settings

Generated from `mini_studio/settings.py` by `make schemas`; do not edit.

Every setting is an environment variable. Every default works on one machine. `make run` decides the addresses of the parts that it
starts and writes them to `<data>/run/studio.json`, which other commands with the same `MINI_STUDIO_DATA` read below the environment.
Lists and tables are given as JSON: `MINI_STUDIO_SERVING__KUBERNETES__NODE_SELECTOR='{"pool": "gpu"}'`. A variable that begins with
`MINI_STUDIO_` and is no setting is named in a warning at the start of every process.

`MINI_STUDIO_HEALTH_PORT` is an option of `mini-studio consume` and `mini-studio relay` (`--health-port`): the port of their `/health`
and `/metrics`.

With `MINI_STUDIO_PRODUCTION=true` no process of the studio starts with what is fit for one machine only. It names all of it at once, each
with the setting and the cure: `/admin` or Ray without a token on an address that others reach, secrets that can be guessed, connections
in the clear to an address outside (not private, and not a name that only a cluster knows), the embedded broker, a producer that is not
idempotent, SQLite, model servers that answer this machine alone.
"""


def event_schema(event: type[Event]) -> dict[str, Any]:
    return {"$id": event.TYPE, **event.model_json_schema()}


def asyncapi() -> dict[str, Any]:
    """AsyncAPI 3.0: one channel per topic."""
    messages: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for event in EVENTS:
        schema = event.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[event.__name__] = schema
        messages[event.__name__] = {
            "name": event.TYPE,
            "contentType": "application/json",
            "summary": (event.__doc__ or "").strip().splitlines()[0],
            "payload": {"$ref": f"#/components/schemas/{event.__name__}"},
        }
    batch = usage.UsageBatch.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= {**batch.pop("$defs"), "UsageBatch": batch}
    messages["UsageBatch"] = {
        "name": usage.TYPE,
        "contentType": "application/json",
        "summary": f"{(usage.UsageBatch.__doc__ or '').strip()} No event; at most once.",
        "payload": {"$ref": "#/components/schemas/UsageBatch"},
    }
    channels: dict[str, Any] = {
        topic.name: {
            "address": topic.value,
            "messages": {
                e.__name__: {"$ref": f"#/components/messages/{e.__name__}"} for e in EVENTS if e.TOPIC is topic
            },
        }
        for topic in Topic
    }
    channels[Plain.USAGE.name] = {
        "address": Plain.USAGE.value,
        "messages": {"UsageBatch": {"$ref": "#/components/messages/UsageBatch"}},
    }
    operations = {
        f"{name}.{topic.name}": {"action": "receive", "channel": {"$ref": f"#/channels/{topic.name}"}}
        for name, topics in READERS.items()
        for topic in topics
    }
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Mini Studio", "version": "1", "description": "Lifecycle events, CloudEvents binary mode."},
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": schemas},
    }


def events_page() -> str:
    """`docs/events.md`."""
    parts = [
        "# Events",
        "",
        "Generated from `events/` by `make schemas`; do not edit.",
        "",
        "Every event is a CloudEvent 1.0 in Kafka's binary mode: attributes in headers, plain JSON as the value.",
        f"Beside the events, `{ROUTES}` is a compacted topic with the gateways' routes: whole values or tombstones;",
        f"`{Plain.USAGE}` has what requests used, in batches that are no events: see its section at the end;",
        f"`{Plain.WAKEUPS}` has hints that a request waits for a deployment that sleeps: lost ones do no harm, and nobody keeps them.",
        "",
        HEADERS,
        SUBSCRIBING,
    ]
    for topic in Topic:
        parts += [f"## Topic `{topic.value}`", ""]
        for event in (e for e in EVENTS if e.TOPIC is topic):
            parts += [f"### `{event.TYPE}` ({event.__name__})", "", (event.__doc__ or "").strip(), ""]
            parts += ["| field | required | |", "|---|---|---|"]
            for name, field in event.model_fields.items():
                parts.append(f"| `{name}` | {'yes' if field.is_required() else 'no'} | {field.description or ''} |")
            parts.append("")
    parts += usage_section()
    return "\n".join(parts).rstrip() + "\n"


def usage_section() -> list[str]:
    parts = [f"## Topic `{Plain.USAGE}`", "", USAGE]
    for model in (usage.UsageBatch, usage.UsageRecord):
        parts += ["| field | required | |", "|---|---|---|"]
        for name, field in model.model_fields.items():
            parts.append(f"| `{name}` | {'yes' if field.is_required() else 'no'} | {field.description or ''} |")
        parts.append("")
    return parts


def settings_page() -> str:
    """`docs/settings.md`."""
    parts = [SETTINGS]
    for section, settings in itertools.groupby(variables(), lambda variable: variable.section):
        parts += [f"## {'.'.join(section) or 'The studio'}", "", "| variable | type | default | |", "|---|---|---|---|"]
        for setting in settings:
            field = setting.field
            parts.append(f"| `{setting.name}` | {_type(field.annotation)} | {_default(field)} | {field.description} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _type(annotation: Any) -> str:
    """In words; what may be unset is so where it has no default."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (list, dict):
        return "JSON list" if get_origin(annotation) is list else "JSON table"
    for inner in get_args(annotation):
        if inner is not NoneType:
            return _type(inner)
    words = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", SecretStr: "secret"}
    return words[annotation]


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "by the machine"
    text = field.default if isinstance(field.default, str | Path) else json.dumps(field.default)
    return "" if field.default is None else f"`{text}`"


def everything() -> dict[Path, str]:
    """Path -> text of every generated file."""
    app = create_app(Settings(data=Path(".studio")))
    files: dict[Path, Any] = {PUBLISHED / f"{event.TYPE}.json": event_schema(event) for event in EVENTS}
    files[PUBLISHED / f"{usage.TYPE}.json"] = {"$id": usage.TYPE, **usage.UsageBatch.model_json_schema()}
    files |= {PUBLISHED / "openapi.json": app.openapi(), PUBLISHED / "asyncapi.json": asyncapi()}
    texts = {path: json.dumps(content, indent=2, sort_keys=True) + "\n" for path, content in files.items()}
    docs = ROOT / "docs"
    return {**texts, docs / "events.md": events_page(), docs / "settings.md": settings_page()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is stale")
    check = parser.parse_args().check
    stale = [path for path, text in everything().items() if not path.exists() or path.read_text() != text]
    if check:
        for path in stale:
            print(f"stale: {path.relative_to(ROOT)}; run make schemas", file=sys.stderr)
        return bool(stale)
    for path, text in everything().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
