"""A model server on a bare socket that keeps every byte it was sent, and answers, or misbehaves, as a test wants."""

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from tests.gateway.wire import PATIENCE_S, MalformedError, Message, Wire, parsed

Behaviour = Callable[[Wire], Awaitable[None]]
"""What the server does with one connection. It is closed afterwards."""


def framed(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """An answer with a Content-Length."""
    return b"\r\n".join([b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers, b"", body])


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def digest(server: str, body: bytes) -> bytes:
    """What an echoing server answers: who it is, and what it was sent."""
    return f"{server} {hashlib.sha256(body).hexdigest()}".encode()


def always(answer: bytes) -> Behaviour:
    """Answer each request with these bytes, once it is whole."""

    async def behave(wire: Wire) -> None:
        while await wire.message():
            await wire.send(answer)

    return behave


def once(answer: bytes) -> Behaviour:
    """Answer one request with these bytes, and close."""

    async def behave(wire: Wire) -> None:
        if await wire.message():
            await wire.send(answer)

    return behave


async def silent(wire: Wire) -> None:
    """Take everything, say nothing, until the other side goes."""
    while await wire.receive():
        pass


class Recorder:
    """The server. Unless told otherwise it echoes."""

    def __init__(self, name: str, receive_buffer: int | None) -> None:
        self.name = name
        self.behave: Behaviour = self.echo
        self.wires: list[Wire] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._listener = socket.socket()
        if receive_buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(1024)
        self._listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    async def echo(self, wire: Wire) -> None:
        while request := await wire.message():
            await wire.send(framed(digest(self.name, request.body)))

    async def accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire = Wire(sock)
            self.wires.append(wire)
            self._tasks.append(asyncio.create_task(self._serve(wire)))

    async def _serve(self, wire: Wire) -> None:
        try:
            await self.behave(wire)
        finally:
            wire.close()

    @property
    def requests(self) -> list[Message]:
        """All whole requests, in the bytes as they came. Raises `MalformedError`."""
        found = []
        for wire in self.wires:
            at = 0
            while request := parsed(wire.received[at:]):
                found.append(request)
                at += request.size
        return found

    @property
    def torn(self) -> list[Wire]:
        """Connections on which something came that is no whole request."""
        return [wire for wire in self.wires if sum(m.size for m in wire.messages) < len(wire.received)]

    async def asked(self, connections: int = 1, patience_s: float = PATIENCE_S) -> Wire:
        """The last connection, when there are so many."""
        async with asyncio.timeout(patience_s):
            while len(self.wires) < connections:
                await asyncio.sleep(0.005)
        return self.wires[-1]

    async def left(self, patience_s: float = PATIENCE_S) -> None:
        """Return when every connection is closed by the other side."""
        async with asyncio.timeout(patience_s):
            while not (self.wires and all(wire.ended for wire in self.wires)):
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Raises what a behaviour raised."""
        for task in self._tasks:
            task.cancel()
        self._listener.close()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, OSError | MalformedError):
                raise result


@contextlib.asynccontextmanager
async def recorder(name: str = "model", receive_buffer: int | None = None) -> AsyncIterator[Recorder]:
    server = Recorder(name, receive_buffer)
    accepting = asyncio.create_task(server.accept())
    try:
        yield server
    finally:
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        await server.close()
