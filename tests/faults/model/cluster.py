"""What a fine-tune runs on: Ray, which forgets, its trainers, which live on, and one job's folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mini_studio.drivers.ports import RunReport, RunState
from mini_studio.errors import Unavailable
from mini_studio.records.training_runs import TrainingRun
from tests.faults.model.kernel import Call, Raised, Thread, io
from tests.faults.model.parts import NOW, Docs, answer
from workloads.specs import Manifest, Progress


class Faults(NamedTuple):
    """How many of each kind may still come."""

    crash: int = 0
    """Of a handler, a relay, a watcher or the API between any two of its steps."""
    again: int = 0
    """A reader starts again at an earlier record."""
    broker: int = 0
    """The broker forgets everything and is refilled from the journal."""
    forget: int = 0
    """Ray does. What it ran dies with it or, worse, goes on."""
    death: int = 0
    """A trainer ends: it is killed, it fails, or it dies and Ray still says RUNNING."""
    silence: int = 0
    """A trainer that lives shows no sign of it for too long."""
    unknown: int = 0
    """Ray's answer to a submit is lost, and the submit itself or not."""

    def spend(self, kind: str) -> "Faults | None":
        left = getattr(self, kind)
        return self._replace(**{kind: left - 1}) if left else None


class Folder(NamedTuple):
    """One attempt's."""

    token: str
    lines: tuple[str, ...] = ()
    manifest: str = ""


class Trainer(NamedTuple):
    attempt: int
    at: str = "new"
    known: bool = True
    """Whether Ray knows that it runs it; False: an orphan."""


class World(NamedTuple):
    faults: Faults
    threads: tuple[Thread | None, ...]
    docs: Docs = ()
    decided: tuple[str, ...] = ()
    """Every event that was ever written together with its record."""
    journal: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    offsets: tuple[int, ...] = (0, 0)
    """Records acknowledged by each reader."""
    acknowledged: bool = False
    """Whether the client was told that its request is taken."""
    answered: bool = False
    """Whether it was told what became of its cancel."""
    current: str = ""
    """The token in `current-attempt`."""
    folders: tuple[tuple[int, Folder], ...] = ()
    linked: int = 0
    """The attempt that the job's final path points at."""
    ray: tuple[tuple[int, str], ...] = ()
    trainers: tuple[Trainer, ...] = ()

    def folder(self, attempt: int) -> Folder | None:
        return dict(self.folders).get(attempt)

    def with_folder(self, attempt: int, folder: Folder) -> "World":
        return self._replace(folders=tuple(sorted({**dict(self.folders), attempt: folder}.items())))

    def with_ray(self, attempt: int, state: str) -> "World":
        return self._replace(ray=tuple(sorted({**dict(self.ray), attempt: state}.items())))

    def with_trainers(self, trainers: Sequence[Trainer]) -> "World":
        return self._replace(trainers=tuple(sorted(trainers)))


# --- what the real code is given


class Cluster:
    """Implements `TrainingCluster`. What changes nothing and tells nothing is answered at once."""

    async def has_room(self, *_: Any, **__: Any) -> bool:
        return True

    async def logs(self, *_: Any) -> list[str]:
        return []

    async def submit(self, submission_id: str, *_: Any, **__: Any) -> None:
        await io("submit", int(submission_id.rpartition("-")[2]))

    async def report(self, submission_id: str) -> RunReport:
        state, message = await io("report", int(submission_id.rpartition("-")[2]))
        return RunReport(RunState(state), message)

    async def stop(self, submission_id: str) -> None:
        await io("stop", int(submission_id.rpartition("-")[2]))


async def prepare(spec: Any) -> Path:
    await io("prepare", spec.attempt, spec.token)
    return Path("spec.json")


async def void(_job_dir: Path, token: str) -> None:
    if await io("read_current") == token:
        await io("unlink_current")


async def last_sign_of_life(folder: Path) -> float:
    return float(await io("sign_of_life", int(folder.name)))


async def read_progress(folder: Path, offset: int) -> tuple[list[Progress], int]:
    said, end = await io("read_progress", int(folder.name), offset)
    return [_line(word) for word in said], end


async def complete(folder: Path, run: TrainingRun) -> bool:
    return bool(await io("manifest", int(folder.name)) == run.token)


async def publish(folder: Path, run: TrainingRun) -> Manifest:
    await io("link", int(folder.name))
    return Manifest(job_id=run.id, attempt=run.attempt, token=run.token, files=[], train_loss=0.1, steps=9, tokens=5)


async def fence(_job_dir: Path) -> None:
    await io("unlink_current")


async def remove_artifacts(_job_dir: Path) -> None:
    await io("remove_artifacts")


async def give_up(job_dir: Path, token: str, _over: bool) -> None:
    await void(job_dir, token)


async def remove_checkpoints(_job_dir: Path) -> None:
    """No attempt of this world leaves any."""


FILES = {
    f.__name__: f
    for f in (
        prepare,
        void,
        give_up,
        fence,
        last_sign_of_life,
        read_progress,
        complete,
        publish,
        remove_checkpoints,
        remove_artifacts,
    )
}


def _line(word: str) -> Progress:
    kind, _, code = word.partition(":")
    return Progress.model_validate({"kind": kind, "time": NOW, "code": code or None, "step": 1 if not code else None})


# --- how the world answers


def answers(world: World, call: Call, *, fair: bool) -> Iterator[tuple[str, World, Any]]:
    match call:
        case Call("prepare", (attempt, token)):
            folder = world.folder(attempt) or Folder(token)
            yield "", world.with_folder(attempt, folder._replace(token=token))._replace(current=token), None
        case Call("read_current"):
            yield "", world, world.current
        case Call("unlink_current"):
            yield "", world._replace(current=""), None
        case Call("remove_artifacts"):
            kept = tuple((attempt, folder._replace(manifest="")) for attempt, folder in world.folders)
            yield "", world._replace(folders=kept), None
        case Call("sign_of_life", (attempt,)):
            yield from _signs(world, attempt, fair=fair)
        case Call("read_progress", (attempt, offset)):
            lines = (world.folder(attempt) or Folder("")).lines
            yield "", world, (lines[offset:], len(lines))
        case Call("manifest", (attempt,)):
            yield "", world, (world.folder(attempt) or Folder("")).manifest
        case Call("link", (attempt,)):
            yield "", world._replace(linked=attempt), None
        case Call("submit", (attempt,)):
            yield from _submits(world, attempt, fair=fair)
        case Call("report", (attempt,)):
            state = dict(world.ray).get(attempt, "lost")
            message = "exit code -9" if state == "killed" else ""
            yield f"({state})", world, ("failed" if state == "killed" else state, message)
        case Call("stop", (attempt,)):
            yield "", _stopped(world, attempt), None
        case _:
            yield from answer(world, call)


def _signs(world: World, attempt: int, *, fair: bool) -> Iterator[tuple[str, World, float]]:
    """Long silence is nothing special for an attempt that nobody works on."""
    alive = [trainer for trainer in world.trainers if trainer.attempt == attempt]
    fresh, quiet, silent = ("(fresh)", world, NOW), ("(quiet)", world, NOW - 10), ("(silent)", world, 0.0)
    if fair:
        yield fresh if alive else silent
        return
    yield quiet
    if not alive:
        yield silent
        return
    if any(trainer.at != "new" for trainer in alive):
        yield fresh
    if left := world.faults.spend("silence"):
        yield "(silent, though it lives)", world._replace(faults=left), 0.0


def _submits(world: World, attempt: int, *, fair: bool) -> Iterator[tuple[str, World, Any]]:
    there = dict(world.ray).get(attempt)
    after = world if there else world.with_ray(attempt, "running").with_trainers((*world.trainers, Trainer(attempt)))
    yield "", after, None
    if not fair and (left := world.faults.spend("unknown")):
        yield "(answer lost)", after._replace(faults=left), Raised(Unavailable, "no answer")
        yield "(lost)", world._replace(faults=left), Raised(Unavailable, "no answer")


def _stopped(world: World, attempt: int) -> World:
    """SIGTERM: the trainer says so and ends. Ray stops only what it knows of."""
    stopped = [trainer for trainer in world.trainers if trainer.attempt == attempt and trainer.known]
    for trainer in stopped:
        world = ended(world, trainer, "failed:stopped" if trainer.at != "new" else "", "stopped")
    return world.with_ray(attempt, "stopped") if dict(world.ray).get(attempt) == "running" else world


# --- trainers, as workloads/train/attempt.py does it


def said(world: World, attempt: int, word: str) -> World:
    folder = world.folder(attempt)
    assert folder is not None, "a trainer starts from its folder's spec"
    return world.with_folder(attempt, folder._replace(lines=(*folder.lines, word))) if word else world


def ended(world: World, trainer: Trainer, word: str, state: str) -> World:
    world = said(world, trainer.attempt, word)
    left = list(world.trainers)
    left.remove(trainer)
    world = world.with_trainers(left)
    return world.with_ray(trainer.attempt, state) if trainer.known else world


def trains(world: World, trainer: Trainer) -> Iterator[tuple[str, World]]:
    """What the trainer does next, and that it may be fenced first."""
    folder = world.folder(trainer.attempt)
    assert folder is not None
    others = list(world.trainers)
    others.remove(trainer)

    def goes_on(to: str, word: str = "") -> World:
        return said(world, trainer.attempt, word).with_trainers([*others, trainer._replace(at=to)])

    fenced = world.current != folder.token
    if trainer.at == "new":
        busy = any(other.attempt == trainer.attempt and other.at != "new" for other in others)
        if folder.manifest == folder.token and not busy:
            yield "finds it done", ended(world, trainer, "", "succeeded")
        elif busy:
            if fenced:
                yield "is fenced while it waits", ended(world, trainer, "failed:fenced", "failed")
        else:
            yield "starts", goes_on("started", "started")
        return
    if fenced:
        yield "is fenced", ended(world, trainer, "failed:fenced", "failed")
    match trainer.at:
        case "started":
            yield "makes a step", goes_on("trained", "progress")
        case "trained" if not fenced:
            yield "has its weights, and the fence lets it pass", goes_on("passed")
        case "passed":
            complete = world.with_folder(trainer.attempt, folder._replace(manifest=folder.token))
            yield "writes its manifest", complete.with_trainers([*others, trainer._replace(at="written")])
        case "written":
            yield "finishes", ended(world, trainer, "finished", "succeeded")


def dies(world: World, trainer: Trainer) -> Iterator[tuple[str, World]]:
    if (left := world.faults.spend("death")) is None:
        return
    poorer = world._replace(faults=left)
    yield "is killed", ended(poorer, trainer, "", "killed")
    yield "dies, and Ray says RUNNING", ended(poorer, trainer, "", "running")
    if trainer.at in ("started", "trained"):
        yield "fails", ended(poorer, trainer, "failed:out_of_memory", "failed")
