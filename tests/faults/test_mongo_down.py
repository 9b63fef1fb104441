"""MongoDB is killed, or only keeps silent, under load: writes are refused soon, consumers wait, inference goes on, nothing is lost."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from mini_studio.records.datasets import Dataset
from mini_studio.records.deployments import Deployment
from mini_studio.records.jobs import Job
from mini_studio.settings import Records, Settings
from mini_studio.wiring import COLLECTIONS, open_studio
from tests.fakes.broker import free_port
from tests.fakes.real_mongo import RealMongo, own_mongo
from tests.fakes.running import Running
from tests.faults import load
from tests.faults.length import length
from tests.faults.store_outage import ride_out, send

DOWN_S = length(short=15, full=120)
REFUSED_S = length(short=4.0, full=3.0)
"""The promise is 3 s; the short form runs where other tests do."""

pytestmark = [pytest.mark.real, pytest.mark.timeout(DOWN_S + 600)]


class Away:
    def __init__(self, mongo: RealMongo) -> None:
        self._mongo = mongo

    def stand_still(self, studio: Running) -> None:
        send(studio, signal.SIGSTOP)


class KilledMongo(Away):
    def begin(self) -> None:
        self._mongo.kill()

    def end(self) -> None:
        self._mongo.start_again()


class PausedMongo(Away):
    def begin(self) -> None:
        self._mongo.pause()

    def end(self) -> None:
        self._mongo.resume()


@pytest.fixture
def mongo(tmp_path: Path) -> Iterator[RealMongo]:
    with own_mongo(tmp_path / "mongo") as started:
        yield started


@pytest.fixture
def studio(mongo: RealMongo, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    environment = load.environment(tmp_path_factory.getbasetemp()) | {"MINI_STUDIO_RECORDS__MONGO_URL": mongo.url}
    running = Running(tmp_path / "data", free_port(), environment)
    running.start()
    yield running
    running.stop()


@pytest.mark.parametrize("outage", [KilledMongo, PausedMongo])
def test_the_database_is_away(
    outage: type[KilledMongo | PausedMongo],
    mongo: RealMongo,
    studio: Running,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = Settings(data=studio.data, records=Records(mongo_url=SecretStr(mongo.url)))
    ride_out(
        outage.__name__,
        outage(mongo),
        studio,
        settings,
        tmp_path / "history",
        seconds=DOWN_S,
        refused_s=REFUSED_S,
        says="cannot answer",
        unfinished=lambda: asyncio.run(unfinished(settings)),
        capsys=capsys,
    )


async def unfinished(settings: Settings) -> dict[str, int]:
    """What is still on its way: events in outboxes, and records that their consumers have not followed yet."""
    async with open_studio(settings) as studio:
        datasets, jobs, deployments = [
            await studio.store.find(record.COLLECTION, {}, limit=100_000) for record in (Dataset, Job, Deployment)
        ]
        counts = {
            "with an outbox": len(await studio.store.pending(COLLECTIONS, 100_000)),
            "uploads not verified": sum(document["state"] == "uploaded" for document in datasets),
            "jobs not queued": sum("training" not in document["applied"] for document in jobs),
            "deployments on their way": sum(document["status"] == "deploying" for document in deployments),
        }
    return {what: count for what, count in counts.items() if count}
