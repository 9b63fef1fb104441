"""`mini-studio gateway` as a process of its own, the routes that it reads, and consumers beside it."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import httpx

from events.topics import ROUTES
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.bus.kafka import Outgoing, Publisher, create_topics
from mini_studio.records.routes import Route
from mini_studio.settings import Kafka
from tests.fakes.broker import free_port, running_broker, wait_for

START_S = 60


class Process:
    """A command of the studio, whose settings come from the environment."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command = [sys.executable, "-m", "mini_studio.cli", *command]
        self._environment = environment
        self.log = log
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, env={**os.environ, **self._environment}, stdout=output, stderr=subprocess.STDOUT
            )

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """Whatever state it is in, a stopped one included."""
        self.send(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


class GatewayProcess(Process):
    """A gateway on a port of its own; `settings` are environment variables without their prefix."""

    def __init__(self, bootstrap: str, folder: Path, **settings: object) -> None:
        self.port = free_port()
        given = {
            "API__PORT": self.port,
            "API__HOST": "127.0.0.1",
            "KAFKA__BOOTSTRAP": bootstrap,
            "KAFKA__FETCH_WAIT_MS": 20,
            **settings,
        }
        environment = {f"MINI_STUDIO_{name}": str(value) for name, value in given.items()}
        super().__init__(["gateway", "--data", str(folder)], environment, folder / f"gateway-{self.port}.log")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def until_ready(self) -> None:
        """Return when it has read the routes."""
        wait_for(self.port, START_S)
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def metric(self, name: str, **labels: str) -> float:
        """A sample of its metrics; 0 where there is none."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        of = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        found = (line.rpartition(" ") for line in text.splitlines())
        return sum(float(value) for series, _, value in found if series == (f"{name}{{{of}}}" if of else name))


def shared_route(model: str, *endpoints: str) -> Route:
    """Of a base model that all clients may ask, ready."""
    return Route(
        deployment_id=f"dep_{model}",
        name=f"vllm-base-{model}",
        client_code="",
        kind=DeploymentKind.BASE,
        model=model,
        base_model=model,
        status=DeploymentStatus.READY,
        endpoints=list(endpoints),
        requested_at="2026-01-01T00:00:00Z",
        revision=1,
    )


async def publish_routes(bootstrap: str, routes: Sequence[Route]) -> None:
    """Put them on a log, whose topics are made where they are missing."""
    settings = Kafka(bootstrap=bootstrap)
    await create_topics(settings)
    entries = [
        Outgoing(ROUTES, r.key.encode(), r.model_dump_json().encode(), [("ce_id", f"{r.key}/{r.revision}".encode())])
        for r in routes
    ]
    async with Publisher(settings) as publisher:
        await publisher.publish(entries)


@contextlib.contextmanager
def gateways(bootstrap: str, folder: Path, count: int = 1, **settings: object) -> Iterator[list[GatewayProcess]]:
    """So many, each ready; ended with the context."""
    folder.mkdir(parents=True, exist_ok=True)
    started: list[GatewayProcess] = []
    try:
        for _ in range(count):
            started.append(GatewayProcess(bootstrap, folder, **settings))
        for gateway in started:
            gateway.until_ready()
        yield started
    finally:
        for gateway in started:
            gateway.end()


@contextlib.asynccontextmanager
async def routed_gateway(route: Route, **settings: object) -> AsyncIterator[str]:
    """The address of one that knows this route alone, from a log of its own."""
    with contextlib.ExitStack() as stack:
        bootstrap = stack.enter_context(running_broker())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        await publish_routes(bootstrap, [route])
        started = gateways(bootstrap, folder, LOG__LEVEL="warning", **settings)
        [gateway] = await asyncio.to_thread(stack.enter_context, started)
        yield gateway.url
