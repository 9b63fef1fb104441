"""One deployment: asked for, scaled, removed, asked for again. Requests, handlers, relay, watchers and records are the real ones.

The world around them is small: a record store, a journal, a log, the topic of routes, and a serving driver that keeps to its contract.
"""

import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from consumers import routes, serving
from consumers.watchers import serving as watcher
from events.deployments import DeployRequested
from mini_studio.bus.relay import Relay
from mini_studio.bus.routes import RouteTable
from mini_studio.drivers.ports import ReleaseReport, ReleaseSpec, ReleaseState
from mini_studio.errors import Conflict, Refused, Unavailable
from mini_studio.records.deployments import Deployment, removal
from mini_studio.records.deployments import Deployments as DeploymentRecords
from mini_studio.records.record import ANYONE, Repository
from mini_studio.records.releases import Release
from mini_studio.records.routes import Route, RouteRecord
from mini_studio.settings import Settings
from tests.consumers.cases import CAUSE, deploy
from tests.faults.model.actors import Actors, Steps
from tests.faults.model.kernel import Call, Explored, Programs, Raised, Thread, explore, io
from tests.faults.model.parts import (
    STORED,
    Docs,
    ModelPublisher,
    ModelStore,
    answer,
    document,
    event,
    is_route,
    pending,
    wrong_events,
    wrong_projection,
)

ID = "dep_" + "0" * 24
READERS = ("serving", "routes")
OUTBOXES = (Deployment.COLLECTION, Release.COLLECTION, RouteRecord.COLLECTION)
STARTING, READY, FAILED = ReleaseState.STARTING, ReleaseState.READY, ReleaseState.FAILED
DEPLOY = deploy(ID)
LARGER = DEPLOY.model_copy(update={"scale": DEPLOY.scale.model_copy(update={"min_replicas": 2, "max_replicas": 2})})


class Faults(NamedTuple):
    """How many of each kind may still come."""

    crash: int = 0
    """Of anyone between any two of its steps."""
    again: int = 0
    """A reader starts again at an earlier record."""
    broker: int = 0
    """The broker forgets everything and is refilled from the journal."""
    away: int = 0
    """The driver does not answer a call."""
    refusal: int = 0
    """The driver refuses an `apply`."""
    forget: int = 0
    """The driver's objects are gone."""
    death: int = 0
    """A server ends, to be started again or for good."""

    def spend(self, kind: str) -> "Faults | None":
        left = getattr(self, kind)
        return self._replace(**{kind: left - 1}) if left else None


class Held(NamedTuple):
    """What the driver has."""

    spec: ReleaseSpec
    state: ReleaseState = STARTING


class World(NamedTuple):
    faults: Faults
    threads: tuple[Thread | None, ...]
    wishes: tuple[str, ...]
    """What the client will still ask for, in any order."""
    docs: Docs = ()
    decided: tuple[str, ...] = ()
    journal: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    offsets: tuple[int, ...] = (0, 0)
    held: Held | None = None
    published: tuple[str, ...] = ()
    """Routes and tombstones on the compacted topic, in order."""


# --- what the real code is given


class Driver:
    """Implements `ServingDriver` by its contract."""

    async def apply(self, spec: ReleaseSpec) -> None:
        await io("apply", spec)

    async def observe(self, name: str) -> ReleaseReport | None:
        seen = await io("observe")
        if seen is None:
            return None
        generation, state = seen
        endpoints = [f"http://generation-{generation}"] if state is READY else []
        return ReleaseReport(name, ID, generation, state, len(endpoints), endpoints)

    async def list(self) -> AsyncIterator[ReleaseReport]:
        if (report := await self.observe(DEPLOY.name)) is not None:
            yield report

    async def remove(self, _name: str, _deployment_id: str, generation: int) -> None:
        await io("remove", generation)


def studio() -> Any:
    store = ModelStore()
    return SimpleNamespace(
        settings=Settings(data=Path("/studio")), store=store, serving=Driver(),
        deployments=DeploymentRecords(store, Deployment), releases=Repository(store, Release),
        routes=Repository(store, RouteRecord), releases_changed=SimpleNamespace(set=lambda: None),
    )  # fmt: skip


async def remove(of: Any) -> None:
    await of.deployments.change("acme", ID, lambda present: removal(present, CAUSE))


async def turn(of: Any) -> None:
    """One watcher's turn on the release as it finds it."""
    release = await of.releases.get(ANYONE, ID)
    if release is not None and not release.settled:
        await (watcher.keep(release, of) if release.wanted else watcher.remove(release, of))


def programs() -> Programs:
    of = studio()

    def ask(for_: DeployRequested) -> Callable[..., Any]:
        return lambda: of.deployments.request("acme", for_, CAUSE)

    async def serve(_offset: int, ids: tuple[str, ...]) -> None:
        for id in ids:
            await serving.consumer.deliver(event(id), of)

    return Programs(
        {
            "deploy": ask(DEPLOY), "rescale": ask(LARGER), "remove": lambda: remove(of),
            "relay": lambda: Relay(of.store, ModelPublisher(), OUTBOXES).sweep(),  # type: ignore[arg-type]
            "serving": serve, "routes": lambda _offset, ids: routes.project([event(id) for id in ids], of),
            "watcher": lambda: turn(of),
            "sweep": lambda: watcher.sweep(of),
        }
    )  # fmt: skip


# --- all steps

Removes = Callable[[Held, int], bool]


def up_to(held: Held, generation: int) -> bool:
    """The contract: only objects up to the generation that was removed."""
    return held.spec.generation <= generation


class Deployments(Actors):
    """The model of one deployment. `removes` is what the driver takes away; another one than `up_to` is a seeded bug."""

    READERS = READERS
    FAIR = ("relay", *READERS, "watcher", "sweep", "deploy", "rescale", "remove")

    def __init__(
        self, slots: Sequence[str], faults: Faults, wishes: Sequence[str], *, removes: Removes = up_to, **how: Any
    ) -> None:
        super().__init__(slots, programs(), **how)
        self._faults, self._wishes, self._removes = faults, wishes, removes

    def start(self) -> World:
        return World(self._faults, (None,) * len(self._slots), tuple(sorted(self._wishes)))

    def serving(self) -> World:
        """A world in which it was asked for and is served, and everybody knows."""
        world = self.until_done(self.start()._replace(wishes=()), "deploy")
        while (step := self.fair(world)) is not None:
            world = step[1]
        return world._replace(wishes=self.start().wishes)

    def search(self, start: World, limit: int) -> Explored:
        return explore(self.model(wrong, wrong_step, wrong_end, reached), start, limit)

    def due(self, world: World, name: str) -> bool:
        match name:
            case "relay":
                return bool(pending(world.docs))
            case "sweep":
                return world.held is not None
            case "watcher":
                release = document(world.docs, "releases")
                return release is not None and not release["settled"]
            case _:
                return name in world.wishes

    def done(self, world: World, thread: Thread) -> World:
        wishes = list(world.wishes)
        if thread.program in wishes:
            wishes.remove(thread.program)
        return world._replace(wishes=tuple(wishes))

    def surroundings(self, world: World) -> Steps:
        yield from self.fair_surroundings(world)
        if world.held is None:
            return
        if left := world.faults.spend("death"):
            for state in (STARTING, FAILED):
                yield f"its server is {state}", world._replace(faults=left, held=world.held._replace(state=state))
        if left := world.faults.spend("forget"):
            yield "the driver forgets", world._replace(faults=left, held=None)

    def fair_surroundings(self, world: World) -> Steps:
        if world.held is not None and world.held.state is STARTING:
            yield "its server is ready", world._replace(held=world.held._replace(state=READY))

    def answers(self, world: World, call: Call, *, fair: bool) -> Iterator[tuple[str, World, Any]]:
        match call:
            case Call("apply", (spec,)):
                yield _applied(world, spec)
                if not fair and (left := world.faults.spend("refusal")):
                    yield "(refused)", world._replace(faults=left), Raised(Refused, "quota exceeded")
            case Call("observe", ()):
                yield "", world, world.held and (world.held.spec.generation, world.held.state)
            case Call("remove", (generation,)):
                gone = world.held is not None and self._removes(world.held, generation)
                yield "", world._replace(held=None) if gone else world, None
            case Call("publish", (key,)) if is_route(key):
                yield "", world._replace(published=(*world.published, key)), None
            case _:
                yield from answer(world, call)
                return
        if not fair and (left := world.faults.spend("away")):
            yield "(away)", world._replace(faults=left), Raised(Unavailable, "no answer")


def _applied(world: World, spec: ReleaseSpec) -> tuple[str, World, Any]:
    held = world.held
    if held is not None and held.spec.generation > spec.generation:
        return "(overtaken)", world, Raised(Conflict, "it has gone on")
    same = held is not None and held.spec == spec
    return f"(generation {spec.generation})", world if same else world._replace(held=Held(spec)), None


# --- what must hold


def reached(world: World) -> str:
    """Where the search got, in a word."""
    found = document(world.docs, "deployments")
    return f"{found['status']} {found['generation']}" if found else "nothing"


def wrong(world: World) -> str | None:
    log = (*world.log, *world.published)
    return wrong_events(world.docs, world.decided, world.journal, log) or wrong_projection(
        Deployment, world.docs, world.decided
    )


def wrong_step(before: World, after: World) -> str | None:
    """Objects only ever go with a removal that is at least as new; records never go back to an older generation."""
    for name, field in (("deployments", "generation"), ("releases", "generation"), ("routes", "revision")):
        old, new = document(before.docs, name), document(after.docs, name)
        if old and new and new[field] < old[field]:
            return f"{name} went back from {field} {old[field]} to {new[field]}"
    if before.held is None or after.held is not None or before.faults != after.faults:
        return None
    removal = max((event(id).data.generation for id in before.decided if "removal" in id), default=0)
    if before.held.spec.generation > removal:
        return f"removal {removal} took the objects of generation {before.held.spec.generation}"
    return None


def wrong_end(world: World) -> str | None:
    found, release = document(world.docs, "deployments"), document(world.docs, "releases")
    if found is None or release is None:
        return None if not world.decided else "the request was never taken up"
    if pending(world.docs):
        return f"in the end there waits {pending(world.docs)}"
    if found["generation"] != release["generation"]:
        return f"generation {found['generation']} was asked for, {release['generation']} is followed"
    return _wrong_objects(world, found, Release.load(release)) or wrong_routes(world.docs, world.published)


def _wrong_objects(world: World, found: dict[str, Any], release: Release) -> str | None:
    held = world.held
    if not release.wanted:
        if held is not None:
            return f"it is removed, and the driver has generation {held.spec.generation}"
        return None if found["status"] == "removed" else f"it is removed, and its record says {found['status']}"
    if release.settled:
        return None if found["status"] == "failed" else f"it was refused, and its record says {found['status']}"
    if held is None or held.spec != watcher.spec(release):
        return f"generation {release.generation} is wanted, the driver has {held and held.spec}"
    if found["status"] != held.state:
        return f"the driver says {held.state}, the record {found['status']}"
    return None


@lru_cache(maxsize=10_000)
def wrong_routes(docs: Docs, published: Sequence[str]) -> str | None:
    """The route is the present one, and a gateway that applies the topic's records in any order ends with it."""
    deployment = Deployment.load(document(docs, "deployments") or {})
    record = RouteRecord.load(document(docs, "routes") or {})
    wanted = RouteRecord.of(deployment).route
    expected = wanted and wanted.model_copy(update={"revision": record.revision})
    if record.route != expected:
        return f"in the end the route is {record.route} instead of {expected}"
    for order in itertools.islice(itertools.permutations(dict.fromkeys(published)), 120):
        table = RouteTable()
        for key in order:
            value = STORED[key]["value"]
            route = Route.model_validate_json(value) if value else None
            table.put(ID, route, int(STORED[key]["headers"]["ce_id"].rpartition("/")[2]))
        if table.all() != [route for route in [record.route] if route]:
            return f"a gateway that read {order} ends with {table.all()}"
    return None
