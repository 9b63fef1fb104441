"""The request smuggling corpus: bytes that a client sends, and what may become of them.

Every case says what is answered, in order, and what may reach a model server: whatever is not named must reach none.
Where RFC 9110 and 9112 leave a choice, a case has both, and what is forwarded then is still exactly the one request named.
The cases are in `corpus_framing`, `corpus_heads` and `corpus_targets`.
"""

from dataclasses import dataclass

BODY = b'{"prompt": "x"}'
ACME, BOLT, SHARED = "acme", "bolt", "shared"
"""Two clients with a fine-tuned model `m` each, and the base model `m` of all others: a server each."""
PATHS = {server: f"/predict/{server}" for server in (ACME, BOLT, SHARED)}
MAX_BODY = 64 * 1024
LINE = b"POST /inference/infer/m HTTP/1.1"
HOST = b"Host: gateway"
ID = b"X-User-ID: acme"
LENGTH = b"Content-Length: %d" % len(BODY)
TE = b"Transfer-Encoding: chunked"
CHUNKS = b"f\r\n" + BODY + b"\r\n0\r\n\r\n"
MARK = b"smuggled"
SMUGGLED = b"POST /inference/infer/m HTTP/1.1\r\nHost: gateway\r\nX-User-ID: bolt\r\nContent-Length: 8\r\n\r\n" + MARK
"""Another client's request, where it is none."""


@dataclass(frozen=True)
class Sent:
    """A request at a model server."""

    server: str
    body: bytes


@dataclass(frozen=True)
class Expected:
    """One answer. 200 is the model server's, which then was sent this."""

    statuses: tuple[int, ...]
    sent: Sent | None = None


@dataclass(frozen=True)
class Case:
    name: str
    raw: bytes
    answers: tuple[Expected, ...]
    closed: bool
    """Whether the connection is closed after the last of them. If not, it may be; or it goes on right where the case ends."""


def request(*lines: bytes, body: bytes = b"", line: bytes = LINE, host: bytes = HOST, id: bytes = ID) -> bytes:
    """A request with these headers beside its Host and its client; an empty one is left out."""
    return b"\r\n".join([*(part for part in (line, host, id, *lines) if part), b"", body])


def usual(*lines: bytes, line: bytes = LINE, host: bytes = HOST, id: bytes = ID) -> bytes:
    """Well-framed, with these headers too."""
    return request(*lines, LENGTH, body=BODY, line=line, host=host, id=id)


def ok(server: str = ACME, body: bytes = BODY, *others: int) -> Expected:
    """200, or one of `others` from the gateway."""
    return Expected((200, *others), Sent(server, body))


def rejected(name: str, raw: bytes, *statuses: int) -> Case:
    """Its framing cannot be trusted: nothing that follows on this connection is read."""
    return Case(name, raw, (Expected(statuses or (400,)),), closed=True)


def refused(name: str, raw: bytes, *statuses: int) -> Case:
    """It is clear where it ends, and it is not for a model."""
    return Case(name, raw, (Expected(statuses or (400,)),), closed=False)


def forwarded(name: str, raw: bytes, server: str = ACME, body: bytes = BODY) -> Case:
    return Case(name, raw, (ok(server, body),), closed=False)


def either(name: str, raw: bytes, *statuses: int, server: str = ACME, body: bytes = BODY) -> Case:
    """Forwarded, or refused with 400 or one of these."""
    return Case(name, raw, (ok(server, body, 400, *statuses),), closed=False)


def several(name: str, raw: bytes, *answers: Expected, closed: bool = False) -> Case:
    return Case(name, raw, answers, closed)
