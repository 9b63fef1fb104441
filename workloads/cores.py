"""How a computation shares the machine's cores with others. `docs/benchmarks.md` has the measurements."""

import os

SMALL_PARAMETERS = 20_000_000
"""A smaller model is computed on one thread: its steps are too short for a second one to help."""
SPINS = 1000
"""Turns an OpenMP thread waits before it sleeps. With libgomp's default, two computations on the same cores take ten times as long."""


def prepare(threads: int) -> None:
    """Set what OpenMP reads when torch is first imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def useful_threads(parameters: int, allowed: int) -> int:
    """Threads for a model of that many parameters, of those that are allowed."""
    return 1 if parameters < SMALL_PARAMETERS else allowed
