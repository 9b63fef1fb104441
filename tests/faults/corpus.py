"""Records that are no events, made from one that is: every way in which a record can be broken, forged or changed."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from events.base import Envelope

MIB = 1024 * 1024
Headers = list[tuple[str, bytes | None]]
ATTRIBUTES = ("specversion", "id", "source", "type", "subject", "time", "sequence", "clientcode", "correlationid")


@dataclass(frozen=True)
class Raw:
    """A record as it goes onto the log."""

    name: str
    key: bytes | None
    value: bytes | None
    headers: Headers

    def with_header(self, name: str, value: bytes | None) -> "Raw":
        return replace(self, headers=[(n, value if n == name else v) for n, v in self.headers])

    def without_header(self, name: str) -> "Raw":
        return replace(self, headers=[(n, v) for n, v in self.headers if n != name])


def raw(envelope: Envelope[Any], name: str = "good") -> Raw:
    """The record that the relay makes of an event."""
    headers: Headers = [(n, text.encode()) for n, text in envelope.headers().items()]
    return Raw(name, envelope.subject.encode(), envelope.body(), headers)


def poison(good: Envelope[Any], elsewhere: Envelope[Any]) -> list[Raw]:
    """All of them. `good` is in the journal as it is; `elsewhere` is a genuine event of another topic."""
    base = raw(good)
    cases = [*_values(base), *_attributes(base), *_forgeries(base), replace(raw(elsewhere), name="of another topic")]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def _values(base: Raw) -> Iterator[Raw]:
    """The value is not the JSON object that it should be."""
    text = base.value or b""
    fields = json.loads(text)
    number = next(name for name in ("hyperparameters", "generation", "rows") if name in fields)
    values: dict[str, bytes | None] = {
        "words": b"not JSON at all",
        "truncated": text[: len(text) // 2],
        "comma at the end": text[:-1] + b",}",
        "single quotes": text.replace(b'"', b"'"),
        "two documents": text + text,
        "a comment": b"/* why */" + text,
        "a control character": text.replace(b'"', b'"\x01', 1),
        "NaN alone": b"NaN",
        "a string": b'"text"',
        "a number": b"42",
        "an array": b"[" + text + b"]",
        "null as JSON": b"null",
        "true": b"true",
        "an empty object": b"{}",
        "bad UTF-8": b"\xff\xfe\xfa not text",
        "bad UTF-8 in a string": text.replace(b'":"', b'":"\xc3\x28', 1),
        "half a surrogate": text.replace(b'":"', b'":"\\ud800', 1),
        "UTF-16": text.decode().encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + text,
        "a tombstone": None,
        "empty": b"",
        "blanks": b"  \n ",
        "zero bytes": b"\0" * 64,
        "NaN in a field": json.dumps({**fields, number: float("nan")}).encode(),
        "infinity in a field": json.dumps({**fields, number: float("inf")}).encode(),
        "a float beyond all floats": json.dumps({**fields, number: 0}).replace(": 0", ": 1e999").encode(),
        "an integer beyond 64 bits": json.dumps({**fields, number: 10**40}).encode(),
        "an integer of 5,000 digits": b'{"n": ' + b"9" * 5000 + b"}",
        "a field of another type": json.dumps({**fields, number: "text"}).encode(),
        "a field that is null": json.dumps({**fields, number: None}).encode(),
        "a missing field": json.dumps({name: value for name, value in fields.items() if name != number}).encode(),
        "one field more": json.dumps({**fields, "more": 1}).encode(),
        "other white space": json.dumps(fields, indent=1).encode(),
        "1 MiB of nothing": b"x" * MIB,
        "1 MiB of JSON": json.dumps({**fields, "more": ""}).encode().replace(b'""', b'"' + b"x" * (MIB - 5000) + b'"', 1),
        "10,000 arrays deep": b"[" * 10_000 + b"]" * 10_000,
        "10,000 objects deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    }  # fmt: skip
    yield from (replace(base, name=name, value=value) for name, value in values.items())


def _attributes(base: Raw) -> Iterator[Raw]:
    """An attribute is missing, malformed, or no text."""
    for attribute in ATTRIBUTES:
        yield replace(base.without_header(f"ce_{attribute}"), name=f"no ce_{attribute}")
        yield replace(base.with_header(f"ce_{attribute}", None), name=f"null ce_{attribute}")
        yield replace(base.with_header(f"ce_{attribute}", b"\xff\x00\xfe"), name=f"binary ce_{attribute}")
    malformed = {
        "ce_specversion": [b"0.3"],
        "ce_id": [b"", b"i" * 301],
        "ce_source": [b"/mini-studio/nobody", b"training", b"https://elsewhere.example"],
        "ce_type": [b"", b"nobody.knows.v1", dict(base.headers)["ce_type"][:-1] + b"9"],  # type: ignore[index]
        "ce_subject": [b"", b"job_zzz", b"../../etc/passwd"],
        "ce_time": [b"yesterday", b"2026-01-01T00:00:00"],
        "ce_sequence": [b"0", b"-1", b"1.5", b"one", b"9" * 5000],
        "ce_clientcode": [b"../acme", b"a" * 64, "ä".encode()],
        "ce_correlationid": [b"", b"c" * 301],
    }
    for name, values in malformed.items():
        for value in values:
            yield replace(base.with_header(name, value), name=f"{name} {value[:20]!r}")
    yield replace(base, name="no headers", headers=[])
    yield replace(base, name="a malformed traceparent", headers=[*base.headers, ("ce_traceparent", b"00-zz-zz-00")])


def _forgeries(base: Raw) -> Iterator[Raw]:
    """It is an event, but not one that the studio sent."""
    value = base.value or b""
    headers = {
        "a forged id": ("ce_id", str(uuid.uuid4()).encode()),
        "another tenant": ("ce_clientcode", b"mallory"),
        "a forged sequence": ("ce_sequence", b"7"),
        "another time": ("ce_time", b"2020-01-01T00:00:00Z"),
        "another content type": ("content-type", b"text/plain"),
    }
    yield from (replace(base.with_header(*header), name=name) for name, header in headers.items())
    yield replace(
        base,
        name="a tampered value",
        value=value.replace(b"tiny-llama", b"evil-llama").replace(b'"x"', b'"y"').replace(b'"m"', b'"n"'),
    )
    yield replace(base, name="another key", key=b"job_" + b"f" * 24)
    yield replace(base, name="a binary key", key=b"\xff\xfe\x00")
    yield replace(base, name="a null key", key=None)
    yield replace(base, name="a null header more", headers=[*base.headers, ("more", None)])
    yield replace(base, name="a binary header more", headers=[*base.headers, ("more", b"\xff\xfe")])
    yield replace(base, name="a header twice", headers=[*base.headers, base.headers[3]])
    yield replace(base, name="headers in another order", headers=base.headers[::-1])
    yield replace(base, name="headers of a dead letter", headers=[*base.headers, ("dlq_reason", b"none")])
    yield Raw("nulls only", None, None, [])
