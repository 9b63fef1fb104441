"""A MongoDB, or a server that speaks its wire protocol, for tests: at the address given, or started by the script of a folder given.

`MINI_STUDIO_TEST_MONGO=mongodb://...` names a running one. What kills or pauses it needs the script.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from motor.motor_asyncio import AsyncIOMotorClient

from tests.fakes.real_services import SCRIPTS, Started, own, script_of

ADDRESS = "MINI_STUDIO_TEST_MONGO"
HOW = f"needs a MongoDB: run `make test-real`, or set {ADDRESS}=mongodb://..."
HOW_TO_STOP_IT = (
    f"kills and pauses a MongoDB: run `make test-real`, or set {SCRIPTS} to a folder with the script `mongo`"
)


def script() -> Path | None:
    """The script that starts and stops one, if there is one."""
    return script_of("mongo")


class RealMongo(Started):
    """One server started by the script."""

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}"


def own_mongo(folder: Path) -> contextlib.AbstractContextManager[RealMongo]:
    """One for this test alone. Skips where there is none to start."""
    return own(RealMongo, script(), HOW_TO_STOP_IT, folder)


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
