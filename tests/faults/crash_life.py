"""One life of a whole studio in one process, forked from a warm parent: API, relays, consumers and their reconcilers, on real sockets.

`World` is what survives the lives: the data folder, the broker, the trainings and model servers of tests/faults/standins.py.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from aiokafka import AIOKafkaConsumer, TopicPartition

from api import server
from api.app import create_app
from api.server import HttpProtocol, Server
from consumers.app import CONSUMERS
from consumers.app import run as run_consumers
from mini_studio import logs, maintenance, wiring
from mini_studio.bus import delivery, relay
from mini_studio.bus.kafka import create_topics
from mini_studio.settings import Api, Kafka, Log, Serving, Settings, Training, Uploads
from tests.fakes.broker import free_port, running_broker
from tests.faults.at_rest import moving
from tests.faults.history import History
from tests.faults.standins import ContestedStore, Outages, StandInStudio, Trainers, answer

PR_SET_PDEATHSIG = 1
START_S = 20.0
PATIENCE_S = 0.6
"""Silence of a trainer after which its attempt is lost, and of a starting model server."""


class Died(Exception):
    """The life ended under the request, or while something was waited for."""


class World:
    """What survives a life, and the one life that there is at a time."""

    def __init__(self, folder: Path, bootstrap: str, grouped: bool) -> None:
        self.data = folder / "data"
        self.data.mkdir(parents=True)
        self.settings = settings(self.data, bootstrap)
        self.outages, self.trainers = Outages(self.data), Trainers(self.data)
        self.history = History(folder / "history.jsonl")
        self.history_file, self.log = folder / "history.jsonl", folder / "life.log"
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.settings.api.port}", timeout=20, trust_env=False)
        self.endpoint_port = free_port()
        self.grouped = grouped
        """Whether consumers join their groups, which takes the embedded broker 5 s. Else they are given their partitions; what they
        acknowledge is the group's position all the same."""
        self.poisons: list[tuple[str, bytes]] = []
        """Topic and value of every record that was put on the log and is no event."""
        self.backwards: list[str] = []
        """Aggregates whose events were put on the log in the wrong order."""
        self._life: int | None = None
        self.ended: int | None = None
        """The last life's wait status."""

    def start(self) -> None:
        """A new life; returns as soon as its API answers, or when it died before."""
        assert self._life is None
        self.log.unlink(missing_ok=True)
        self._life = os.fork()
        if self._life == 0:
            _live(self)
        deadline = time.monotonic() + START_S
        while self.alive:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health").json():
                    return
            assert time.monotonic() < deadline, "the life does not come up"
            time.sleep(0.01)

    @property
    def alive(self) -> bool:
        if self._life is not None:
            pid, status = os.waitpid(self._life, os.WNOHANG)
            if pid:
                self._life, self.ended = None, status
        return self._life is not None

    @property
    def was_killed(self) -> bool:
        """Whether the last life ended as an armed point ends it."""
        return self.ended is not None and os.WIFSIGNALED(self.ended) and os.WTERMSIG(self.ended) == signal.SIGKILL

    def said(self) -> str:
        """What the life logged, warnings and worse."""
        return self.log.read_text(errors="replace")

    def signal(self, signum: int) -> None:
        if self.alive and self._life is not None:
            os.kill(self._life, signum)

    def end(self) -> None:
        """Kill the life there is."""
        self.signal(signal.SIGKILL)
        self.wait(lambda: not self.alive, 10, whatever=True)

    def wait(self, condition: Callable[[], Any], seconds: float, *, whatever: bool = False) -> None:
        """Until the condition holds; the world goes on meanwhile. Raises `Died` as soon as the life is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not whatever and not self.alive:
                raise Died
            if time.monotonic() > deadline:
                raise TimeoutError(f"not in {seconds:.0f} s")
            self.trainers.step()
            time.sleep(0.02)

    def dies(self, seconds: float) -> bool:
        """Whether the life ends within this time."""
        with contextlib.suppress(TimeoutError):
            self.wait(lambda: not self.alive, seconds, whatever=True)
        return not self.alive

    def documents(self, client_code: str) -> dict[str, dict[str, dict[str, Any]]]:
        """Every record of one client, by collection and id, as any other process would read them."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        with contextlib.closing(sqlite3.connect(f"file:{self.settings.record_file}?mode=ro", uri=True)) as db:
            db.execute("BEGIN")
            for collection in wiring.COLLECTIONS:
                sql = f"SELECT id, version, outbox, doc FROM {collection.name} WHERE doc ->> '$.client_code' = ?"  # noqa: S608
                rows = db.execute(sql, (client_code,)).fetchall()
                found[collection.name] = {
                    id: {**json.loads(doc), "version": version, "outbox": json.loads(outbox)}
                    for id, version, outbox, doc in rows
                }
        return found

    def journalled(self, subject: str) -> list[dict[str, Any]]:
        """What the journal has of one aggregate."""
        with contextlib.closing(sqlite3.connect(f"file:{self.settings.record_file}?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT stored FROM event_journal WHERE key = ? ORDER BY position", (subject,)).fetchall()
        return [json.loads(stored) for (stored,) in rows]

    def forget(self, collection: str, id: str) -> None:
        """Drop one record, as an operator does who wants it rebuilt."""
        with contextlib.closing(sqlite3.connect(self.settings.record_file, isolation_level=None)) as db:
            db.execute(f"DELETE FROM {collection} WHERE id = ?", (id,))  # noqa: S608

    @staticmethod
    def readers(topic: str) -> list[str]:
        """The consumers that read a topic."""
        return [name for name, consumer in CONSUMERS.items() if topic in consumer.topics]

    def apart(self, work: Callable[[], Any]) -> Any:
        """Do what needs an event loop in a process of its own: this one must stay fit to be forked. JSON comes back."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writing, json.dumps(work()).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        return json.loads(said)


def settings(data: Path, bootstrap: str) -> Settings:
    """Everything a moment apart, so that a life is short."""
    return Settings(
        data=data,
        api=Api(port=free_port(), deploy_wait_s=5),
        kafka=Kafka(bootstrap=bootstrap, partitions=1, fetch_wait_ms=20, session_timeout_ms=6000),
        uploads=Uploads(sweep_after_s=0.2),
        training=Training(
            max_running=20, poll_s=0.03, max_attempts=10, lost_after_s=PATIENCE_S, start_timeout_s=PATIENCE_S
        ),
        serving=Serving(poll_s=0.05, ready_timeout_s=PATIENCE_S),
    )


@contextlib.contextmanager
def world(folder: Path, *, grouped: bool = False) -> Iterator[World]:
    """A new one, with a broker of its own."""
    with running_broker() as bootstrap:
        made = World(folder, bootstrap, grouped)
        made.apart(lambda: asyncio.run(create_topics(made.settings.kafka)))
        try:
            yield made
        finally:
            made.end()
            made.client.close()
            made.history.close()


def unfinished(documents: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """What is still on its way, and what has still to be published."""
    found = [
        f"{name}/{id} has events to publish" for name, all in documents.items() for id, d in all.items() if d["outbox"]
    ]
    return found + moving(documents)


def _live(world: World) -> None:
    """In the child. Ends by a kill, or with 0 when it was asked to stop."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(world.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        StandInStudio.OUTAGES = ContestedStore.OUTAGES = world.outages
        StandInStudio.ENDPOINT = f"http://127.0.0.1:{world.endpoint_port}"
        logs.configure(Log(format="json", level="warning"), "life")
        wiring.Studio = StandInStudio  # type: ignore[misc]
        wiring.SqliteStore = ContestedStore  # type: ignore[misc]
        delivery.BACKOFF_MIN_S = 0.02
        server.LAST_CALL_S, relay.BATCH = 0.1, 2  # a few events are more than one batch
        if not world.grouped:
            AIOKafkaConsumer.subscribe = _assign
        asyncio.run(_run(world))
        code = 0
    finally:
        os._exit(code)


def _assign(consumer: AIOKafkaConsumer, topics: Any = (), **_: Any) -> None:
    StandInStudio.OUTAGES.raise_for("consumers")
    consumer.assign([TopicPartition(topic, 0) for topic in topics])


async def _run(world: World) -> None:
    settings = world.settings
    model_server = await asyncio.start_server(answer, "127.0.0.1", world.endpoint_port)
    relaying = asyncio.create_task(maintenance.relay(settings, None))
    await asyncio.sleep(0)  # its signal handlers are the consumers' and the API's in a moment
    consuming = asyncio.create_task(run_consumers(list(CONSUMERS), settings, None))
    app = create_app(settings)
    config = uvicorn.Config(app, http=HttpProtocol, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    with socket.create_server((settings.api.host, settings.api.port)) as listening:
        serving = asyncio.create_task(Server(config, app).serve([listening]))
        await asyncio.gather(consuming, serving)
    relaying.cancel()
    model_server.close()
