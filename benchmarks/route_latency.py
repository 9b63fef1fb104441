"""From a deployment's event to the gateways: `python -m benchmarks.route_latency [--count N] [--wait-ms MS] [--bootstrap HOST:PORT]`.

Consumer `routes` and two gateways run as processes, on an embedded broker of this run's own or on the one given. This process
writes as the API and the serving watcher do: a record with its event, which its relay publishes. Timed is from before that
write until every gateway answers accordingly (the model's 200, or 404 after its removal), asked each every 5 ms, by
a client that costs next to nothing: all of this runs on the same cores.

The baseline, in turns with it: a bare aiokafka client produces to the topic of the routes, another one with the same wait
consumes it. Prints ms, and how many times the baseline's that is.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from events.base import Cause
from events.deployments import DeployRequested, Scale
from events.topics import ROUTES
from events.types import DeploymentKind
from mini_studio.bus.kafka import create_topics
from mini_studio.embedded.stack import ROUTE_WAIT_MS
from mini_studio.records.deployments import Deployment, deployment_id, removal
from mini_studio.records.record import ANYONE
from mini_studio.records.releases import Release
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import Studio, open_studio
from tests.fakes.broker import broker_process
from tests.fakes.gateways import GatewayProcess, Process, gateways
from tests.fakes.upstream import upstream

GATEWAYS = 2
ASK_EVERY_S = 0.005
JOINED_S = 30.0
IDLE_S = 10.0
CAUSE = Cause(correlation_id="benchmark")


class Log:
    """A bare consumer of the events and routes: when each record was sent, and when it was here."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self.consumer = consumer
        self.sent: dict[str, float] = {}
        """Unix seconds by `ce_id`."""
        self.came: dict[str, float] = {}
        self.types: dict[tuple[str, str], str] = {}
        """`ce_id` by key and type."""

    async def follow(self) -> None:
        async for record in self.consumer:
            headers = {name: value.decode() for name, value in record.headers}
            id = headers["ce_id"]
            self.came[id] = time.time()
            self.sent[id] = record.timestamp / 1000
            self.types[record.key.decode(), headers.get("ce_type", id)] = id


@contextlib.asynccontextmanager
async def following(kafka: Kafka) -> AsyncIterator[Log]:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=kafka.routes_wait_ms,
    )
    await consumer.start()
    consumer.assign([TopicPartition(ROUTES, 0)])
    log = Log(consumer)
    task = asyncio.create_task(log.follow())
    try:
        yield log
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await consumer.stop()


class Asker:
    """One connection to a gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def status(self, model: str) -> int:
        head = f"POST /inference/infer/{model} HTTP/1.1\r\nhost: gateway\r\ncontent-length: 2\r\n\r\n{{}}"
        self._writer.write(head.encode())
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = answer.partition(b"content-length: ")[2].split(b"\r\n")[0]
        await self._reader.readexactly(int(length))
        return int(answer.split(b" ")[1])


async def answered(asker: Asker, model: str, status: int) -> float:
    """When the gateway gave this answer (perf_counter)."""
    deadline = time.perf_counter() + JOINED_S
    while (got := await asker.status(model)) != status:
        assert time.perf_counter() < deadline, f"{got}, not {status}, for {model}"
        await asyncio.sleep(ASK_EVERY_S)
    return time.perf_counter()


async def everywhere(clients: list[Asker], model: str, status: int, began: float) -> float:
    """Ms from `began` until the last gateway gave this answer."""
    return (max(await asyncio.gather(*(answered(client, model, status) for client in clients))) - began) * 1000


def requested(model: str) -> DeployRequested:
    return DeployRequested(
        deployment_id=deployment_id("", DeploymentKind.BASE, model, None),
        generation=1,
        name=model,
        kind=DeploymentKind.BASE,
        model=model,
        base_model=model,
        scale=Scale(gpu_count=0, min_replicas=1, max_replicas=1, prometheus_threshold=5),
    )


async def deploy(studio: Studio, model: str) -> str:
    """As the API and consumer `serving` leave it; its id."""
    event = requested(model)
    record = await studio.deployments.request("", event, CAUSE)
    release = Release(
        id=record.id, client_code="", created_at=record.created_at, cause=CAUSE, request=event, generation=1
    )
    await studio.releases.insert(release)
    return record.id


async def one(studio: Studio, clients: list[Asker], model: str, endpoint: str) -> tuple[str, float, float]:
    """The deployment's id, and how long it took to become routable, and to be gone."""
    id = await deploy(studio, model)
    await everywhere(clients, model, 503, 0)
    await pause()
    began = time.perf_counter()
    await studio.releases.change(ANYONE, id, lambda release: release.ready(1, [endpoint], 1, None))
    ready = await everywhere(clients, model, 200, began)
    await pause()
    began = time.perf_counter()
    await studio.deployments.change(ANYONE, id, lambda present: removal(present, CAUSE))
    return id, ready, await everywhere(clients, model, 404, began)


async def pause() -> None:
    """In no step with anybody's fetches."""
    await asyncio.sleep(random.uniform(0.1, 0.6))


async def bare(producer: AIOKafkaProducer, log: Log, n: int) -> float:
    """Ms from a record's send to its arrival. It is the tombstone of a route that never was."""
    await pause()
    id, began = f"baseline/{n + 1}", time.time()
    await producer.send_and_wait(ROUTES, key=b"baseline", headers=[("ce_id", id.encode())])
    while id not in log.came:
        await asyncio.sleep(0.0005)
    return (log.came[id] - began) * 1000


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def idle(processes: dict[str, int]) -> str:
    """CPU of each, in % of one core, while nothing happens."""
    known = {name: psutil.Process(pid) for name, pid in processes.items()}
    before = {name: cpu(process) for name, process in known.items()}
    await asyncio.sleep(IDLE_S)
    used = {name: (cpu(process) - before[name]) / IDLE_S * 100 for name, process in known.items()}
    return ", ".join(f"{name} {percent:.1f}" for name, percent in used.items())


def report(name: str, delays: list[float], baseline: list[float]) -> None:
    figures = []
    for label, share in (("p50", 50), ("p99", 99)):
        value, base = (
            statistics.quantiles(found, n=100, method="inclusive")[share - 1] for found in (delays, baseline)
        )
        figures.append(f"{label} {value:6.1f} ms ({value / base:4.1f}x)")
    print(f"{name:36} {', '.join(figures)}, longest {max(delays):6.1f} ms")


async def measure(settings: Settings, started: list[GatewayProcess], processes: dict[str, int], count: int) -> None:
    ready, gone, baseline = [], [], []
    async with contextlib.AsyncExitStack() as stack:
        model = await stack.enter_async_context(upstream())
        collections = (Deployment.COLLECTION, Release.COLLECTION)
        studio = await stack.enter_async_context(open_studio(settings, relayed=collections))
        log = await stack.enter_async_context(following(settings.kafka))
        producer = AIOKafkaProducer(bootstrap_servers=settings.kafka.bootstrap, acks="all")
        await producer.start()
        stack.push_async_callback(producer.stop)
        clients = [Asker(*await asyncio.open_connection("127.0.0.1", gateway.port)) for gateway in started]
        await one(studio, clients, "warm-up", model.url)
        for n in range(count):
            _, ready_ms, gone_ms = await one(studio, clients, f"model-{n}", model.url)
            ready.append(ready_ms)
            gone.append(gone_ms)
            baseline.append(await bare(producer, log, n))
    print(f"fetches wait {settings.kafka.routes_wait_ms} ms; {count} of each; idle CPU %: {await idle(processes)}")
    report("bare aiokafka, produce -> consume", baseline, baseline)
    report(f"ready event -> {GATEWAYS} gateways", ready, baseline)
    report(f"removal -> {GATEWAYS} gateways", gone, baseline)


@contextlib.contextmanager
def broker(given: str | None) -> Iterator[tuple[str, int | None]]:
    """Its address, and its pid if it is this run's own."""
    if given:
        yield given, None
        return
    with broker_process() as (bootstrap, process):
        yield bootstrap, process.pid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--wait-ms", type=int, default=ROUTE_WAIT_MS, help="kafka.route_wait_ms")
    parser.add_argument("--bootstrap", help="a running Apache Kafka")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, broker(given.bootstrap) as (bootstrap, pid):
        data = Path(folder)
        kafka = Kafka(bootstrap=bootstrap, route_wait_ms=given.wait_ms, idempotent=pid is None)
        asyncio.run(create_topics(kafka))
        environment = {
            "MINI_STUDIO_KAFKA__BOOTSTRAP": bootstrap,
            "MINI_STUDIO_KAFKA__ROUTE_WAIT_MS": str(given.wait_ms),
            "MINI_STUDIO_KAFKA__IDEMPOTENT": str(kafka.idempotent),
        }
        consumer = Process(["consume", "routes", "--data", folder], environment, data / "routes.log")
        try:
            with gateways(bootstrap, data, GATEWAYS, KAFKA__ROUTE_WAIT_MS=given.wait_ms, LOG__LEVEL="error") as started:
                processes = {"consumer": consumer.process.pid, "gateway": started[0].process.pid}
                processes |= {"broker": pid} if pid else {}
                asyncio.run(measure(Settings(data=data, kafka=kafka), started, processes, given.count))
        finally:
            consumer.end()


if __name__ == "__main__":
    main()
