"""Which headers pass the gateway, up and down: one place for both clients."""

from collections.abc import Iterable

from mini_studio.errors import Upstream

Headers = list[tuple[bytes, bytes]]

PASSED_UP = frozenset((b"content-type", b"accept", b"accept-encoding", b"traceparent"))
"""Beside the body's length, which each client writes as it sends the body."""
KEPT_BACK = frozenset(
    (
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"date",
        b"server",
        b"x-request-id",
    )
)
"""Headers of one connection (RFC 9110, 7.6.1), those that frame a body, and those our own server writes."""
_PLAIN_CONNECTION = (b"keep-alive", b"close", b"Keep-Alive", b"Close")


def lines(headers: Headers) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def pairs(text: bytes) -> Headers:
    """What `lines` made of them."""
    return [(name, value) for name, _, value in (line.partition(b": ") for line in text.splitlines())]


def passed_up(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Bytes as they came, in whatever encoding. The body passes through as it is, so only the caller may ask for a compressed one."""
    passed = [header for header in headers if header[0] in PASSED_UP]
    for name, _ in passed:
        if name == b"accept-encoding":
            break
    else:
        passed.append((b"accept-encoding", b"identity"))
    return passed


class Answered:
    """The head of a model server's answer, as it is passed on."""

    __slots__ = ("chunked", "compressed", "headers", "length", "lines")

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises `Upstream` for one that says its length twice or in an unknown way: who reads on might see another answer."""
        self.headers: Headers = []
        self.length: int | None = None
        self.chunked = False
        self.compressed = False
        named: set[bytes] = set()
        for raw_name, value in raw:
            name = raw_name.lower()
            if name not in KEPT_BACK:
                self.headers.append((name, value))
                if name == b"content-encoding":
                    self.compressed = True
            elif name == b"content-length":
                if self.length is not None or not value.isdigit():
                    raise Upstream("the model server's answer has no clear length")
                self.length = int(value)
            elif name == b"transfer-encoding":
                if self.chunked or value.lower() != b"chunked":
                    raise Upstream("the model server's answer has an unknown transfer encoding")
                self.chunked = True
            elif name == b"connection" and value not in _PLAIN_CONNECTION:
                named.update(token.strip().lower() for token in value.split(b","))
        if self.chunked and self.length is not None:
            raise Upstream("the model server's answer has two lengths")
        if named:
            self.headers = [header for header in self.headers if header[0] not in named]
        self.lines = lines(self.headers)
