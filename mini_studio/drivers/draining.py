"""Takes servers away without breaking off what they answer: unannounce, wait for the gateways, SIGTERM, wait for the end. Never waits."""

import time
from dataclasses import replace
from pathlib import Path

import structlog

from mini_studio.drivers.keeper import Keeper
from mini_studio.drivers.servers import Server, servers_in
from mini_studio.drivers.slots import Leaving, Scale, hold_scale, scale_in

log = structlog.get_logger(__name__)

DRAIN_S = 5.0
"""A server goes on answering so long after it is not reported any more, until every gateway has taken note: as a pod does."""


class Drain:
    """Each call does what is due by now and returns; the release's lock must be held around it."""

    def __init__(self, keeper: Keeper, drain_s: float, finish_s: float) -> None:
        self._keeper = keeper
        self._drain_s = drain_s
        self._finish_s = finish_s

    def step(self, content: Path, scale: Scale) -> Scale:
        """The scale without the servers that have ended. Raises `Unavailable` for one that will not."""
        scale = with_strays(content, scale)
        left = [still for leaving in scale.leaving if (still := self._moved_on(content, leaving)) is not None]
        return replace(scale, leaving=tuple(left))

    def retire(self, content: Path) -> None:
        """Take away all of a content that is not served any more, and its files when the last server has ended."""
        held = scale_in(content) or Scale()
        scale = self.step(content, held.resized(0, time.time(), (), lambda _: False))
        if not scale.leaving:
            self._keeper.discard(content)
        elif scale != held:
            hold_scale(content, scale)

    def _moved_on(self, content: Path, leaving: Leaving) -> Leaving | None:
        server, now = Server(content, leaving.slot), time.time()
        over = leaving.told and now - leaving.told_at > self._finish_s
        if not over and server.alive():
            if leaving.told or now - leaving.since < self._drain_s:
                return leaving
            # Its time to finish begins now, however late that is: nobody may have looked for a while.
            if server.terminate():
                return replace(leaving, told=True, told_at=now)
            if now - leaving.since < self._drain_s + self._finish_s:
                return leaving
        self._keeper.end(server)
        log.info("serving.server_taken_away", server=str(server.lock_file))
        return None


def with_strays(content: Path, scale: Scale) -> Scale:
    """Servers that no scale names, as a version had that did not scale, are taken away too."""
    known = {*scale.slots, *(leaving.slot for leaving in scale.leaving)}
    strays = [server.index for server in servers_in(content) if server.index not in known and server.alive()]
    return replace(scale, leaving=(*scale.leaving, *(Leaving(slot, time.time()) for slot in strays)))
