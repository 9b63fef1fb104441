"""HTTP/1.1 as bytes: a reader that takes nothing lightly, and one end of a connection on a bare socket."""

import asyncio
import contextlib
import re
import socket
import struct
from dataclasses import dataclass

PATIENCE_S = 10
"""What ought to take milliseconds may take so long on a busy machine."""
PIECE = 64 * 1024

REQUEST_LINE = re.compile(rb"([A-Z]+) ([!-~]+) HTTP/1\.1")
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [\t -~\x80-\xff]*")
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}")


class MalformedError(AssertionError):
    """Bytes that the gateway should not have sent."""


@dataclass(frozen=True)
class Message:
    """A whole request, or a whole answer."""

    start: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    """Names in lower case."""
    body: bytes
    size: int
    """Of all of it, on the wire."""

    @property
    def status(self) -> int:
        return int(self.start.split()[1])

    @property
    def target(self) -> bytes:
        return self.start.split()[1]

    @property
    def names(self) -> set[bytes]:
        return {name for name, _ in self.headers}

    def all(self, name: bytes) -> list[bytes]:
        return [value for known, value in self.headers if known == name]


def parsed(buffer: bytes | bytearray, *, asked: bytes | None = None, ended: bool = False) -> Message | None:
    """The first message in the bytes, if it is whole. Raises `MalformedError`.

    `asked` is the method of the request that an answer answers, None for a request; `ended`: there will be no more bytes.
    """
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    start, *lines = bytes(buffer[:end]).split(b"\r\n")
    if not (REQUEST_LINE if asked is None else STATUS_LINE).fullmatch(start):
        raise MalformedError(f"start line {start!r}")
    headers = tuple(_header(line) for line in lines)
    framing = [pair for pair in headers if pair[0] in (b"content-length", b"transfer-encoding")]
    if len(framing) > 1 or (asked is None and len(framing) != 1):
        raise MalformedError(f"{len(framing)} framings: {framing}")
    if asked is None and [name for name, _ in headers].count(b"host") != 1:
        raise MalformedError("a request has exactly one Host")
    bodiless = asked is not None and (asked == b"HEAD" or start[9:10] == b"1" or start[9:12] in (b"204", b"304"))
    body_at = end + 4
    if bodiless:
        return Message(start, headers, b"", body_at)
    if not framing:
        return Message(start, headers, bytes(buffer[body_at:]), len(buffer)) if ended else None
    if framing[0][0] == b"transfer-encoding":
        found = _chunked(buffer, body_at, framing[0][1])
        return found and Message(start, headers, *found)
    length = _length(framing[0][1])
    if len(buffer) < body_at + length:
        return None
    return Message(start, headers, bytes(buffer[body_at : body_at + length]), body_at + length)


def _header(line: bytes) -> tuple[bytes, bytes]:
    match = HEADER.fullmatch(line)
    if match is None:
        raise MalformedError(f"header {line!r}")
    return match[1].lower(), match[2]


def _length(value: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", value):
        raise MalformedError(f"Content-Length {value!r}")
    return int(value)


def _chunked(buffer: bytes | bytearray, at: int, coding: bytes) -> tuple[bytes, int] | None:
    """The body and where the message ends. Extensions and trailers count as malformed: neither is to be passed on."""
    if coding.lower() != b"chunked":
        raise MalformedError(f"Transfer-Encoding {coding!r}")
    body = bytearray()
    while (line_end := buffer.find(b"\r\n", at)) >= 0:
        line = bytes(buffer[at:line_end])
        if not CHUNK_SIZE.fullmatch(line):
            raise MalformedError(f"chunk size {line[:80]!r}")
        size, at = int(line, 16), line_end + 2
        if len(buffer) < at + size + 2:
            return None
        if buffer[at + size : at + size + 2] != b"\r\n":
            raise MalformedError(f"{bytes(buffer[at + size : at + size + 80])!r} after a chunk")
        body += buffer[at : at + size]
        at += size + 2
        if not size:
            return bytes(body), at
    return None


class Wire:
    """One end of a connection. Keeps every byte that came."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.received = bytearray()
        self.at = 0
        """Where in `received` the next message begins."""
        self.sent = 0
        """Bytes that the kernel took."""
        self.ended = False
        """Whether the other side has closed its direction, or reset the connection."""
        self.messages: list[Message] = []

    async def send(self, data: bytes) -> bool:
        """False: nobody takes it any more, which is no failure here, for what came before can still be read."""
        loop = asyncio.get_running_loop()
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            try:
                await loop.sock_sendall(self.socket, piece)
            except OSError:
                return False
            self.sent += len(piece)
        return True

    async def receive(self) -> bool:
        """Take in what comes next. False at the end."""
        if self.ended:
            return False
        try:
            data = await asyncio.get_running_loop().sock_recv(self.socket, PIECE)
        except OSError:
            data = b""
        self.ended = not data
        self.received += data
        return bool(data)

    async def message(self, asked: bytes | None = None) -> Message | None:
        """The next whole message; None when the connection ended before it was. Waits without end."""
        while True:
            found = parsed(self.received[self.at :] if self.at else self.received, asked=asked, ended=self.ended)
            if found:
                self.at += found.size
                self.messages.append(found)
                return found
            if not await self.receive():
                if parsed(self.received[self.at :], asked=asked, ended=True):
                    continue  # delimited by the end
                return None

    async def answer(self, asked: bytes = b"POST", patience_s: float = PATIENCE_S) -> Message:
        """The next whole answer, also an informational one."""
        found = await asyncio.wait_for(self.message(asked), patience_s)
        assert found is not None, f"the connection ended after {bytes(self.received[self.at :][:400])!r}"
        return found

    async def final(self, asked: bytes = b"POST", patience_s: float = PATIENCE_S) -> Message:
        """The next answer that is not informational."""
        while (found := await self.answer(asked, patience_s)).status < 200:
            pass
        return found

    async def until(self, marker: bytes, patience_s: float = PATIENCE_S) -> None:
        """Read until the bytes have come, beyond `at`; `at` is behind them then."""
        async with asyncio.timeout(patience_s):
            while (found := self.received.find(marker, self.at)) < 0:
                assert await self.receive(), f"the connection ended after {bytes(self.received[-400:])!r}"
        self.at = found + len(marker)

    async def end(self, patience_s: float = PATIENCE_S) -> bytes:
        """What comes until the other side closes."""
        async with asyncio.timeout(patience_s):
            while await self.receive():
                pass
        return bytes(self.received[self.at :])

    def finish(self) -> None:
        """Close our direction."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


async def connected(port: int, receive_buffer: int | None = None) -> Wire:
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return Wire(sock)
