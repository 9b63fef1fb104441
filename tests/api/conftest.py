"""The REST application on a record store of its own, behind a real server; no broker, no other process."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.server import HttpProtocol
from mini_studio.settings import Api, Kafka, Settings
from mini_studio.wiring import Studio
from tests.fakes.broker import free_port


@contextlib.asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[str]:
    """The application's address, while it runs."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve([listening]))
        while not server.started:
            await asyncio.sleep(0.01)
            assert not running.done()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        await running


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    kafka = Kafka(bootstrap=f"127.0.0.1:{free_port()}")
    return Settings(data=tmp_path, kafka=kafka, api=Api(deploy_wait_s=5, max_body_bytes=1024 * 1024))


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
async def url(app: FastAPI) -> AsyncIterator[str]:
    async with served(app) as address:
        yield address


@pytest.fixture
async def studio(app: FastAPI, url: str) -> Studio:
    """What stands behind the API at `url`."""
    found: Studio = app.state.studio
    return found


@pytest.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as client:
        yield client
