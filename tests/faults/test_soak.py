"""The soak in its short form; `make soak` runs it whole."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import real_kafka
from tests.faults.length import length

ROOT = Path(__file__).resolve().parents[2]
MINUTES = length(short=0.5, full=10)
OVER_S = length(short=300, full=120)
"""`make soak` promises 120 s; a machine that runs other tests as well may take longer."""
LIMIT_S = MINUTES * 60 * 3 + 4 * OVER_S + 300

pytestmark = [pytest.mark.real, pytest.mark.timeout(LIMIT_S + 60)]


def soak(*options: str) -> None:
    command = [sys.executable, "-m", "tests.faults.soak", "--minutes", f"{MINUTES:g}", "--over-s", f"{OVER_S:g}"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def test_nothing_is_lost_or_done_twice_whatever_dies() -> None:
    soak()


def test_nor_on_a_real_kafka_that_dies_as_well() -> None:
    if real_kafka.script() is None:
        pytest.skip(real_kafka.HOW_TO_STOP_IT)
    soak("--bootstrap", "own")
