"""What stands behind the ports while lives come and go: small, in files, and alive through every kill.

Trainings and model servers are no processes here. The harness moves them on (`Trainers.step`), as the world outside a studio does
whether the studio lives or not; what a training comes to is told by its seed.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

from mini_studio.bus.kafka import Outgoing, Publisher
from mini_studio.drivers.dfs import DfsStore
from mini_studio.drivers.ports import ReleaseReport, ReleaseSpec, ReleaseState, RunReport, RunState, Workers
from mini_studio.drivers.releases import RELEASE, held_in, hold, plan
from mini_studio.errors import Conflict, Invalid, Refused, Unavailable
from mini_studio.files import replace_file
from mini_studio.records.sqlite import SqliteStore
from mini_studio.records.store import Collection, Document
from mini_studio.records.training_runs import RunPhase, TrainingRun
from mini_studio.wiring import Studio
from workloads.specs import (
    CURRENT_ATTEMPT,
    MANIFEST,
    PROGRESS,
    WEIGHTS,
    Manifest,
    ManifestFile,
    Progress,
    TrainSpec,
    attempt_dir,
)

OUTAGES: dict[str, Callable[[], Exception]] = {
    "away": lambda: Unavailable("the part is away"),
    "too small": lambda: Refused("the cluster is too small"),
    "wrong": lambda: Invalid("the part says that this is wrong"),
    "broken": lambda: RuntimeError("nobody expected this"),
}
STEP_S = 0.05


class Seed(IntEnum):
    """What becomes of a job's first attempt; the others succeed."""

    SUCCEEDS = 0
    FAILS = 1
    IS_STOPPED = 2
    IS_FORGOTTEN = 3
    IS_KILLED = 4
    BREAKS = 5
    LEAVES_NOTHING = 6
    HANGS = 7
    IS_REFUSED = 8
    IS_STOPPED_OUTSIDE = 9


class Outages:
    """A file per part that is out of order at the moment, with what it then says."""

    def __init__(self, data: Path) -> None:
        self._folder = data / "outages"
        self._folder.mkdir(parents=True, exist_ok=True)

    def begin(self, part: str, kind: str) -> None:
        (self._folder / f"{part}.met").unlink(missing_ok=True)
        replace_file(self._folder / part, kind)

    def end(self, part: str) -> None:
        (self._folder / part).unlink(missing_ok=True)

    def met(self, part: str) -> bool:
        """Whether somebody has run into the last one."""
        return (self._folder / f"{part}.met").exists()

    def on(self, part: str) -> bool:
        return (self._folder / part).exists()

    def raise_for(self, part: str) -> None:
        try:
            kind = (self._folder / part).read_text()
        except FileNotFoundError:
            return
        (self._folder / f"{part}.met").touch()
        raise OUTAGES[kind]()


class FolderS3(DfsStore):
    """The second store, over a folder of its own."""

    def __init__(self, data: Path) -> None:
        super().__init__(data / "s3")
        self._outages = Outages(data)

    def location(self, key: str) -> str:
        return f"s3://mini-studio/{key}"

    async def read(self, key: str) -> AsyncIterator[bytes]:
        self._outages.raise_for("s3")
        async for chunk in super().read(key):
            yield chunk


class FileCluster:
    """Implements `TrainingCluster`: one file per run. `starts` has a line for every training that was begun."""

    def __init__(self, data: Path) -> None:
        self.folder = data / "cluster"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.starts = data / "starts.jsonl"
        self._outages = Outages(data)

    async def has_room(self, workers: Workers, *, running: int) -> bool:
        self._outages.raise_for("cluster")
        return True

    async def submit(self, submission_id: str, spec_file: Path, *, workers: Workers, metadata: dict[str, str]) -> None:
        spec = TrainSpec.model_validate_json(spec_file.read_bytes())
        if spec.seed == Seed.IS_REFUSED:
            raise Refused("the resources are not there")
        file = self.folder / f"{submission_id}.json"
        if file.exists():
            if json.loads(file.read_text())["metadata"] != metadata:
                raise Refused(f"the submission id {submission_id} is another job's")
            return
        with self.starts.open("a") as starts:
            starts.write(json.dumps({"submission_id": submission_id, **metadata}) + "\n")
        write(file, {"spec": str(spec_file), "metadata": metadata, "state": "running", "message": "", "steps": 0})

    async def report(self, submission_id: str) -> RunReport:
        self._outages.raise_for("reports")
        try:
            run = json.loads((self.folder / f"{submission_id}.json").read_text())
        except FileNotFoundError:
            return RunReport(RunState.LOST, "unknown submission")
        return RunReport(RunState(run["state"]), run["message"])

    async def stop(self, submission_id: str) -> None:
        file = self.folder / f"{submission_id}.json"
        if file.exists():
            write(file, json.loads(file.read_text()) | {"state": "stopped"})

    async def logs(self, submission_id: str, lines: int) -> list[str]:
        return [f"the log of {submission_id}"][:lines]

    async def status(self) -> dict[str, Any]:
        self._outages.raise_for("cluster")
        none = {"total": 0.0, "used": 0.0}
        resources = {"cpu": {"total": 8.0, "used": 0.0}, "gpu": none, "memory_bytes": none}
        return {"available": True, "reason": None, "resources": resources, "nodes": 1}


def write(file: Path, run: dict[str, Any]) -> None:
    """Whole or not at all; not through to the disk, because nobody pulls a plug here."""
    new = file.with_suffix(f".{os.getpid()}")  # the cluster and its trainers write at the same time
    new.write_text(json.dumps({**run, "at": time.time()}))
    new.replace(file)


class Trainers:
    """Every training of a cluster, moved on a step at a time. A trainer stops at once where its token does not hold."""

    def __init__(self, data: Path) -> None:
        self._folder = FileCluster(data).folder
        self._outages = Outages(data)

    def step(self) -> None:
        for file in sorted(self._folder.glob("*.json")):
            run = json.loads(file.read_text())
            if run["state"] == "running" and time.time() - run["at"] > STEP_S:
                self._move(file, run)

    def _move(self, file: Path, run: dict[str, Any]) -> None:
        spec = TrainSpec.model_validate_json(Path(run["spec"]).read_bytes())
        token = spec.job_dir / CURRENT_ATTEMPT
        if not token.exists() or token.read_text() != spec.token:
            write(file, run | {"state": "stopped", "message": "fenced"})
            return
        end = Seed(spec.seed) if spec.attempt == 1 else Seed.SUCCEEDS
        change = self._train(spec, run["steps"], end)
        if change is None:
            file.unlink()
        else:
            write(file, run | {"steps": run["steps"] + 1} | change)

    def _train(self, spec: TrainSpec, step: int, end: Seed) -> dict[str, Any] | None:
        """The next step; what it changes in the cluster's file. None: the cluster forgets the run."""
        attempt = attempt_dir(spec.job_dir, spec.attempt)
        if step == 0:
            say(attempt, kind="started")
            return {}
        if step == 1 or self._outages.on("training-end"):
            say(attempt, kind="progress", step=1, total_steps=2, train_loss=2.0, tokens=10)
            return {}
        match end:
            case Seed.SUCCEEDS:
                say(attempt, kind="progress", step=2, total_steps=2, train_loss=1.0)
                complete(attempt, spec)
                return {"state": "succeeded"}
            case Seed.FAILS | Seed.IS_STOPPED:
                say(
                    attempt, kind="failed", code="bad_row" if end is Seed.FAILS else "stopped", message="as it was told"
                )
                return {"state": "failed", "message": "exit code 1"}
            case Seed.IS_FORGOTTEN:
                return None
            case Seed.IS_KILLED:
                return {"state": "failed", "message": "exit code -9"}
            case Seed.BREAKS:
                return {"state": "failed", "message": "exit code 1"}
            case Seed.LEAVES_NOTHING:
                return {"state": "succeeded"}
            case Seed.IS_STOPPED_OUTSIDE:
                return {"state": "stopped"}
        return {}


def say(attempt: Path, **line: Any) -> None:
    with (attempt / PROGRESS).open("a") as progress:
        progress.write(Progress(time=time.time(), **line).model_dump_json() + "\n")


def complete(attempt: Path, spec: TrainSpec) -> None:
    """The weights, and last the manifest."""
    content = f"{spec.job_id} {spec.attempt}".encode()
    (attempt / WEIGHTS).mkdir(exist_ok=True)
    (attempt / WEIGHTS / "model.bin").write_bytes(content)
    entry = ManifestFile(path="model.bin", size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = Manifest(
        job_id=spec.job_id, attempt=spec.attempt, token=spec.token, files=[entry], train_loss=1.0, steps=2, tokens=10
    )
    replace_file(attempt / MANIFEST, manifest.model_dump_json())


class FileServing:
    """Implements `ServingDriver`: a folder per release, ready at once unless its file `state` says `starting`, `failed` or `asleep`."""

    def __init__(self, data: Path, models: Path, endpoint: str) -> None:
        self.folder = data / "serving"
        self._models = models
        self._endpoint = endpoint

    async def apply(self, spec: ReleaseSpec) -> None:
        planned, held = plan(spec, self._models, 1), held_in(self.folder / spec.name)
        if held is not None and held.deployment_id != spec.deployment_id:
            raise Conflict(f"the name {spec.name} belongs to {held.deployment_id}")
        if held is not None and held.generation > spec.generation:
            raise Conflict(f"{spec.name} has gone on to generation {held.generation}")
        if spec.base_model.startswith("refused"):
            raise Refused("there is no such model")
        if held != planned:
            hold(self.folder / spec.name, planned)

    async def observe(self, name: str) -> ReleaseReport | None:
        held = held_in(self.folder / name)
        if held is None:
            return None
        said = self._state(held.spec.base_model, self.folder / name)
        if said == "asleep":
            return ReleaseReport(name, held.deployment_id, held.generation, ReleaseState.READY)
        state = ReleaseState(said)
        endpoints = [self._endpoint] if state is ReleaseState.READY else []
        return ReleaseReport(name, held.deployment_id, held.generation, state, len(endpoints), endpoints, state.value)

    @staticmethod
    def _state(model: str, folder: Path) -> str:
        file = folder / "state"
        return file.read_text() if file.exists() else ("starting" if model.startswith("slow") else "ready")

    async def remove(self, name: str, deployment_id: str, generation: int) -> None:
        held = held_in(self.folder / name)
        if held is not None and held.deployment_id == deployment_id and held.generation <= generation:
            (self.folder / name / RELEASE).unlink()

    async def wake(self, name: str, deployment_id: str) -> None:
        held, state = held_in(self.folder / name), self.folder / name / "state"
        if held is not None and held.deployment_id == deployment_id and state.exists():
            state.write_text("ready")

    async def list(self) -> AsyncIterator[ReleaseReport]:
        for release in sorted(self.folder.glob(f"*/{RELEASE}")):
            if (report := await self.observe(release.parent.name)) is not None:
                yield report


class WaveringPublisher(Publisher):
    """The real publisher, but for outages."""

    outages: Outages

    async def publish(self, records: Any) -> None:
        batch: list[Outgoing] = list(records)
        self.outages.raise_for("dead-letters" if batch and batch[0].topic.endswith(".dead") else "publisher")
        await super().publish(batch)


class ContestedStore(SqliteStore):
    """The real store, but for outages of a collection or the journal, and for a collection's rival.

    That is another member of the group, which was given the same batch, and writes first; of the runs, another watcher, which
    gives the next attempt up before it is submitted.
    """

    OUTAGES: ClassVar[Outages]

    async def insert(self, collection: Collection, document: Document) -> None:
        self.OUTAGES.raise_for(collection.name)
        if self.OUTAGES.on(f"{collection.name}-rival"):
            await super().insert(collection, document)
        await super().insert(collection, document)

    async def replace(self, collection: Collection, document: Document, version: int) -> bool:
        done = await super().replace(collection, document, version)
        if done and document.get("phase") == RunPhase.SUBMITTED and self.OUTAGES.on(f"{collection.name}-rival"):
            self.OUTAGES.end(f"{collection.name}-rival")
            run = TrainingRun.load(document)
            lost = run.lose(run.token, "Another watcher gave it up.", 10, interrupted=True)
            assert lost is not None
            version = document["version"]
            await super().replace(collection, {**lost.document(), "version": version + 1}, version)
        return done

    async def put_all(self, collection: Collection, changes: Sequence[tuple[Document, int | None]]) -> list[bool]:
        self.OUTAGES.raise_for(collection.name)
        if self.OUTAGES.on(f"{collection.name}-rival"):
            await super().put_all(collection, changes)
        return await super().put_all(collection, changes)

    async def journalled(self, event_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        self.OUTAGES.raise_for("journal")
        return await super().journalled(event_ids)


class StandInStudio(Studio):
    """The studio with the stand-ins behind its ports."""

    ENDPOINT: ClassVar = ""
    OUTAGES: ClassVar[Outages]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        data = self.settings.data
        publisher = WaveringPublisher(self.settings.kafka)
        publisher.outages = self.OUTAGES
        self.publisher = self.relay._publisher = publisher
        parts = {"s3": FolderS3(data), "cluster": FileCluster(data)}
        parts["serving"] = FileServing(data, self.settings.models, self.ENDPOINT)
        self.__dict__ |= parts  # where the cached properties would put them


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A model server: a JSON object for each request."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
    await writer.drain()
    writer.close()


def starts(data: Path) -> Iterator[dict[str, str]]:
    """Every training that was begun."""
    file = FileCluster(data).starts
    if file.exists():
        yield from (json.loads(line) for line in file.read_text().splitlines())
