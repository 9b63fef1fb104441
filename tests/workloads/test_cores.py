"""How computations share the cores: what reaches OpenMP, seen in a real process."""

import os
import subprocess
import sys

import pytest

from workloads import cores

PROGRAM = """
from workloads import cores
cores.prepare(2)
import torch
torch.set_num_threads(cores.useful_threads(135_000_000, 2))
torch.randn(64, 64) @ torch.randn(64, 64)
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("parameters", "allowed", "expected"), [(1_000_000, 8, 1), (135_000_000, 8, 8), (135_000_000, 1, 1)]
)
def test_tiny_models_use_one_thread(parameters: int, allowed: int, expected: int) -> None:
    assert cores.useful_threads(parameters, allowed) == expected


def test_idle_threads_sleep_early() -> None:
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=False, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "2"), ran.stderr
    if sys.platform == "linux":  # torch brings libgomp there
        assert "GOMP_SPINCOUNT = '1000'" in ran.stderr
