"""A gateway that tells a load, and nothing else, over a real socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class LoadGateway:
    """`requests` by deployment is what it tells; while `status` is another than 200, it tells nothing."""

    def __init__(self) -> None:
        self.requests: dict[str, float] = {}
        self.status = 200
        self.asked = 0
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            lines = [f'mini_studio_gateway_requests{{deployment="{name}"}} {n}' for name, n in self.requests.items()]
            body = "\n".join(["# TYPE mini_studio_gateway_requests gauge", *lines, ""]).encode()
            head = f"HTTP/1.1 {self.status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def load_gateway() -> AsyncIterator[LoadGateway]:
    gateway = LoadGateway()
    server = await asyncio.start_server(gateway.answer, "127.0.0.1", 0)
    gateway.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield gateway
