"""A proxy without a framework: raw ASGI and aiohttp. `UPSTREAM=http://... uvicorn benchmarks.proxies.asgi_aiohttp:app`."""

import os
from typing import Any

import aiohttp

UPSTREAM = os.environ["UPSTREAM"] + "/predict"
_sessions: list[aiohttp.ClientSession] = []


def session() -> aiohttp.ClientSession:
    if not _sessions:
        _sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False))
    return _sessions[0]


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    async with session().post(UPSTREAM, data=body, headers={"content-type": "application/json"}) as answer:
        headers = [(name.lower(), value) for name, value in answer.raw_headers if name.lower() == b"content-type"]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        async for chunk in answer.content.iter_any():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
