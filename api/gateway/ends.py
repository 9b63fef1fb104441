"""How a client's connection ends: when it is found to be gone, and when an answer comes before its request is whole."""

import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from api.server import HttpProtocol

TOO_LARGE = 413
LINGER_S = 2.0
"""How long a client may go on to send a body that nobody reads, before its connection is closed: at once would reset it, answer and all."""
GONE = (7, 8)
"""TCP_CLOSE and TCP_CLOSE_WAIT: the peer of a connection has ended it."""
RESET_AT_CLOSE = struct.pack("ii", 1, 0)


def linger(loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
    """End what we send, and let go of the connection a moment later."""
    if not transport.is_closing():
        transport.write_eof()
        loop.call_later(LINGER_S, transport.close)


def ending_when_early(protocol: "HttpProtocol", app: Any, cycle: Any) -> Any:
    """The ASGI application, whose answer to a request that is not there to its end says that the connection ends with it.

    Whoever asked whether to send the body will not do so now; nor is a large one read only to keep a connection.
    """

    async def run(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            early = message["type"] == "http.response.start" and (cycle.more_body or message["status"] == TOO_LARGE)
            if early:
                protocol.ending = True
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)
            if early:
                # uvicorn would close at once, which resets the connection under a client that still sends.
                cycle.keep_alive = True

        await app(scope, receive, sent)

    return run


def gone(transport: asyncio.Transport) -> bool:
    """Whether the peer has ended the connection, behind whatever of it is still to be read."""
    if not hasattr(socket, "TCP_INFO"):
        return False
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as own:
        return own.family != socket.AF_UNIX and own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in GONE


def reset(transport: asyncio.Transport) -> None:
    """End the connection such that its peer sees a failure, where an orderly end would be that of the answer."""
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
    transport.abort()
