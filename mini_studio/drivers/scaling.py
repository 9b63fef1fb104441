"""How many replicas a release should have: what KEDA and the horizontal pod autoscaler decide on Kubernetes, as pure functions.

The load is the number of its requests that wait or run at all gateways. Replicas are added at once, and taken away when the highest
need of the whole last window is lower. What is not known, because a gateway does not answer, takes nothing away.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Self

from mini_studio.drivers.ports import ReleaseSpec

GAP_S = 30.0
"""Nobody looked for so long, or for a whole window: what was seen before says nothing any more."""


@dataclass(frozen=True)
class Load:
    """Requests of one release that wait or run at the gateways that answered."""

    requests: float
    complete: bool = True
    """Whether all gateways answered."""


@dataclass(frozen=True)
class Bounds:
    """What a release asks for."""

    least: int
    most: int
    threshold: float
    """Requests a replica above which there is another one."""

    @classmethod
    def of(cls, spec: ReleaseSpec) -> Self:
        most = max(1, spec.min_replicas, spec.max_replicas)
        return cls(spec.min_replicas, most, spec.prometheus_threshold)

    @property
    def scales(self) -> bool:
        return self.least < self.most

    def within(self, replicas: int) -> int:
        return min(self.most, max(self.least, replicas))

    def needed(self, load: Load) -> int:
        """Replicas for this load: none only for none at all."""
        return self.within(math.ceil(min(load.requests / self.threshold, self.most)))


class Needs:
    """What one release needed lately, as this process saw it. Times are seconds of a clock that never goes back.

    A process that has just begun has seen nothing: it takes nothing away before a whole window has passed.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()
        """When, and how many; a later entry is lower than all before it, or they would not matter any more."""
        self._last = -math.inf
        self._decided = 0

    def decide(self, now: float, present: int, load: Load, bounds: Bounds, *, ready: bool) -> int:
        """Replicas from now on, of `present` ones. `ready`: one of them answers; what does not answer yet does not fall asleep."""
        need = bounds.needed(load)
        if not load.complete:
            need = max(need, present)
        if present and not ready:
            need = max(need, 1)
        if now - self._last > max(self._window_s, GAP_S):
            self._seen.clear()
            self._note(now, present)
        elif present > self._decided:
            self._note(now, present)  # another process saw that need
        self._note(now, need)
        highest = self._seen[0][1]
        self._decided = bounds.within(need if need >= present else min(present, highest))
        return self._decided

    def _note(self, now: float, need: int) -> None:
        while self._seen and self._seen[-1][1] <= need:
            self._seen.pop()
        self._seen.append((now, need))
        while now - self._seen[0][0] > self._window_s:
            self._seen.popleft()
        self._last = now
