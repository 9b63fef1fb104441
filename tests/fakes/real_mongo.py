"""A MongoDB, or a server that speaks its wire protocol, for tests: at the address given, or started by the script of a folder given.

`MINI_STUDIO_TEST_MONGO=mongodb://...` names a running one (of `docker compose`, for instance). `MINI_STUDIO_TEST_REAL=DIR`, which
`make test-real` sets, names a folder with a script `mongo`: `install`, `start DATA PORT`, `start DATA`, `stop DATA`, `kill DATA`,
`pause DATA`, `resume DATA`. Tests that kill or pause the server need the script.
"""

import asyncio
import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from motor.motor_asyncio import AsyncIOMotorClient

from tests.fakes.broker import lasting_port
from tests.fakes.real_kafka import SCRIPTS

ADDRESS = "MINI_STUDIO_TEST_MONGO"
HOW = f"needs a MongoDB: run `make test-real`, or set {ADDRESS}=mongodb://..."
HOW_TO_STOP_IT = (
    f"kills and pauses a MongoDB: run `make test-real`, or set {SCRIPTS} to a folder with the script `mongo`"
)


def script() -> Path | None:
    """The script that starts and stops one, if there is one."""
    folder = os.environ.get(SCRIPTS)
    return Path(folder).resolve() / "mongo" if folder else None


@dataclass
class RealMongo:
    """One server started by the script, with its data in `data`."""

    script: Path
    data: Path
    port: int

    @classmethod
    def start(cls, script: Path, data: Path) -> "RealMongo":
        """Raises `CalledProcessError` when it does not come up."""
        mongo = cls(script, data, lasting_port())
        subprocess.run([str(script), "install"], check=True, stdout=subprocess.DEVNULL)
        mongo._call("start", str(mongo.port))
        return mongo

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}"

    def start_again(self) -> None:
        self._call("start")

    def stop(self) -> None:
        self._call("stop")

    def kill(self) -> None:
        self._call("kill")

    def pause(self) -> None:
        self._call("pause")

    def resume(self) -> None:
        self._call("resume")

    def _call(self, verb: str, *rest: str) -> None:
        subprocess.run([str(self.script), verb, str(self.data), *rest], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def own_mongo(folder: Path) -> Iterator[RealMongo]:
    """One for this test alone. Skips where there is none to start."""
    found = script()
    if found is None:
        pytest.skip(HOW_TO_STOP_IT)
    mongo = RealMongo.start(found, folder)
    try:
        yield mongo
    finally:
        mongo.stop()  # which resumes a paused one


@contextlib.contextmanager
def own_database(url: str) -> Iterator[str]:
    """The name of a database that is dropped in the end."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield name
    asyncio.run(_drop(url, name))


async def _drop(url: str, name: str) -> None:
    client: AsyncIOMotorClient[dict[str, object]] = AsyncIOMotorClient(url)
    await client.drop_database(name)
    client.close()
