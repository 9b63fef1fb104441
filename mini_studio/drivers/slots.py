"""Which servers of one content serve and which are being taken away: `scale.json` in the content's folder.

Whoever drives the release next goes on from there. A server is taken away in steps: first it is not reported any more, while it still
answers; when every gateway had time to hear of that it is told to end, and finishes what it has begun.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from mini_studio.files import replace_file

SCALE = "scale.json"


@dataclass(frozen=True)
class Leaving:
    """A server that is being taken away."""

    slot: int
    since: float
    """Unix seconds."""
    told: bool = False
    """It was told to end, and takes nothing new."""
    told_at: float = 0.0
    """Unix seconds."""


@dataclass(frozen=True)
class Scale:
    slots: tuple[int, ...] = ()
    """They serve, or are being started. None: the release sleeps."""
    leaving: tuple[Leaving, ...] = ()

    def resized(self, replicas: int, now: float, ready: Collection[int], taken: Callable[[int], bool]) -> Self:
        """With so many slots: those that are `ready` last to go, a slot that a process has not left first to be `taken` no more."""
        scale = self
        while len(scale.slots) > replicas:
            idle = [slot for slot in scale.slots if slot not in ready]
            scale = scale.without(idle[-1] if idle else scale.slots[-1], now)
        while len(scale.slots) < replicas:
            back = next((leaving.slot for leaving in scale.leaving if not leaving.told), None)
            scale = scale._with(scale._free(taken) if back is None else back)
        return scale

    def without(self, slot: int, now: float) -> Self:
        slots = tuple(other for other in self.slots if other != slot)
        return replace(self, slots=slots, leaving=(*self.leaving, Leaving(slot, now)))

    def _with(self, slot: int) -> Self:
        leaving = tuple(other for other in self.leaving if other.slot != slot)
        return replace(self, slots=tuple(sorted((*self.slots, slot))), leaving=leaving)

    def _free(self, taken: Callable[[int], bool]) -> int:
        known, slot = {*self.slots, *(leaving.slot for leaving in self.leaving)}, 0
        while slot in known or taken(slot):
            slot += 1
        return slot


def scale_in(content: Path) -> Scale | None:
    """None: nobody wrote it, or a version that did not scale."""
    try:
        found = json.loads((content / SCALE).read_text())
        return Scale(tuple(map(int, found["slots"])), tuple(Leaving(**leaving) for leaving in found["leaving"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def hold_scale(content: Path, scale: Scale) -> None:
    replace_file(content / SCALE, json.dumps(asdict(scale)))
