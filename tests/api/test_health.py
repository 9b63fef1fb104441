"""What `/health` says of the API's own parts."""

import asyncio
from pathlib import Path

import httpx

from api.app import create_app
from mini_studio.settings import Kafka, Settings
from tests.fakes.broker import free_port


async def test_it_says_why_the_routes_cannot_be_followed(tmp_path: Path) -> None:
    app = create_app(Settings(data=tmp_path, kafka=Kafka(bootstrap=f"127.0.0.1:{free_port()}")))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://api") as api:
        async with asyncio.timeout(10):
            while "cannot be followed" not in (answer := (await api.get("/health")).json())["problems"]["routes"]:
                await asyncio.sleep(0.05)
    assert answer["status"] == "degraded"
