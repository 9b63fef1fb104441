"""Serving by model server processes on this machine. They outlive the process that started them, and the next one finds them again.

    <state dir>/.locks/<name>           held by whoever changes the release, so two drivers never work on one at once
    <state dir>/<name>/release.json     `Held`: the desired state; written before anything starts, deleted after everything ended
    <state dir>/<name>/<fingerprint>/   the servers of one content (see `drivers.servers`), and how many there should be (`drivers.slots`)

New content (other weights, another base model) has a new fingerprint: its servers are started beside the old ones, which go when the new
ones answer or have failed for good. Between `min_replicas` and `max_replicas` their number follows the load at the gateways
(`drivers.scaling`), at every `apply`; whoever is taken away finishes what it answers (`drivers.draining`). The driver serves on the CPU.
"""

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import structlog

from mini_studio.drivers.draining import DRAIN_S, Drain
from mini_studio.drivers.keeper import Keeper
from mini_studio.drivers.loads import GatewayLoads
from mini_studio.drivers.locks import only_me
from mini_studio.drivers.ports import ReleaseReport, ReleaseSpec, ReleaseState
from mini_studio.drivers.releases import NAME, Held, held_in, hold, plan
from mini_studio.drivers.scaling import Bounds, Load, Needs
from mini_studio.drivers.servers import Server
from mini_studio.drivers.slots import Scale, hold_scale, scale_in
from mini_studio.errors import Conflict, Refused
from mini_studio.settings import Serving

log = structlog.get_logger(__name__)

HEALTH_S = 2.0
PATIENCE_S = 15.0
"""How long a server that answered before may be too busy to answer `/health` and still count."""
ROOM = "_room"
"""The lock of whoever counts servers to start more: the name of no release."""
HUNG_S = 120.0
"""Silence after which a server that is alive is ended, to be started again."""


@dataclass(frozen=True)
class Start:
    """What a model server is started with. `weights` None: the base model, by its catalogue name."""

    model: str
    base_model: str
    weights: Path | None
    models_root: Path
    status_file: Path
    host: str
    threads: int
    finish_s: int


def serve_command(start: Start) -> list[str]:
    by_name = ["--base-model", start.base_model, "--models-root", str(start.models_root)]
    return [
        *(sys.executable, "-m", "workloads.serve", "--served-model-name", start.model),
        *(["--weights", str(start.weights)] if start.weights else by_name),
        *("--host", start.host, "--port", "0"),
        *("--status-file", str(start.status_file), "--threads", str(start.threads)),
        *("--finish-s", str(start.finish_s)),
    ]


class LocalProcessDriver:
    """Implements `ServingDriver`. Any number of instances, in any processes, may share a `state_dir`."""

    def __init__(
        self,
        state_dir: Path,
        models_root: Path,
        settings: Serving,
        *,
        command: Callable[[Start], list[str]] = serve_command,
        backoff_s: float = 1.0,
        gateways: Sequence[str] = (),
        drain_s: float = DRAIN_S,
    ) -> None:
        self._state_dir = state_dir.resolve()
        self._models_root = models_root.resolve()
        self._settings = settings
        self._command = command
        self._keeper = Keeper(max_restarts=settings.max_restarts, backoff_s=backoff_s)
        self._drain = Drain(self._keeper, drain_s, settings.finish_s)
        self._loads = GatewayLoads(gateways, fresh_s=settings.poll_s / 2)
        self._needs: dict[Path, Needs] = {}
        """What was needed lately, by content."""
        self._woken: set[str] = set()
        """Names of sleeping releases for which a request waits."""
        self._answered: dict[int, float] = {}
        self._silent: dict[int, float] = {}
        self._client = httpx.AsyncClient(timeout=HEALTH_S, trust_env=False)

    async def aclose(self) -> None:
        """Let go of everything; the servers go on."""
        await self._client.aclose()
        await self._loads.aclose()
        self._keeper.collect_all()

    async def apply(self, spec: ReleaseSpec) -> None:
        load = await self._load(spec)
        await asyncio.to_thread(self._apply, spec, load)
        self._woken.discard(spec.name)

    async def wake(self, name: str, deployment_id: str) -> None:
        if not NAME.fullmatch(name):
            return
        held = held_in(self._folder(name))
        if held is not None and held.deployment_id == deployment_id and not self._scale(held).slots:
            self._woken.add(name)

    async def remove(self, name: str, deployment_id: str, generation: int) -> None:
        await asyncio.to_thread(self._remove, name, deployment_id, generation)

    async def list(self) -> AsyncIterator[ReleaseReport]:
        with contextlib.suppress(FileNotFoundError):
            for folder in sorted(self._state_dir.iterdir()):
                if NAME.fullmatch(folder.name) and (report := await self.observe(folder.name)) is not None:
                    yield report

    async def observe(self, name: str) -> ReleaseReport | None:
        held = held_in(self._folder(name))
        if held is None:
            return None
        content = self._folder(name) / held.fingerprint
        servers = [Server(content, slot) for slot in self._scale(held).slots]
        endpoints = [found for found in await asyncio.gather(*map(self._endpoint, servers)) if found]
        gave_up = next((why for server in servers if (why := server.process().gave_up)), None)
        progress = f"{len(endpoints)} of {len(servers)} model servers answer."
        crashes = max((server.process().crashes for server in servers), default=0)
        if crashes:
            progress += f" Ended and started again {crashes} times (at most {self._settings.max_restarts} in a row)."
        if endpoints:
            state, news = ReleaseState.READY, progress if len(endpoints) < len(servers) else ""
        elif not servers:
            state, news = ReleaseState.READY, "It sleeps; a request wakes it."
        elif gave_up:
            state, news = ReleaseState.FAILED, gave_up
        else:
            state, news = ReleaseState.STARTING, progress
        message = " ".join(filter(None, [news, *held.notes]))
        return ReleaseReport(
            name, held.deployment_id, held.generation, state, len(endpoints), endpoints=endpoints, message=message
        )

    async def _load(self, spec: ReleaseSpec) -> Load | None:
        """None: it does not depend on that."""
        if not Bounds.of(spec).scales:
            return None
        if spec.name in self._woken:
            return Load(1, complete=False)  # at once; how many more wait is read at the next turn
        return await self._loads.of(spec.name)

    def _apply(self, spec: ReleaseSpec, load: Load | None) -> None:
        folder = self._folder(spec.name)
        with only_me(self._state_dir, spec.name):
            held = held_in(folder)
            if held is None or held.spec != spec:
                if held and held.deployment_id != spec.deployment_id:
                    raise Conflict(f"The name {spec.name} belongs to the deployment {held.deployment_id}.")
                if held and held.generation > spec.generation:
                    raise Conflict(f"{spec.name} has gone on to generation {held.generation}.")
                before, held = held, plan(spec, self._models_root, self._settings.threads)
                with only_me(self._state_dir, ROOM):
                    if before is None:
                        self._check_room(spec)
                    self._begin(folder, held, before)
            self._keep(folder, held, load)

    def _begin(self, folder: Path, held: Held, before: Held | None) -> None:
        content = folder / held.fingerprint
        content.mkdir(parents=True, exist_ok=True)
        self._keeper.forgive(content)
        if before is not None and before.fingerprint != held.fingerprint:
            # as many as served so far; never asleep, because nobody knows yet whether it can be served
            bounds, present = Bounds.of(held.spec), len(self._scale(before).slots)
            self._resize(content, scale_in(content) or Scale(), max(1, bounds.within(present)))
        hold(folder, held)

    def _remove(self, name: str, deployment_id: str, generation: int) -> None:
        folder = self._folder(name)
        if not folder.exists():
            return
        with only_me(self._state_dir, name):
            held = held_in(folder)
            if held and (held.deployment_id != deployment_id or held.generation > generation):
                return
            for content in _contents(folder):
                self._keeper.discard(content)
                self._needs.pop(content, None)
            shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, folder: Path, held: Held, load: Load | None) -> None:
        """One look at a release: decide how many, start and restart those, then take away what is too many, and what is old."""
        content = folder / held.fingerprint
        content.mkdir(parents=True, exist_ok=True)
        scale = self._scaled(content, held, load)
        wanted = [Server(content, slot) for slot in scale.slots]
        for server in wanted:
            self._end_if_hung(server)
            self._keeper.keep(server, partial(self._command_of, server, held))
        if (drained := self._drain.step(content, scale)) != scale:
            hold_scale(content, drained)
        if all(_settled(server) for server in wanted):
            for path in _contents(folder):
                if path != content:
                    self._drain.retire(path)
                    self._needs.pop(path, None)

    def _scaled(self, content: Path, held: Held, load: Load | None) -> Scale:
        """As the load wants it; kept before anything is started or ended."""
        bounds, scale = Bounds.of(held.spec), self._scale(held)
        replicas = bounds.within(len(scale.slots))
        if load is not None:
            needs = self._needs.setdefault(content, Needs(self._settings.scale_down_s))
            ready = any(_ready(Server(content, slot)) for slot in scale.slots)
            replicas = needs.decide(time.monotonic(), len(scale.slots), load, bounds, ready=ready)
        if replicas <= len(scale.slots):
            return self._rescaled(content, held, scale, replicas, load)
        with only_me(self._state_dir, ROOM):
            replicas = max(len(scale.slots), min(replicas, self._room(held.spec.name)))
            return self._rescaled(content, held, scale, replicas, load)

    def _rescaled(self, content: Path, held: Held, scale: Scale, replicas: int, load: Load | None) -> Scale:
        if replicas != len(scale.slots):
            log.info("serving.scaled", name=held.spec.name, replicas=replicas, before=len(scale.slots), load=load)
        return self._resize(content, scale, replicas)

    def _resize(self, content: Path, scale: Scale, replicas: int) -> Scale:
        ready = [slot for slot in scale.slots if _ready(Server(content, slot))]
        resized = scale.resized(replicas, time.time(), ready, lambda slot: Server(content, slot).alive())
        for slot in set(resized.slots) - set(scale.slots):
            self._keeper.forgive_one(Server(content, slot))
        if resized != scale_in(content):
            hold_scale(content, resized)
        return resized

    def _scale(self, held: Held) -> Scale:
        """As it was last decided; what was never scaled has the servers that it asks for, and one at least."""
        initial = Scale(tuple(range(max(1, held.spec.min_replicas))))
        return scale_in(self._folder(held.spec.name) / held.fingerprint) or initial

    def _check_room(self, spec: ReleaseSpec) -> None:
        """Raises `Refused` where one request would take the machine's memory from all others."""
        asked, room = max(1, spec.min_replicas), self._room(spec.name)
        if asked > room:
            raise Refused(
                f"{spec.name} needs {asked} model servers and this machine has room for {max(0, room)} more "
                f"(MINI_STUDIO_SERVING__MAX_SERVERS): ask for fewer replicas, or remove a deployment."
            )

    def _room(self, name: str) -> int:
        """Servers that a release may have besides those of all others, which count until they have ended."""
        others = [path for path in self._state_dir.iterdir() if NAME.fullmatch(path.name) and path.name != name]
        return self._settings.max_servers - sum(self._servers(folder) for folder in others)

    def _servers(self, folder: Path) -> int:
        scales = [scale for content in _contents(folder) if (scale := scale_in(content)) is not None]
        held = held_in(folder)
        if held is not None and scale_in(folder / held.fingerprint) is None:
            scales.append(self._scale(held))
        return sum(len(scale.slots) + len(scale.leaving) for scale in scales)

    def _command_of(self, server: Server, held: Held) -> Sequence[str]:
        return self._command(
            Start(
                model=held.spec.model,
                base_model=held.spec.base_model,
                weights=held.weights,
                models_root=self._models_root,
                status_file=server.status_file,
                host=self._settings.host,
                threads=self._settings.threads,
                finish_s=self._settings.finish_s,
            )
        )

    def _end_if_hung(self, server: Server) -> None:
        pid = server.process().pid
        if pid is not None and time.time() - self._silent.get(pid, time.time()) > HUNG_S and server.alive():
            log.warning("serving.server_hung", server=str(server.lock_file), pid=pid)
            self._silent.pop(pid)
            server.stop()

    async def _endpoint(self, server: Server) -> str | None:
        """The server's address, if it is ready and answers."""
        said, pid = server.status(), server.process().pid
        if said is None or said.port is None or pid is None or said.pid != pid or not _ready(server):
            return None
        endpoint, now = f"http://{self._settings.host}:{said.port}", time.time()
        try:
            if (await self._client.get(f"{endpoint}/health")).is_success:
                self._answered[pid] = now
                self._silent.pop(pid, None)
                return endpoint
        except httpx.TimeoutException:
            # busy, not gone: a model server may hold all cores for a while
            if now - self._answered.get(pid, 0.0) < PATIENCE_S:
                return endpoint
        except httpx.HTTPError:
            pass
        self._silent.setdefault(pid, now)
        return None

    def _folder(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise Refused(f"{name[:80]!r} cannot name a deployment.")
        return self._state_dir / name


def _contents(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _ready(server: Server) -> bool:
    """Whether the server says so, and lives."""
    said = server.status()
    return said is not None and said.state == "ready" and said.port is not None and server.alive()


def _settled(server: Server) -> bool:
    """Whether there is nothing to wait for: it is ready, or will never be."""
    return _ready(server) or server.process().gave_up is not None
