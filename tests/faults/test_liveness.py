"""A consumer that can do nothing any more says so within a minute, and the supervisor starts it again."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import psutil
import pytest

from mini_studio.bus.kafka import create_topics
from mini_studio.embedded.marks import RUN_DATA, Family
from mini_studio.settings import Kafka
from tests.fakes.broker import free_port, running_broker
from tests.fakes.fault_proxy import FaultProxy

ROOT = Path(__file__).parents[2]
UNHEALTHY_S = 60.0

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


class Watched:
    """A supervised consumer, seen from outside."""

    def __init__(self, data: Path, port: int) -> None:
        self.data, self.port = data, port

    @property
    def pid(self) -> int:
        (process,) = [p for p in Family({RUN_DATA: str(self.data)}).members() if "blockable" in " ".join(p.cmdline())]
        return int(process.pid)

    async def status(self) -> str:
        async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
            try:
                return str((await client.get(f"http://127.0.0.1:{self.port}/health")).json()["status"])
            except httpx.HTTPError:
                return "silent"

    async def until(self, condition: Callable[[str], bool], seconds: float = 120) -> float:
        """How long it took."""
        began = time.monotonic()
        while not condition(await self.status()):
            assert time.monotonic() - began < seconds, "did not happen in time"
            await asyncio.sleep(0.25)
        return time.monotonic() - began


@pytest.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    async with FaultProxy() as proxy:
        with running_broker(advertised=proxy.port) as address:
            proxy.target = int(address.rpartition(":")[2])
            yield proxy


@pytest.fixture
async def watched(proxy: FaultProxy, tmp_path: Path) -> AsyncIterator[Watched]:
    bootstrap, port, data = f"127.0.0.1:{proxy.port}", free_port(), tmp_path / "studio"
    await create_topics(Kafka(bootstrap=bootstrap))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.supervised_consumer", str(data), str(port)),
        cwd=ROOT,
        env={**os.environ, "MINI_STUDIO_KAFKA__BOOTSTRAP": bootstrap, "PYTHONPATH": str(ROOT)},
    )
    watched = Watched(data, port)
    await watched.until(lambda status: status == "ok")
    yield watched
    process.terminate()
    await process.wait()


@pytest.mark.parametrize("fault", ["blocked loop", "lost coordinator"])
async def test_it_is_unhealthy_within_a_minute_and_started_again(
    watched: Watched, proxy: FaultProxy, fault: str
) -> None:
    first = watched.pid
    if fault == "blocked loop":
        os.kill(first, signal.SIGUSR1)
    else:
        proxy.freeze(new=False)
    # The supervisor may end it before anyone else hears that it is unhealthy.
    unhealthy = await watched.until(lambda status: not psutil.pid_exists(first))
    again = unhealthy + await watched.until(lambda status: status == "ok")
    print(f"liveness: {fault}: ended as unhealthy after {unhealthy:.1f} s, well again after {again:.1f} s")
    assert unhealthy <= UNHEALTHY_S
    assert watched.pid != first
