"""What the cluster has of one kind, kept in memory by a list and a watch that goes on where it was cut."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import structlog

from mini_studio.drivers.kubernetes.api import Kind, KubeApi, Object, TooOld
from mini_studio.errors import StudioError

log = structlog.get_logger(__name__)

PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


class Mirror:
    """The objects with the studio's labels, by name. `changed` is called after every change."""

    def __init__(self, api: KubeApi, kind: Kind, selector: str, changed: Callable[[], None]) -> None:
        self.kind = kind
        self._api = api
        self._selector = selector
        self._changed = changed
        self._objects: dict[str, Object] = {}
        self._seen_to = 0
        self.synced = asyncio.Event()
        """Set once the first list was read; what is here may be old while the API server is away, but was all there was."""
        self.problem: StudioError | None = None
        """Why the cluster cannot be followed at the moment."""

    def get(self, name: str) -> Object | None:
        return self._objects.get(name)

    def all(self) -> Iterator[Object]:
        return iter(list(self._objects.values()))

    def put(self, found: Object) -> None:
        """Take in what a call answered, unless the watch has come past it: the object may be gone by then."""
        if version(found) > self._seen_to:
            self._keep(found)

    async def run(self) -> None:
        """List, and watch from there over the watch's ends and cuts, until cancelled; list again when the server has forgotten where."""
        listed, pause_s = False, PAUSE_S
        while True:
            try:
                if not listed:
                    await self._list()
                    listed, pause_s = True, PAUSE_S
                async for type, found in self._api.watch(self.kind, self._selector, str(self._seen_to)):
                    self._take(type, found)
                    pause_s, self.problem = PAUSE_S, None
                continue
            except TooOld:
                log.info("mirror.too_old", kind=self.kind.name)
                listed = False
                continue
            except StudioError as error:
                self._say(error)
            except Exception as error:
                # Nobody watches this task: whatever went wrong, it says so and goes on.
                log.exception("mirror.failed", kind=self.kind.name)
                self.problem = StudioError(f"watching {self.kind.plural} failed unexpectedly: {error!r}")
                listed = False
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _list(self) -> None:
        found, at = await self._api.list(self.kind, self._selector)
        self._objects.clear()
        for each in found:
            self._keep(each)
        self._seen_to = int(at)
        self.problem = None
        self.synced.set()
        self._changed()

    def _take(self, type: str, found: Object) -> None:
        self._seen_to = max(self._seen_to, version(found))
        if type == "BOOKMARK":
            return
        name = found["metadata"]["name"]
        if type == "DELETED":
            self._objects.pop(name, None)
        elif name not in self._objects or version(found) >= version(self._objects[name]):
            self._keep(found)
        self._changed()

    def _keep(self, found: Object) -> None:
        found["metadata"].pop("managedFields", None)  # half of an object, and nobody asks for it
        self._objects[found["metadata"]["name"]] = found

    def _say(self, error: StudioError) -> None:
        if self.problem is None or self.problem.message != error.message:
            log.warning("mirror.waiting", kind=self.kind.name, reason=error.message)
        self.problem = error


def version(found: Object) -> int:
    """An object's resource version: a number that grows with every change in the cluster (Kubernetes 1.35 on promises so)."""
    with contextlib.suppress(ValueError):
        return int(found["metadata"]["resourceVersion"])
    return 0
