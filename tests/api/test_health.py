"""What `/health` says of the API's own parts."""

import asyncio
import sqlite3

import httpx

from mini_studio.settings import Settings


async def test_it_says_why_the_routes_cannot_be_followed(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while "cannot be followed" not in (answer := (await client.get("/health")).json())["problems"]["routes"]:
            await asyncio.sleep(0.05)
    assert answer["status"] == "degraded"


async def test_it_says_that_the_record_store_takes_no_writes(client: httpx.AsyncClient, settings: Settings) -> None:
    assert "records" not in (await client.get("/health")).json()["problems"]
    lock = sqlite3.connect(settings.record_file, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    assert "locked" in (await client.get("/health")).json()["problems"]["records"]
    lock.close()
    assert "records" not in (await client.get("/health")).json()["problems"]
