"""What `/health` says of the API's own parts."""

import asyncio

import httpx


async def test_it_says_why_the_routes_cannot_be_followed(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while "cannot be followed" not in (answer := (await client.get("/health")).json())["problems"]["routes"]:
            await asyncio.sleep(0.05)
    assert answer["status"] == "degraded"
