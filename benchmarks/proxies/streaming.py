"""A model server that streams, `python -m benchmarks.proxies.streaming PORT`, and the client that times its chunks.

A request's body says how: `{"chunks": 20, "interval_s": 0.1}`. Each chunk is one server-sent event that holds the clock at
its writing (CLOCK_MONOTONIC, which all processes of a machine share), so that its reader knows how long it took.
"""

import asyncio
import json
import re
import sys
import time
from typing import cast

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
AT = re.compile(rb'"at": (\d+)')
END = b"0\r\n\r\n"


class Streamer(asyncio.Protocol):
    """One connection; requests come one after another and in one piece each."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._received = b""
        self._gone = False

    def data_received(self, data: bytes) -> None:
        self._received += data
        body = self._received.partition(b"\r\n\r\n")[2]
        if b"}" in body:
            self._received = b""
            asked = json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])
            self._transport.write(HEAD)
            self._next(int(asked.get("chunks", 1)), float(asked.get("interval_s", 0)))

    def _next(self, left: int, interval_s: float) -> None:
        if self._gone:
            return
        event = b'data: {"at": %d}\n\n' % time.monotonic_ns()
        chunk = b"%x\r\n%s\r\n" % (len(event), event)
        self._transport.write(chunk if left > 1 else chunk + END)
        if left > 1:
            asyncio.get_running_loop().call_later(interval_s, self._next, left - 1, interval_s)

    def connection_lost(self, error: Exception | None) -> None:
        self._gone = True


class Reader(asyncio.Protocol):
    """One streamed request; `delays` in microseconds."""

    def __init__(self, head: bytes) -> None:
        self._head = head
        self.delays: list[float] = []
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self._head)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.delays += [(now - int(at)) / 1000 for at in AT.findall(data)]
        if self.delays and not self.started.done():
            self.started.set_result(None)
        if data.endswith(END) and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        for future in (self.started, self.ended):
            if not future.done():
                future.set_exception(ConnectionError("the stream broke off"))


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Streamer, "127.0.0.1", int(sys.argv[1]), backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
