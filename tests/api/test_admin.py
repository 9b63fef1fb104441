"""Dead letters over REST and on the command line: seen as they are, put back once, by nobody but who runs the studio."""

import asyncio
import base64
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiokafka import ConsumerRecord
from fastapi import FastAPI
from pydantic import SecretStr

from events.topics import Topic
from mini_studio.bus.delivery import Delivery
from mini_studio.bus.kafka import Outgoing, create_topics
from mini_studio.settings import Api, Kafka, Settings
from mini_studio.wiring import Studio
from tests.fakes.broker import running_broker
from tests.fakes.log import read_all

LIST = "/admin/dead-letters"


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[str]:
    with running_broker() as address:
        yield address


@pytest.fixture
async def settings(tmp_path: Path, bootstrap: str) -> Settings:
    kafka = Kafka(bootstrap=bootstrap, partitions=2)
    await create_topics(kafka)
    return Settings(data=tmp_path, kafka=kafka)


@pytest.fixture
async def buried(studio: Studio) -> AsyncIterator[str]:
    """A mark: the key of three new dead letters of `jobs`, oldest first."""
    mark, delivery = uuid.uuid4().hex, Delivery("jobs", studio.publisher)
    headers: list[tuple[str, Any]] = [("ce_id", b"e-1"), ("bad", b"\xff\xfe"), ("null", None)]
    for offset, value in enumerate((b'{"a": 1}', b"\xff\x00", None)):
        record: Any = ConsumerRecord(
            Topic.FINE_TUNES.value, 1, offset, 0, 0, mark.encode(), value, None, 3, 5, tuple(headers)
        )
        await delivery.bury(record, f"reason {offset}")
    yield mark
    await studio.dead_letters.redrive_all("jobs")


async def test_they_are_listed_newest_first_in_pages(client: httpx.AsyncClient, buried: str) -> None:
    first = (await client.get(LIST, params={"consumer": "jobs", "limit": 2})).json()
    assert [letter["reason"] for letter in first["dead_letters"]] == ["reason 2", "reason 1"]
    assert (first["ok"], first["has_more"], first["last_id"]) == (True, True, first["dead_letters"][1]["id"])
    rest = (await client.get(LIST, params={"consumer": "jobs", "limit": 2, "after": first["last_id"]})).json()
    assert ([letter["reason"] for letter in rest["dead_letters"]], rest["has_more"]) == (["reason 0"], False)
    letter = rest["dead_letters"][0]
    assert (letter["topic"], letter["partition"], letter["offset"], letter["size"]) == (Topic.FINE_TUNES, 1, 0, 8)
    assert (letter["state"], letter["consumer"], letter["event_id"], letter["subject"]) == ("open", "jobs", "e-1", None)
    assert (await client.get(LIST, params={"consumer": "training"})).json()["dead_letters"] == []
    everyone = (await client.get(LIST)).json()["dead_letters"]
    assert {letter["consumer"] for letter in everyone} == {"jobs"}


async def test_one_is_shown_byte_for_byte(client: httpx.AsyncClient, buried: str) -> None:
    letters = (await client.get(LIST, params={"consumer": "jobs"})).json()["dead_letters"]
    null, binary, text = [(await client.get(f"{LIST}/{letter['id']}")).json()["dead_letter"] for letter in letters]
    assert text["value"] == {"encoding": "text", "content": '{"a": 1}'}
    assert text["key"] == {"encoding": "text", "content": buried}
    assert base64.b64decode(binary["value"]["content"]) == b"\xff\x00"
    assert null["value"] is None
    assert [(h["name"], h["value"] and h["value"]["encoding"]) for h in text["headers"]] == [
        ("ce_id", "text"), ("bad", "base64"), ("null", None),
    ]  # fmt: skip


async def test_one_is_put_back_once_as_it_was_for_its_consumer(
    client: httpx.AsyncClient, buried: str, bootstrap: str
) -> None:
    oldest = (await client.get(LIST, params={"consumer": "jobs"})).json()["dead_letters"][-1]["id"]
    done = await client.post(f"{LIST}/{oldest}/redrive")
    assert (done.status_code, done.json()["dead_letter"]["state"]) == (200, "redriven")
    assert (await client.post(f"{LIST}/{oldest}/redrive")).status_code == 409
    (back,) = [r for r in await read_all(bootstrap, Topic.FINE_TUNES) if r.key == buried.encode()]
    assert (back.partition, back.value) == (1, b'{"a": 1}')
    sent = [("ce_id", b"e-1"), ("bad", b"\xff\xfe"), ("null", None)]
    assert list(back.headers) == [*sent, ("dlq_redrive", b"jobs")]
    states = {
        state: (await client.get(LIST, params={"consumer": "jobs", "state": state})).json() for state in ("open", "all")
    }
    assert oldest not in [letter["id"] for letter in states["open"]["dead_letters"]]
    assert oldest in [letter["id"] for letter in states["all"]["dead_letters"]]


async def test_all_of_a_consumer_are_put_back(client: httpx.AsyncClient, buried: str, bootstrap: str) -> None:
    url = f"{LIST}/redrive"
    assert (await client.post(url, params={"consumer": "jobs"})).json() == {"ok": True, "redriven": 3}
    assert (await client.post(url, params={"consumer": "jobs"})).json() == {"ok": True, "redriven": 0}
    back = [r.value for r in await read_all(bootstrap, Topic.FINE_TUNES) if r.key == buried.encode()]
    assert back == [b'{"a": 1}', b"\xff\x00", None], "in the order in which they came"
    assert (await client.post(url, params={"consumer": "nobody"})).status_code == 404
    assert (await client.post(url)).status_code == 422


async def test_what_only_looks_like_a_dead_letter_or_a_marker_is_none(
    client: httpx.AsyncClient, studio: Studio, buried: str
) -> None:
    letters = (await client.get(LIST, params={"consumer": "jobs"})).json()["dead_letters"]
    forged = [
        (name, b"x") for name in ("dlq_consumer", "dlq_reason", "dlq_topic", "dlq_partition", "dlq_offset", "dlq_time")
    ]
    topic = "mini-studio.fine-tunes.jobs.dead"
    await studio.publisher.publish([Outgoing(topic, b"k", b"v", forged), Outgoing(topic, b"k", b"v", [])])
    record: Any = ConsumerRecord(
        Topic.FINE_TUNES.value, 0, 9, 0, 0, b"k", b"v", None, 1, 1, (("dlq_redriven", letters[0]["id"].encode()),)
    )
    await Delivery("jobs", studio.publisher).bury(record, "poison that says of itself that it is a marker")
    after = (await client.get(LIST, params={"consumer": "jobs"})).json()["dead_letters"]
    assert [letter["id"] for letter in after[1:]] == [letter["id"] for letter in letters]


@pytest.mark.parametrize("id", ["jobs.fine-tunes.0.999999", "jobs", "nobody.x.0.0", "jobs.fine-tunes.a.b"])
async def test_what_is_not_there_is_404(client: httpx.AsyncClient, id: str) -> None:
    assert (await client.get(f"{LIST}/{id}")).status_code == 404
    assert (await client.post(f"{LIST}/{id}/redrive")).status_code == 404


async def test_clients_see_none_of_it(client: httpx.AsyncClient, buried: str) -> None:
    answer = await client.get(LIST, headers={"X-User-ID": "acme"})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_a_token_where_one_is_set(app: FastAPI, client: httpx.AsyncClient, studio: Studio) -> None:
    studio.settings.api = Api(admin_token=SecretStr("s3cret"))
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
        refused = await client.get(LIST, headers=given)
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert (await client.get(LIST, headers={"Authorization": "Bearer s3cret"})).status_code == 200
    assert (await client.get("/health")).status_code == 200


class TestWithoutABroker:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Iterator[Settings]:
        """Somebody accepts connections and says nothing: a broker that is frozen."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield Settings(data=tmp_path, kafka=Kafka(bootstrap=f"127.0.0.1:{silent.getsockname()[1]}"))

    async def test_the_answer_is_503_within_two_seconds(self, client: httpx.AsyncClient) -> None:
        for method, path in (("GET", LIST), ("GET", f"{LIST}/jobs.x.0.0"), ("POST", f"{LIST}/redrive?consumer=jobs")):
            started = time.monotonic()
            answer = await client.request(method, path)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
            assert time.monotonic() - started < 2


@pytest.mark.timeout(300)
async def test_the_command_line_shows_and_puts_back(bootstrap: str, tmp_path: Path, buried: str) -> None:
    async def run(*arguments: str, code: int = 0) -> str:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "mini_studio.cli", "dead-letters", *arguments, "--data", str(tmp_path)],
            env={**os.environ, "MINI_STUDIO_KAFKA__BOOTSTRAP": bootstrap},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    lines = (await run("list", "--consumer", "jobs")).splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["reason 2", "reason 1", "reason 0"]
    id = lines[1].split()[2]
    assert f"key       {buried}" in (shown := await run("show", id)) and r"b'\xff\x00'" in shown
    assert f"put back for consumer jobs: {id}" in await run("redrive", id)
    assert "put back for consumer jobs: 2" in await run("redrive", "--consumer", "jobs")
    assert "was put back before" in await run("redrive", id, code=1)
