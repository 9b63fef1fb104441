"""A client of the lives that end under it, and what it does to the log when nobody looks."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
from aiokafka import AIOKafkaConsumer, TopicPartition

from consumers.app import CONSUMERS
from events.topics import Plain, Topic, dead_letter_topic
from events.usage import TYPE, UsageBatch, UsageRecord
from mini_studio.bus.consumer import Consumer
from mini_studio.settings import Settings
from mini_studio.wiring import record_store
from tests.fakes.log import write
from tests.faults.crash_life import World
from tests.faults.history import Request
from tests.faults.standins import Seed

ROWS = [{"prompt": f"the {number}th ", "completion": "answer"} for number in range(4)]
MANY_ROWS = [{"prompt": "long " * 200, "completion": str(number)} for number in range(1100)]
MODEL = "tiny-llama"
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
"""When gateways have seen requests."""


def lines(rows: list[Any]) -> dict[str, Any]:
    return {"file": ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())}


@dataclass
class Client:
    """One client, with a code of its own, and what it was answered."""

    world: World
    code: str
    answers: dict[str, httpx.Response] = field(default_factory=dict)
    tries: int = 0

    def ask(
        self,
        step: str,
        kind: str,
        method: str,
        path: str,
        key: str | None = None,
        allowed: Sequence[int] = (),
        **options: Any,
    ) -> Any:
        """The answer's body, from now or from before. Raises `Died` when none comes."""
        if step not in self.answers:
            self.tries += 1
            request = Request(
                f"{self.code}.{step.replace(' ', '-')}.{self.tries}", kind, self.code, key and f"{self.code}.{key}"
            )
            self.world.history.asked(request)
            headers = {"X-Request-ID": request.request_id, "X-User-ID": self.code} | options.pop("headers", {})
            headers |= {"Idempotency-Key": request.key} if request.key else {}
            response = self.call(method, path, headers=headers, **options)
            request.status = response.status_code
            if request.acknowledged:
                request.subject = self.subject(response.json())
            self.world.history.answered(request)
            fine = request.acknowledged if not allowed else response.status_code in allowed
            assert fine, f"{step} was answered {response.status_code}: {response.text}"
            self.answers[step] = response
        return self.answers[step].json()

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self.world.client.request(method, path, **options)
        except httpx.TransportError as error:
            self.world.wait(lambda: False, 5)  # the life is over, or nobody knows what this is
            raise AssertionError from error

    def subject(self, answer: dict[str, Any]) -> str:
        if "dataset_id" in answer:
            return str(answer["dataset_id"])
        if "dataset" in answer:
            return str(answer["dataset"]["id"])
        if "job" in answer:
            return str(answer["job"]["id"])
        if answer.get("object") in ("file", "fine_tuning.job"):
            return str(answer["id"])
        found = self.world.documents(self.code)["deployments"]
        if answer.get("object") == "model":
            return next(id for id, deployment in found.items() if deployment["model"] == answer["id"])
        named = answer["deployment"]
        name = named if isinstance(named, str) else named["name"]
        return next(id for id, deployment in found.items() if deployment["name"] == name)

    # --- what clients ask for

    def upload(self, step: str = "upload", rows: list[Any] = ROWS, **options: Any) -> Any:
        path = f"/fine_tuning/upload-dataset/{self.code}"
        return self.ask(step, "upload", "POST", path, **{"key": step, **options}, files=lines(rows))

    def submit(
        self, step: str = "submit", seed: Seed = Seed.SUCCEEDS, dataset: str = "dataset_id", **options: Any
    ) -> Any:
        body = {"model": MODEL, "client_code": self.code, "dataset_filename": self.upload()[dataset], "seed": seed}
        return self.ask(step, "submit", "POST", "/fine_tuning/submit-finetune", **{"key": step, **options}, json=body)

    def cancel(self, step: str, job: str, **options: Any) -> Any:
        return self.ask(step, "cancel", "POST", f"/fine_tuning/jobs/{job}/cancel", **options)

    def delete(self, step: str, dataset: str, **options: Any) -> Any:
        return self.ask(step, "delete", "DELETE", f"/fine_tuning/datasets/{dataset}", **options)

    def deploy(self, step: str = "deploy", model: str = "base", **options: Any) -> Any:
        scale, least = options.pop("scale", 1), options.pop("least", 1)
        body = {"client_code": self.code, "model_id": model, "min_replicas": least, "max_replicas": scale}
        return self.ask(step, "deploy", "POST", "/inference/deploy/base", **{"key": step, **options}, json=body)

    def tuned(self, step: str, path: str, **options: Any) -> Any:
        body = {"client_code": self.code, "base_model": MODEL, "fine_tuned_weights_path": path}
        return self.ask(step, "deploy", "POST", "/inference/deploy/fine_tuned", **options, json=body)

    def remove(self, step: str, name: str) -> Any:
        return self.ask(step, "remove", "DELETE", f"/inference/deployments/{name}")

    def get(self, path: str, status: int = 200) -> Any:
        response = self.call("GET", path, headers={"X-User-ID": self.code})
        assert response.status_code == status, f"{path} was answered {response.status_code}: {response.text}"
        return response.json()

    def admin(self, method: str, path: str, *allowed: int) -> Any:
        """Something of the dead letters, as who runs the studio asks for it: in nobody's name."""
        response = self.call(method, f"/admin/dead-letters{path}")
        assert response.status_code in (allowed or (200,)), (
            f"{path} was answered {response.status_code}: {response.text}"
        )
        return response.json()

    def letters(self, consumer: str) -> list[dict[str, Any]]:
        """What of this client is among the consumer's dead letters, newest first."""
        found = self.admin("GET", f"?consumer={consumer}&state=all&limit=100")["dead_letters"]
        mine = {self.code, *self.world.documents(self.code)["deployments"]}
        return [letter for letter in found if letter["subject"] in mine]

    # --- what goes on elsewhere

    def mine(self, collection: str) -> list[dict[str, Any]]:
        return list(self.world.documents(self.code)[collection].values())

    def going(self) -> bool:
        """Whether something of it is being removed, or was."""
        return any(deployment["status"] in ("removing", "removed") for deployment in self.mine("deployments"))

    def infer(self, model: str) -> httpx.Response:
        return self.call("POST", f"/inference/infer/{model}", json={}, headers={"X-User-ID": self.code})

    def until(self, condition: Callable[[], Any], seconds: float = 30) -> None:
        self.world.wait(condition, seconds)

    def pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > deadline)

    def say_used(self, *sequences: int) -> None:
        """Put batches of a gateway of this client's own on the log, each with one request."""
        gateway, bootstrap = hashlib.sha256(self.code.encode()).hexdigest()[:16], self.world.settings.kafka.bootstrap
        record = UsageRecord(client_code=self.code, model=MODEL, status=200, total_ms=1, prompt_tokens=1)
        batches = [UsageBatch(type=TYPE, gateway=gateway, sequence=n, at=NOON, records=[record]) for n in sequences]
        values: list[Any] = [(batch.model_dump_json().encode(), []) for batch in batches]
        self.world.apart(lambda: asyncio.run(write(bootstrap, Plain.USAGE, values, key=gateway.encode())))

    def poison(self, topic: Topic | Plain, value: bytes) -> None:
        self.world.poisons.append((topic.value, value))
        headers = [("ce_type", b"nonsense.v1"), ("broken", b"\xff\xfe"), ("ce_subject", self.code.encode())]
        bootstrap = self.world.settings.kafka.bootstrap
        self.world.apart(lambda: asyncio.run(write(bootstrap, topic, [(value, headers)], key=self.code.encode())))

    def join(self, consumer: str) -> None:
        """Have another member come into the consumer's group, take nothing, and leave."""
        bootstrap = self.world.settings.kafka.bootstrap
        self.world.apart(lambda: asyncio.run(_join(bootstrap, CONSUMERS[consumer])))

    def again(self, *topics: Topic) -> None:
        """Put every event of this client on the log a second time, as a relay does that died before it could settle them."""
        self.world.apart(lambda: asyncio.run(_again(self.world.settings.kafka.bootstrap, topics, self.code)))

    def journal(self, collection: str, subject: str) -> None:
        """Append to the journal what waits in the record's outbox, as a relay does that dies before it publishes."""
        settings, waiting = self.world.settings, self.world.documents(self.code)[collection][subject]["outbox"]
        self.world.apart(lambda: asyncio.run(_journal(settings, waiting)))

    def publish(self, subject: str, *, backwards: bool = False) -> None:
        """Put what the journal has of the aggregate on the log."""
        bootstrap = self.world.settings.kafka.bootstrap
        entries = self.world.journalled(subject)
        self.world.backwards += [subject] if backwards else []
        for entry in reversed(entries) if backwards else entries:
            headers = [(name, text.encode()) for name, text in entry["headers"].items()]
            value, topic = entry["value"].encode(), entry["topic"]
            self.world.apart(lambda: asyncio.run(write(bootstrap, topic, [(value, headers)], key=subject.encode())))  # noqa: B023

    def buried(self, topic: Topic, consumer: str) -> bool:
        """Whether something of this client is among the consumer's dead letters."""
        dead, bootstrap = dead_letter_topic(topic, consumer), self.world.settings.kafka.bootstrap
        found = self.world.apart(lambda: asyncio.run(_count(bootstrap, dead, self.code)))
        return bool(found)


async def read(bootstrap: str, topic: str) -> list[Any]:
    """Every record of a topic of one partition, up to its end."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", fetch_max_wait_ms=20)
    await consumer.start()
    partition = TopicPartition(topic, 0)
    consumer.assign([partition])
    found: list[Any] = []
    while consumer.highwater(partition) is None or await consumer.position(partition) < consumer.highwater(partition):
        found += (await consumer.getmany(timeout_ms=100)).get(partition, [])
    await consumer.stop()
    return found


def _is_of(record: Any, code: str) -> bool:
    return ("ce_clientcode", code.encode()) in record.headers or (record.key or b"") == code.encode()


async def _journal(settings: Settings, entries: list[dict[str, Any]]) -> None:
    async with aclosing(record_store(settings)) as store:
        await store.journal(entries)


async def _again(bootstrap: str, topics: tuple[Topic, ...], code: str) -> None:
    for topic in topics:
        for record in await read(bootstrap, topic):
            if ("ce_clientcode", code.encode()) in record.headers:
                await write(bootstrap, topic, [(record.value, list(record.headers))], key=record.key)


async def _count(bootstrap: str, topic: str, code: str) -> int:
    return sum(_is_of(record, code) for record in await read(bootstrap, topic))


async def _join(bootstrap: str, consumer: Consumer) -> None:
    member = AIOKafkaConsumer(
        *consumer.topics, bootstrap_servers=bootstrap, group_id=consumer.group, enable_auto_commit=False
    )
    await member.start()
    await member.stop()
