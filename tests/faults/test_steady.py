"""No process of a studio under a steady load keeps growing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.broker import free_port
from tests.fakes.running import Running
from tests.faults.length import length
from tests.faults.steady import measure

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Running]:
    studio = Running(tmp_path / "studio", free_port(), {"MINI_STUDIO_TRAINING__RAY_ADDRESS": "http://127.0.0.1:1"})
    studio.start()
    yield studio
    studio.stop()


async def test_memory_and_descriptors_stay_flat(studio: Running) -> None:
    """In a minute an allocator's steps of a few hundred KiB look like tens of MiB/h: the short form finds only what grows fast."""
    warm_up, minutes = length(short=0.3, full=5), length(short=1, full=30)
    most = length(short=60, full=1)
    series, load = await measure(studio, minutes, warm_up)
    print("\n".join(each.line() for each in series))
    assert {each.name for each in series} >= {"api", "relay", "datasets", "training", "serving", "jobs", "routes"}
    assert load.failures == []
    for each in series:
        assert each.slope() < most, each.line()
        half = len(each.descriptors) // 2
        assert max(each.descriptors[half:]) <= max(each.descriptors[:half]) + 3, each.line()
