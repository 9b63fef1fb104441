"""A gateway in a thread of its own, under its real server, with either client; the routes are the test's."""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import structlog
import uvloop
from fastapi import FastAPI

from api.gateway.app import create_gateway
from api.server import Server, config
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.records.routes import Route
from mini_studio.settings import MIB, Api, Gateway, Kafka, Settings
from tests.fakes.broker import free_port
from tests.gateway.recording import Recorder, recorder
from tests.gateway.wire import Wire, connected

Client = Literal["plain", "fast"]
CLIENTS: tuple[Client, ...] = ("plain", "fast")
START_S = 30
MAX_BODY = 16 * MIB
INFER = b"/inference/infer/m"


def route_to(*endpoints: str, model: str = "m", client: str = "", revision: int = 1, path: str = "/predict") -> Route:
    """A route, ready. There is one for each model and client."""
    kind = DeploymentKind.FINE_TUNED if client else DeploymentKind.BASE
    return Route(
        deployment_id=f"dep_{client}_{model}", name=f"{client or 'shared'}-{model}", client_code=client, kind=kind,
        model=model, base_model=model, status=DeploymentStatus.READY, endpoints=list(endpoints), requested_at="",
        revision=revision, predict_path=path,
    )  # fmt: skip


class Served:
    """A gateway that runs."""

    def __init__(self, app: FastAPI, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.app, self.port, self.client = app, port, ""
        self._loop = loop
        self._revision = 0

    def route(self, *servers: Recorder, model: str = "m", client: str = "", path: str = "/predict") -> None:
        """From now on these answer."""
        self.route_urls(*(server.url for server in servers), model=model, client=client, path=path)

    def route_urls(self, *urls: str, model: str = "m", client: str = "", path: str = "/predict") -> None:
        self._revision += 1
        route = route_to(*urls, model=model, client=client, revision=self._revision, path=path)

        async def put() -> None:
            self.app.state.routes.put(route.key, route, route.revision)

        asyncio.run_coroutine_threadsafe(put(), self._loop).result(START_S)

    async def connect(self, receive_buffer: int | None = None) -> Wire:
        return await connected(self.port, receive_buffer)


def settings_for(client: Client, data: Path, *, max_body: int = MAX_BODY, **changes: Any) -> Settings:
    kafka = Kafka(bootstrap=f"127.0.0.1:{free_port()}")  # where nobody answers
    return Settings(data=data, kafka=kafka, api=Api(max_body_bytes=max_body), gateway=Gateway(client=client, **changes))


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[Served]:
    # A line for each request, from another thread, would end up between pytest's own.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    app = create_gateway(settings)
    server = Server(config(app, settings), app)
    loop = uvloop.new_event_loop()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:

        def run() -> None:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(server.serve([listener]))

        thread = threading.Thread(target=run, name="gateway", daemon=True)
        thread.start()
        try:
            deadline = threading.Event()
            while not server.started and thread.is_alive():
                deadline.wait(0.01)
            app.state.routes.loaded = True
            yield Served(app, listener.getsockname()[1], loop)
        finally:
            server.should_exit = server.force_exit = True
            thread.join(START_S)
            structlog.reset_defaults()
    assert not thread.is_alive()


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Client:
    """Which client of the model servers."""
    chosen: Client = request.param
    return chosen


@pytest.fixture(scope="module")
def gateway(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(settings_for(client, tmp_path_factory.mktemp("gateway"))) as served:
        yield served


@pytest.fixture
async def model(gateway: Served) -> AsyncIterator[Recorder]:
    """The server behind the shared route `m`."""
    async with recorder() as server:
        gateway.route(server)
        yield server


@pytest.fixture
async def caller(gateway: Served, model: Recorder) -> AsyncIterator[Wire]:
    """A client of the gateway."""
    wire = await gateway.connect()
    yield wire
    wire.close()


def post(body: bytes = b"{}", *headers: bytes, path: bytes = INFER) -> bytes:
    """A usual request."""
    framing = b"Content-Length: %d" % len(body)
    return b"\r\n".join(
        [b"POST %s HTTP/1.1" % path, b"Host: x", b"Content-Type: application/json", framing, *headers, b"", body]
    )


def started(*headers: bytes, body: bytes = b"", path: bytes = INFER) -> bytes:
    """A request whose framing is among the headers."""
    return b"\r\n".join([b"POST %s HTTP/1.1" % path, b"Host: x", *headers, b"", body])
