"""A training cluster in memory, for tests of what stands on the port. It runs nothing: the test says what becomes of a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mini_studio.drivers.ports import RunReport, RunState, Workers
from mini_studio.errors import Denied, Refused, Unavailable

OVER = (RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED)


@dataclass
class FakeRun:
    spec_file: Path
    workers: Workers
    metadata: dict[str, str]
    state: RunState = RunState.RUNNING
    message: str = ""
    log: list[str] = field(default_factory=list)


class FakeTrainingCluster:
    """Implements `TrainingCluster`."""

    def __init__(self, *, starts_as: RunState = RunState.RUNNING, cpus: float = 10_000.0) -> None:
        self.cpus = cpus
        self.runs: dict[str, FakeRun] = {}
        self.submits = 0
        """Calls of `submit`, refused and repeated ones included."""
        self.stops: list[str] = []
        self.starts_as = starts_as
        self.away = False
        """While true every call fails as if nobody listened."""
        self.denies: str | None = None
        """While set every call fails as if the token were wrong, with this message."""
        self.loses_answers = False
        """While true a submit happens, and its answer is lost: the outcome is unknown to the caller."""
        self.refuses: str | None = None
        """While set every new submission is refused with this message."""

    # --- what a test does to it

    def start(self, submission_id: str) -> None:
        self.runs[submission_id].state = RunState.RUNNING

    def finish(self, submission_id: str) -> None:
        self.runs[submission_id].state = RunState.SUCCEEDED

    def fail(self, submission_id: str, exit_code: int = 1, log: list[str] | None = None) -> None:
        run = self.runs[submission_id]
        run.state, run.message = RunState.FAILED, f"The training process ended with exit code {exit_code}."
        run.log += log or []

    def forget(self) -> None:
        """The head was restarted: it knows nothing any more."""
        self.runs.clear()

    # --- the port

    async def has_room(self, workers: Workers, *, running: int) -> bool:
        self._answer()
        if workers.gpus > 0 or workers.count * workers.cpus > self.cpus:
            raise Refused("the cluster is too small")
        return running * workers.count * workers.cpus + workers.count * workers.cpus <= self.cpus

    async def submit(self, submission_id: str, spec_file: Path, *, workers: Workers, metadata: dict[str, str]) -> None:
        self.submits += 1
        self._answer()
        if self.refuses is not None:
            raise Refused(self.refuses)
        held = self.runs.get(submission_id)
        if held is None:
            self.runs[submission_id] = FakeRun(spec_file, workers, dict(metadata), self.starts_as)
        elif held.metadata != metadata:
            raise Refused(f"the submission id {submission_id} is another job's: {held.metadata}")
        if self.loses_answers:
            raise Unavailable("the answer was lost")

    async def report(self, submission_id: str) -> RunReport:
        self._answer()
        run = self.runs.get(submission_id)
        return RunReport(run.state, run.message) if run else RunReport(RunState.LOST, "unknown submission")

    async def stop(self, submission_id: str) -> None:
        self._answer()
        self.stops.append(submission_id)
        run = self.runs.get(submission_id)
        if run is not None and run.state not in OVER and run.state is not RunState.PENDING:
            run.state = RunState.STOPPED

    async def logs(self, submission_id: str, lines: int) -> list[str]:
        run = None if self.away else self.runs.get(submission_id)
        return run.log[-lines:] if run and lines > 0 else []

    async def status(self) -> dict[str, Any]:
        if self.away:
            return {"available": False, "reason": "the cluster is away", "resources": {}, "nodes": 0}
        used = float(
            sum(run.workers.count * run.workers.cpus for run in self.runs.values() if run.state is RunState.RUNNING)
        )
        none = {"total": 0.0, "used": 0.0}
        resources = {
            "cpu": {"total": self.cpus, "used": used},
            "gpu": none,
            "memory_bytes": {"total": 8e9, "used": 0.0},
        }
        return {"available": True, "reason": None, "resources": resources, "nodes": 1}

    def _answer(self) -> None:
        if self.denies is not None:
            raise Denied(self.denies)
        if self.away:
            raise Unavailable("the cluster is away")
