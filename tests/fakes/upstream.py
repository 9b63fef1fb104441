"""A model server on a socket that answers each request with the bytes it is told, and keeps what it was sent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@dataclass
class Upstream:
    answer: bytes | None = OK
    """None: silence."""
    heads: list[bytes] = field(default_factory=list)
    """Request lines and headers, lower case."""
    bodies: list[bytes] = field(default_factory=list)
    connections: int = 0
    left: int = 0
    """Connections that the other side closed."""
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                self.heads.append(head)
                length = head.partition(b"content-length: ")[2].split(b"\r\n")[0]
                self.bodies.append(await reader.readexactly(int(length or 0)))
                if self.answer is not None:
                    writer.write(self.answer)
        self.left += 1
        writer.close()


@contextlib.asynccontextmanager
async def upstream() -> AsyncIterator[Upstream]:
    model = Upstream()
    server = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    async with server:
        model.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield model
