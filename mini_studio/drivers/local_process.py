"""Serving by model server processes on this machine. They outlive the process that started them, and the next one finds them again.

    <state dir>/.locks/<name>           held by whoever changes the release, so two drivers never work on one at once
    <state dir>/<name>/release.json     `Held`: the desired state; written before anything starts, deleted after everything ended
    <state dir>/<name>/<fingerprint>/   the servers of one content (see `drivers.servers`)

New content (other weights, another base model) has a new fingerprint: its servers are started beside the old ones, which go when the new
ones answer or have failed for good. The driver serves on the CPU and does not scale: it runs `min_replicas` servers, and at least one.
"""

import asyncio
import contextlib
import fcntl
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import structlog

from mini_studio.drivers.keeper import Keeper
from mini_studio.drivers.ports import ReleaseReport, ReleaseSpec, ReleaseState
from mini_studio.drivers.releases import NAME, Held, held_in, hold, plan
from mini_studio.drivers.servers import Server, servers_in
from mini_studio.errors import Conflict, Refused, Unavailable
from mini_studio.settings import Serving

log = structlog.get_logger(__name__)

HEALTH_S = 2.0
PATIENCE_S = 15.0
"""How long a server that answered before may be too busy to answer `/health` and still count."""
HUNG_S = 120.0
"""Silence after which a server that is alive is ended, to be started again."""
BUSY_S = 15.0
"""How long to wait for another driver to be done with a release."""


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


def serve_command(start: Start) -> list[str]:
    by_name = ["--base-model", start.base_model, "--models-root", str(start.models_root)]
    return [
        *(sys.executable, "-m", "workloads.serve", "--served-model-name", start.model),
        *(["--weights", str(start.weights)] if start.weights else by_name),
        *("--host", start.host, "--port", "0"),
        *("--status-file", str(start.status_file), "--threads", str(start.threads)),
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
    ) -> None:
        self._state_dir = state_dir.resolve()
        self._models_root = models_root.resolve()
        self._settings = settings
        self._command = command
        self._keeper = Keeper(max_restarts=settings.max_restarts, backoff_s=backoff_s)
        self._answered: dict[int, float] = {}
        self._silent: dict[int, float] = {}
        self._client = httpx.AsyncClient(timeout=HEALTH_S, trust_env=False)

    async def aclose(self) -> None:
        """Let go of everything; the servers go on."""
        await self._client.aclose()
        self._keeper.collect_all()

    async def apply(self, spec: ReleaseSpec) -> None:
        await asyncio.to_thread(self._apply, spec)

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
        servers = self._wanted(held)
        endpoints = [found for found in await asyncio.gather(*map(self._endpoint, servers)) if found]
        gave_up = next((why for server in servers if (why := server.process().gave_up)), None)
        progress = f"{len(endpoints)} of {len(servers)} model servers answer."
        crashes = max(server.process().crashes for server in servers)
        if crashes:
            progress += f" Ended and started again {crashes} times (at most {self._settings.max_restarts} in a row)."
        if endpoints:
            state, news = ReleaseState.READY, progress if len(endpoints) < len(servers) else ""
        elif gave_up:
            state, news = ReleaseState.FAILED, gave_up
        else:
            state, news = ReleaseState.STARTING, progress
        message = " ".join(filter(None, [news, *held.notes]))
        return ReleaseReport(
            name, held.deployment_id, held.generation, state, len(endpoints), endpoints=endpoints, message=message
        )

    def _apply(self, spec: ReleaseSpec) -> None:
        folder = self._folder(spec.name)
        with self._only_me(spec.name):
            held = held_in(folder)
            if held is None or held.spec != spec:
                if held and held.deployment_id != spec.deployment_id:
                    raise Conflict(f"The name {spec.name} belongs to the deployment {held.deployment_id}.")
                if held and held.generation > spec.generation:
                    raise Conflict(f"{spec.name} has gone on to generation {held.generation}.")
                held = plan(spec, self._models_root, self._settings.threads)
                self._keeper.forgive(folder / held.fingerprint)
                hold(folder, held)
            self._keep(folder, held)

    def _remove(self, name: str, deployment_id: str, generation: int) -> None:
        folder = self._folder(name)
        if not folder.exists():
            return
        with self._only_me(name):
            held = held_in(folder)
            if held and (held.deployment_id != deployment_id or held.generation > generation):
                return
            for content in _contents(folder):
                self._keeper.discard(content)
            shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, folder: Path, held: Held) -> None:
        """One look at a release: start and restart what is wanted, end what is too many, then what is old."""
        content = folder / held.fingerprint
        content.mkdir(parents=True, exist_ok=True)
        wanted = self._wanted(held)
        for server in wanted:
            self._end_if_hung(server)
            self._keeper.keep(server, partial(self._command_of, server, held))
        for server in servers_in(content)[len(wanted) :]:
            self._keeper.end(server)
        old = [path for path in _contents(folder) if path != content]
        if old and all(_settled(server) for server in wanted):
            for path in old:
                self._keeper.discard(path)

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
            )
        )

    def _end_if_hung(self, server: Server) -> None:
        pid = server.process().pid
        if pid is not None and time.time() - self._silent.get(pid, time.time()) > HUNG_S and server.alive():
            log.warning("serving.server_hung", server=str(server.lock_file), pid=pid)
            self._silent.pop(pid)
            server.stop()

    def _wanted(self, held: Held) -> Sequence[Server]:
        content = self._folder(held.spec.name) / held.fingerprint
        return [Server(content, index) for index in range(max(1, held.spec.min_replicas))]

    async def _endpoint(self, server: Server) -> str | None:
        """The server's address, if it is ready and answers."""
        said, pid = server.status(), server.process().pid
        if said is None or pid is None or said.pid != pid or not _ready(server):
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

    @contextmanager
    def _only_me(self, name: str) -> Iterator[None]:
        """Hold the release's lock, which the system drops when its holder dies. Turns `OSError` into `Unavailable`."""
        try:
            locks = self._state_dir / ".locks"
            locks.mkdir(parents=True, exist_ok=True)
            with (locks / name).open("w") as lock:
                _wait_for(lock.fileno(), name)
                yield
        except OSError as error:
            at = error.filename or self._state_dir
            raise Unavailable(
                f"{name} cannot be served for now: {error.strerror or error} ({at}). Make room or make it accessible."
            ) from error


def _wait_for(lock: int, name: str) -> None:
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Unavailable(f"Another process is at work on {name}.") from None
            time.sleep(0.05)


def _contents(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _ready(server: Server) -> bool:
    """Whether the server says so, and lives."""
    said = server.status()
    return said is not None and said.state == "ready" and said.port is not None and server.alive()


def _settled(server: Server) -> bool:
    """Whether there is nothing to wait for: it is ready, or will never be."""
    return _ready(server) or server.process().gave_up is not None
