"""What a request's head must be, beside what the parser sees to: whatever two servers could read in two ways is refused.

llhttp, in its strict mode, refuses bare LF, obs-fold, control characters, several lengths, a length beside an encoding, and chunk
sizes that are none. The rest stands here, for every request on the port.
"""

import re
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

ONCE = frozenset(
    (
        b"authorization",
        b"content-length",
        b"content-type",
        b"expect",
        b"host",
        b"openai-organization",
        b"transfer-encoding",
        b"x-request-id",
        b"x-user-id",
    )
)
READ = ONCE | {b"accept", b"accept-encoding", b"cookie", b"idempotency-key", b"prefer", b"traceparent"}
"""What a `Connection` header must not name: a proxy before us would have to take it away, and perhaps did not."""
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_USUAL_CONNECTION = (b"keep-alive", b"close", b"Keep-Alive", b"Close")
_ABSOLUTE = re.compile(rb"https?://([^/?#@:]+|\[[^/?#@]+\])(:\d*)?(/[^#]*)?", re.IGNORECASE)
_HOST = re.compile(rb"(([A-Za-z0-9._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})*|\[[0-9A-Fa-f:.]+\])(:\d{0,5})?")
_hosts: set[bytes] = set()
"""Those that were found to be well-formed."""


class Unclear(Exception):
    """The request could be read in two ways; the message says why."""


def check(version: str, method: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The one `Host`. Names are lower case. Raises `Unclear`."""
    if version not in ("1.1", "1.0"):
        raise Unclear("only HTTP/1.1 and HTTP/1.0 are understood here")
    if method == b"CONNECT":
        raise Unclear("this is no tunnel")
    seen: set[bytes] = set()
    host = None
    for name, value in headers:
        if name in ONCE:
            if name in seen:
                raise Unclear(f"the header {name.decode()} is there more than once")
            seen.add(name)
            if name == b"host":
                host = value
            elif name == b"transfer-encoding" and (value.lower() != b"chunked" or version == "1.0"):
                raise Unclear("the only transfer encoding understood here is chunked, in HTTP/1.1")
        elif name == b"connection" and value not in _USUAL_CONNECTION:
            _check_connection(value)
    if b"content-length" in seen and b"transfer-encoding" in seen:
        raise Unclear("the body has a length and a transfer encoding")
    if host is not None:
        if host not in _hosts:
            _check_host(host)
    elif version == "1.1":
        raise Unclear("there is no Host header")
    return host


def _check_host(host: bytes) -> None:
    if not _HOST.fullmatch(host):
        raise Unclear("the Host is no name with a port")
    if len(_hosts) > 1000:
        _hosts.clear()
    _hosts.add(host)


def _check_connection(value: bytes) -> None:
    for token in value.lower().split(b","):
        if token.strip() in READ:
            raise Unclear(f"Connection names {token.strip().decode()}, which is no header of one connection")


def target(url: bytes, method: bytes, host: bytes | None) -> bytes:
    """The target in origin form. Raises `Unclear`."""
    if not url.startswith(b"/") and not (url == b"*" and method == b"OPTIONS"):
        absolute = _ABSOLUTE.fullmatch(url)
        if absolute is None or host is None or absolute[1].lower() != _name(host):
            raise Unclear("the target is no path, nor an absolute one on this very host")
        url = absolute[3] or b"/"
    if b"#" in url:
        raise Unclear("the target has a fragment")
    if b"%" in url:
        _check_percent(url)
    return url


def _name(host: bytes) -> bytes:
    """Without the port."""
    found = _HOST.fullmatch(host)
    return found[1].lower() if found else b""


def _check_percent(url: bytes) -> None:
    if _PERCENT.search(url):
        raise Unclear("the target has a percent sign that encodes nothing")
    try:
        text = unquote_to_bytes(url).decode()
    except UnicodeDecodeError:
        raise Unclear("the target encodes what is no UTF-8") from None
    if _CONTROL.search(text.partition("?")[0]):
        raise Unclear("the path has a control character")
