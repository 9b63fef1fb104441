"""A server in between: speaks TLS with the client where it has a certificate, and may spoil what passes to the server."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable

from tests.fakes.certificates import Certificates

Spoil = Callable[[bytes], bytes]


@contextlib.asynccontextmanager
async def between(
    port: int, certificates: Certificates | None = None, spoil: Spoil = lambda chunk: chunk
) -> AsyncIterator[int]:
    """The port to connect to instead of `port`."""
    context = None
    if certificates is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates.certificate, certificates.key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_pass(reader, to_server[1], spoil), _pass(to_server[0], writer, lambda chunk: chunk))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, spoil: Spoil) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(256 * 1024):
            writer.write(spoil(chunk))
            await writer.drain()
    writer.close()
