"""Kill -9 before and after every await of handlers, relay, consumers and reconcilers. tests/faults/crash_points.py does it."""

import subprocess
import sys

import pytest

from tests.faults.failpoints import ROOT
from tests.faults.length import length

pytestmark = [pytest.mark.real, pytest.mark.timeout(length(short=1500, full=6000))]


def test_nothing_is_lost_or_done_twice_wherever_a_process_dies() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.crash_points"], check=False, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "0 problems" in done.stdout
