"""A TCP proxy between a client and a server of this machine whose connections can be frozen: open, and silent."""

import asyncio
import contextlib
from typing import Self


class FaultProxy:
    """Forwards what comes to `port`. Use it as an async context; set `target` before anyone connects."""

    def __init__(self, target: int = 0) -> None:
        self.target = target
        self.port = 0
        self._gates: set[asyncio.Event] = set()
        self._new_frozen = False
        self._connections: set[asyncio.Task[None]] = set()

    def freeze(self, *, new: bool) -> None:
        """From now on the present connections carry nothing, and neither do later ones if `new`."""
        self._new_frozen = new
        for gate in self._gates:
            gate.clear()

    def thaw(self) -> None:
        """Everything goes on, with what was held back."""
        self._new_frozen = False
        for gate in self._gates:
            gate.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        gate = asyncio.Event()
        self._gates.add(gate)
        if not self._new_frozen:
            gate.set()
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.target)
        try:
            await asyncio.gather(_pump(reader, upstream_writer, gate), _pump(upstream_reader, writer, gate))
        finally:
            self._gates.discard(gate)
            self._connections.discard(task)
            writer.close()
            upstream_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            await gate.wait()
            writer.write(data)
            await writer.drain()
    writer.close()
