"""Deadlines of everything the fast client has open, looked at in one coarse rhythm: four timers a request would cost more than the rest."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

TICK_S = 0.1
now = time.perf_counter


class Watched(Protocol):
    deadline: float
    """By `now`; the next tick after it calls `expire`."""

    def expire(self) -> None: ...


class Probed(Protocol):
    def probe(self) -> None:
        """See whether the peer of a socket that is not being read is still there."""


class Watch:
    """Ticks as long as something is watched. Late by a tick at most."""

    def __init__(self) -> None:
        self._watched: set[Watched] = set()
        self._probed: set[Probed] = set()
        self._sweeps: list[Callable[[float], bool]] = []
        self._timer: asyncio.TimerHandle | None = None

    def sweep(self, look: Callable[[float], bool]) -> None:
        """Call it with the time at each tick. It says whether it has to be called again, if nothing else is watched by then."""
        self._sweeps.append(look)

    def add(self, watched: Watched) -> None:
        self._watched.add(watched)
        if self._timer is None:
            self._start()

    def discard(self, watched: Watched) -> None:
        self._watched.discard(watched)

    def probe(self, probed: Probed) -> None:
        self._probed.add(probed)
        if self._timer is None:
            self._start()

    def unprobe(self, probed: Probed) -> None:
        self._probed.discard(probed)

    def _start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        time_now, swept = now(), [False]
        try:
            for watched in [each for each in self._watched if each.deadline <= time_now]:
                watched.expire()
            for probed in list(self._probed):
                probed.probe()
        finally:
            # Whatever went wrong with one of them, all others go on to be watched.
            swept = [look(time_now) for look in self._sweeps]
            if self._watched or self._probed or any(swept):
                self._start()
