"""Routes on a real broker, replicas as processes, and clients who keep asking."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from events.deployments import DeploymentReady
from mini_studio.bus.kafka import Publisher, create_topics
from mini_studio.bus.relay import outgoing
from mini_studio.records.routes import RouteRecord
from mini_studio.settings import Kafka
from tests.fakes.broker import free_port
from tests.fakes.replica import ReplicaProcess
from tests.unit.test_records import deployment, follow, status

MODEL = "tiny-llama"
CLIENTS = 6


class Routes:
    """The one deployment's route, as consumer `routes` publishes it."""

    def __init__(self) -> None:
        self._deployment = deployment("", weights=None)
        self._record = RouteRecord.of(self._deployment)
        self._sequence = 0

    @property
    def name(self) -> str:
        return self._deployment.name

    async def publish(self, bootstrap: str, replicas: Sequence[ReplicaProcess]) -> None:
        """The deployment is ready at these replicas from now on."""
        self._sequence += 1
        endpoints = [replica.url for replica in replicas]
        self._deployment = status(
            self._deployment, DeploymentReady, self._sequence, endpoints=endpoints, replicas=len(endpoints)
        )
        self._record = follow(self._record, self._deployment)
        settings = Kafka(bootstrap=bootstrap)
        async with Publisher(settings) as publisher:
            await publisher.publish([outgoing(self._record.outbox[-1])])


class Asking:
    """Clients that ask one gateway, each again as soon as it has its answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.statuses: Counter[int | str] = Counter()
        """Answers by status, or the error that the client had."""
        self.pids: Counter[int] = Counter()
        """Answers by replica."""

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=30) as client:
            while True:
                try:
                    answer = await client.post(f"/inference/infer/{MODEL}", content=b'{"prompt": "x"}')
                except httpx.HTTPError as error:
                    self.statuses[type(error).__name__] += 1
                    await asyncio.sleep(0.05)
                    continue
                self.statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    self.pids[answer.json()["pid"]] += 1


@contextlib.asynccontextmanager
async def asking(url: str, clients: int = CLIENTS) -> AsyncIterator[Asking]:
    load = Asking(url)
    tasks = [asyncio.create_task(load.run()) for _ in range(clients)]
    try:
        yield load
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def more(count: Callable[[], int], by: int = 20) -> Callable[[], bool]:
    """Whether there are so many more than there were when this was called."""
    before = count()
    return lambda: count() >= before + by


@pytest.fixture
def replicas() -> Iterator[list[ReplicaProcess]]:
    started: list[ReplicaProcess] = []
    try:
        for _ in range(2):
            started.append(ReplicaProcess())
        yield started
    finally:
        for replica in started:
            replica.end()


@pytest.fixture
def routes() -> Routes:
    return Routes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "gateways"


@pytest.fixture
def broker_port() -> int:
    return free_port()


async def prepare(bootstrap: str) -> None:
    await create_topics(Kafka(bootstrap=bootstrap))
