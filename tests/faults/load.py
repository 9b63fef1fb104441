"""Clients that ask a running studio at a steady pace, and what they saw: for the tests of outages.

Jobs are submitted and never trained (no Ray is needed), and there is one deployment whose scale changes with every deploy,
so that each aggregate's events stand in a long history and nothing but one model server runs.
"""

import contextlib
import itertools
import json
import math
import random
import sqlite3
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from events.types import DeploymentKind
from mini_studio.records.deployments import deployment_id
from tests.fakes.running import ROWS, Running
from tests.faults.history import History, Request

MODEL = "tiny-llama"
CLIENTS = ("acme", "globex", "initech")
DECIDED_BY_REQUESTS = ("datasets", "jobs", "deployments")
ALL = (*DECIDED_BY_REQUESTS, "dataset_profiles", "training_runs", "releases", "routes")


@dataclass(frozen=True)
class Answer:
    """What became of one call. Times are Unix seconds."""

    kind: str
    asked: float
    seconds: float
    status: int
    retry_after: str | None
    body: Any


class Load:
    """Threads that call the studio, each at its own pace; `answers` grows until `stop`."""

    def __init__(self, studio: Running, history: History, *, per_second: float) -> None:
        self.answers: list[Answer] = []
        self.broke: list[str] = []
        """Calls without an answer."""
        self._studio, self._history = studio, history
        self._over = threading.Event()
        self._datasets: dict[str, list[str]] = {client: [] for client in CLIENTS}
        self._count = itertools.count(1)
        writing = [(self.upload, 0.2), (self.upload, 0.2), (self.submit, 0.25), (self.submit, 0.25), (self.deploy, 0.1)]
        paces = [(work, 1 / (per_second * share)) for work, share in writing]
        paces += [(self.infer, 0.25), (self.health, 0.25)]
        self._threads = [threading.Thread(target=self._repeat, args=pace, daemon=True) for pace in paces]

    def prepare(self) -> None:
        """One dataset for each client, and a deployment that is ready."""
        with client(self._studio) as http:
            for _ in CLIENTS:
                self.upload(http)
            self.deploy(http)
            self._studio.until(lambda: self.infer(http).status == 200, 300)
        self.answers.clear()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Return when the last answer is in."""
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def of(self, *kinds: str, since: float = 0.0, until: float = float("inf")) -> list[Answer]:
        """The answers to what was asked in this time."""
        return [a for a in list(self.answers) if a.kind in kinds and since <= a.asked < until]

    def upload(self, http: httpx.Client) -> Answer:
        number = next(self._count)
        owner = CLIENTS[number % len(CLIENTS)]
        rows = [*ROWS, {"prompt": f"Which number is it? {number} ", "completion": str(number)}]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path = f"/fine_tuning/upload-dataset/{owner}"
        answer = self._ask(
            http, "upload", owner, path, lambda body: body["dataset_id"], files={"file": ("rows.jsonl", content)}
        )
        if answer.status == 201:
            self._datasets[owner].append(answer.body["dataset_id"])
        return answer

    def submit(self, http: httpx.Client) -> Answer:
        owner = random.choice(CLIENTS)
        body = {"model": MODEL, "client_code": owner, "dataset_filename": random.choice(self._datasets[owner])}
        return self._ask(
            http, "submit", owner, "/fine_tuning/submit-finetune", lambda body: body["job"]["id"], json=body
        )

    def deploy(self, http: httpx.Client) -> Answer:
        """Ask for another scale; every second time without waiting."""
        number = next(self._count)
        body = {"model_id": MODEL, "prometheus_threshold": number}
        headers = {"Prefer": "respond-async"} if number % 2 else {}
        id = deployment_id("", DeploymentKind.BASE, MODEL, None)
        return self._ask(http, "deploy", "", "/inference/deploy/base", lambda _: id, json=body, headers=headers)

    def infer(self, http: httpx.Client) -> Answer:
        body = {"prompt": ROWS[0]["prompt"], "max_tokens": 1}
        return self._timed(http, "infer", "POST", f"/inference/infer/{MODEL}", json=body)

    def health(self, http: httpx.Client) -> Answer:
        return self._timed(http, "health", "GET", "/health")

    def _ask(
        self,
        http: httpx.Client,
        kind: str,
        owner: str,
        path: str,
        subject: Callable[[Any], str],
        headers: dict[str, str] | None = None,
        **content: Any,
    ) -> Answer:
        """One POST that changes something, in the history before it leaves; every fifth has an Idempotency-Key."""
        key = str(uuid.uuid4()) if random.random() < 0.2 else None
        request = Request(str(uuid.uuid4()), kind, owner, key)
        self._history.asked(request)
        sent = {**(headers or {}), "X-Request-ID": request.request_id, **({"Idempotency-Key": key} if key else {})}
        answer = self._timed(http, kind, "POST", path, headers=sent, **content)
        request.status = answer.status
        request.subject = subject(answer.body) if request.acknowledged else None
        self._history.answered(request)
        return answer

    def _timed(self, http: httpx.Client, kind: str, method: str, path: str, **options: Any) -> Answer:
        asked, began = time.time(), time.perf_counter()
        response = http.request(method, path, **options)
        seconds = time.perf_counter() - began
        retry_after = response.headers.get("Retry-After")
        answer = Answer(kind, asked, seconds, response.status_code, retry_after, response.json())
        self.answers.append(answer)
        return answer

    def _repeat(self, work: Callable[[httpx.Client], Answer], every_s: float) -> None:
        with client(self._studio) as http:
            due = time.monotonic() + random.uniform(0, every_s)
            while not self._over.wait(max(0.0, due - time.monotonic())):
                due = max(due, time.monotonic() - 1) + every_s
                try:
                    work(http)
                except httpx.HTTPError as error:
                    self.broke.append(f"{work.__name__}: {error!r}")


def environment(shared: Path) -> dict[str, str]:
    """For a studio of these tests: no Ray (nothing listens there, and jobs stay queued), and base models that are made once."""
    return {
        "MINI_STUDIO_TRAINING__RAY_ADDRESS": "http://127.0.0.1:1",
        "MINI_STUDIO_MODELS_ROOT": str(shared / "models"),
    }


def client(studio: Running) -> httpx.Client:
    return httpx.Client(base_url=studio.url, timeout=60, trust_env=False)


def figures(answers: Sequence[Answer]) -> str:
    """How many there were, and how long they took."""
    seconds = sorted(answer.seconds for answer in answers) or [0.0]
    p50, p99 = statistics.median(seconds), percentile(seconds, 99)
    return f"{len(answers)} (p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms, longest {seconds[-1] * 1000:.0f} ms)"


def percentile(seconds: Sequence[float], percent: float) -> float:
    """The least value that so many of them do not exceed."""
    ordered = sorted(seconds)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@contextlib.contextmanager
def records(studio: Running) -> Iterator[sqlite3.Connection]:
    """The record file, to look at only."""
    with contextlib.closing(sqlite3.connect(f"file:{studio.data / 'records.sqlite'}?mode=ro", uri=True)) as db:
        yield db


def oldest_waiting(studio: Running) -> float:
    """Unix seconds of the oldest event that a request left in an outbox; infinity when there is none."""
    oldest = float("inf")
    with records(studio) as db:
        for name in DECIDED_BY_REQUESTS:
            query = f"SELECT min(outbox ->> '$[0].headers.ce_time') FROM {name} WHERE pending = 1"  # noqa: S608
            (time_,) = db.execute(query).fetchone()
            if time_ is not None:
                oldest = min(oldest, datetime.fromisoformat(time_).timestamp())
    return oldest


def unfinished(studio: Running) -> dict[str, int]:
    """What is still on its way: events in outboxes, and records that their consumers have not followed yet."""
    behind = {
        "uploads not verified": "SELECT count(*) FROM datasets WHERE doc ->> '$.state' = 'uploaded'",
        "jobs not queued": "SELECT count(*) FROM jobs WHERE doc ->> '$.applied.training' IS NULL",
        "deployments on their way": "SELECT count(*) FROM deployments WHERE doc ->> '$.status' = 'deploying'",
    } | {f"{name} with an outbox": f"SELECT count(*) FROM {name} WHERE pending = 1" for name in ALL}  # noqa: S608
    with records(studio) as db:
        counts = {what: db.execute(query).fetchone()[0] for what, query in behind.items()}
    return {what: count for what, count in counts.items() if count}


def followed(studio: Running) -> dict[str, int]:
    """How far each consumer's own records have come: these grow when it works."""
    queries = {
        "datasets": "SELECT count(*) FROM dataset_profiles",
        "training": "SELECT count(*) FROM training_runs",
        "serving": "SELECT sum(doc ->> '$.generation') FROM releases",
        "jobs": "SELECT count(*) FROM jobs WHERE doc ->> '$.applied.training' IS NOT NULL",
        "routes": "SELECT sum(doc ->> '$.applied.serving') FROM deployments",
    }
    with records(studio) as db:
        return {name: db.execute(query).fetchone()[0] or 0 for name, query in queries.items()}
