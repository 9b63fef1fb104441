"""`python -m tests.faults.soak`: everything is killed at random under load; then nothing may be lost, or done twice.

Two stretches on one data folder. In the first, a stand-in for Ray's Jobs API runs quick trainers as real processes, because Ray's own
rate is the limit; in the second, Ray trains for real. Then the state is dumped and checked (see `checker`). The exit code is 1, and the
data folder is kept, when anything is wrong.
"""

import argparse
import asyncio
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from mini_studio.drivers.catalogue import ModelCatalogue
from mini_studio.records.jobs import Job
from mini_studio.settings import Settings
from mini_studio.wiring import COLLECTIONS, open_studio
from tests.fakes import real_kafka
from tests.fakes.broker import lasting_port
from tests.fakes.jobs_server import JobsServer
from tests.fakes.real_kafka import RealKafka
from tests.fakes.real_services import SCRIPTS
from tests.fakes.running import Running
from tests.faults import killing
from tests.faults.at_rest import moving
from tests.faults.chaos_load import MODEL, Load
from tests.faults.checker import collect, violations
from tests.faults.history import History, read
from tests.faults.killing import Killer, Kind

SUBMITS, TRAININGS, KILLS, MINUTES = 1000, 20, 200, 10
"""What the ten-minute form has at the least; other lengths have as much in proportion."""
QUICK_SHARE = 0.65
"""Of the time, for the stretch with quick trainers."""
CLIENTS = 10
OVER_S = 120.0
SAY_EVERY_S = 10.0
SLOW_S = 60.0
"""What a broker may take to start again, and a short stretch more than three times its time."""
QUICK = {
    "MINI_STUDIO_TRAINING__MAX_RUNNING": "8",
    "MINI_STUDIO_TRAINING__CPUS": "0.25",
    "MINI_STUDIO_TRAINING__LOST_AFTER_S": "6",
    "MINI_STUDIO_TRAINING__START_TIMEOUT_S": "20",
    "MINI_STUDIO_TRAINING__POLL_S": "0.2",
    "MINI_STUDIO_API__DEPLOY_WAIT_S": "2",
}
REAL = {"MINI_STUDIO_TRAINING__MAX_RUNNING": "2", "MINI_STUDIO_TRAINING__THREADS": "1"}


@dataclass
class Plan:
    """How much of everything, for so many minutes."""

    minutes: float
    seed: int
    bootstrap: str | None
    over_s: float
    """From the last kill until every job has to have ended."""

    def share(self, whole: int) -> int:
        return max(1, round(whole * self.minutes / MINUTES))

    @property
    def quick_s(self) -> float:
        return self.minutes * 60 * QUICK_SHARE

    @property
    def real_s(self) -> float:
        return self.minutes * 60 - self.quick_s


@dataclass
class Report:
    """What the run came to."""

    kills: Counter[str] = field(default_factory=Counter)
    over_after_s: dict[str, float] = field(default_factory=dict)
    """From the last kill of a stretch until every job had ended."""
    violations: list[str] = field(default_factory=list)
    sent: int = 0
    acknowledged: int = 0
    repeats: int = 0
    submitted: int = 0

    def add(self, load: Load, killer: Killer) -> None:
        self.kills += killer.kills
        self.sent += load.sent
        self.acknowledged += load.acknowledged
        self.repeats += load.repeats
        self.submitted += load.submitted


class Soak:
    """One run, in a folder of its own."""

    def __init__(self, plan: Plan, folder: Path, kafka: RealKafka | None) -> None:
        self.plan, self.folder, self.kafka = plan, folder, kafka
        self.report, self.history = Report(), History(folder / "history.jsonl")
        self.shared = {"MINI_STUDIO_KAFKA__BOOTSTRAP": plan.bootstrap, "MINI_STUDIO_KAFKA__IDEMPOTENT": "true"}
        self.studio = Running(folder / "data", lasting_port())

    @property
    def settings(self) -> Settings:
        return Settings(data=self.studio.data)

    def run(self) -> Report:
        try:
            for line in ModelCatalogue(self.settings.models).add(MODEL):
                self.say(line)
            self.quickly()
            self.really()
            self.report.violations += asyncio.run(self.check())
        finally:
            self.history.close()
            self.end()
        return self.report

    def quickly(self) -> None:
        """Many trainings that take no time, everything killed but Ray, whose place the stand-in has."""
        mark = {"MINI_STUDIO_RUN_DATA": str(self.studio.data), "TMPDIR": str(self.folder)}
        cluster = JobsServer(options=("--instead", "tests.fakes.quick_trainer"), environment=mark)
        self.start({**QUICK, "MINI_STUDIO_TRAINING__RAY_ADDRESS": cluster.address})
        cluster.start()
        kinds = [
            *killing.parts(self.studio),
            killing.launcher(self.studio, cluster.start_again),
            killing.guardian(self.studio),
            Kind("Ray's stand-in", cluster.pids, restart=cluster.start_again),
            Kind("trainer", killing.finder(self.studio, "-m tests.fakes.quick_trainer"), 2.0),
        ]
        submits, kills = self.plan.share(SUBMITS), self.plan.share(KILLS)
        self.stretch("quick", kinds, submits, kills, self.plan.quick_s)
        self.studio.stop()
        cluster.kill()

    def really(self) -> None:
        """A few trainings that are real, on a Ray that is killed as well."""
        self.start(REAL)
        kinds = [*killing.parts(self.studio), *killing.ray(self.studio)]
        trainings = self.plan.share(TRAININGS)
        self.stretch("real", kinds, trainings, self.plan.share(KILLS) // 5, self.plan.real_s)

    def start(self, environment: dict[str, str]) -> None:
        self.studio.environment = {
            **environment,
            **({k: v for k, v in self.shared.items() if v} if self.plan.bootstrap else {}),
        }
        self.studio.start()
        self.say("the studio runs")

    def stretch(self, name: str, kinds: list[Kind], submits: int, kills: int, seconds: float) -> None:
        """Load and kills, until the time is over and all was asked for; then until every job has ended."""
        if self.kafka is not None:
            kinds = [*kinds, Kind("broker", self.kafka.pids, restart=self.kafka.start_again)]
        load = Load(
            self.studio.url, self.history, f"{self.plan.seed} {name}", clients=min(CLIENTS, submits), submits=submits,
            # asked for in less than the whole time, so that something is left of it for what is slower than planned
            seconds=seconds * 0.8,
        )  # fmt: skip
        killer = Killer(kinds, f"{self.plan.seed} {name}", seconds / kills, self.folder / "kills.jsonl")
        began = time.monotonic()
        load.start()
        killer.start()
        while time.monotonic() - began < seconds or not load.over or killer.kills.total() < kills:
            time.sleep(SAY_EVERY_S)
            self.say(
                f"{name}: {load.sent} requests, {load.submitted} of {submits} fine-tunes, {killer.kills.total()} kills"
            )
            if killer.problem or time.monotonic() - began > 3 * seconds + SLOW_S:
                self.report.violations.append(killer.problem or f"{name}: not done after three times its time")
                break
        load.stop()
        killer.stop()
        self.report.add(load, killer)
        self.settle(name, killer.last)

    def settle(self, name: str, since: float) -> None:
        """Wait until every job has ended, and then until nothing moves any more."""
        while (left := asyncio.run(self.unfinished())) and time.time() - since < self.plan.over_s:
            time.sleep(1)
        self.report.over_after_s[name] = round(time.time() - since, 1)
        if left:
            few = ", ".join(left[:5])
            self.report.violations.append(
                f"{name}: {len(left)} not over {self.plan.over_s:.0f} s after the last kill: {few} ..."
            )
        limit = time.time() + self.plan.over_s
        while (restless := asyncio.run(self.moving())) and time.time() < limit:
            time.sleep(1)
        if restless:
            self.report.violations.append(f"{name}: still moving: {restless[:5]}")

    async def unfinished(self) -> list[str]:
        async with open_studio(self.settings) as studio:
            jobs = await studio.store.find(Job.COLLECTION, {}, limit=10_000_000)
        return [job["_id"] for job in jobs if job["status"] not in ("succeeded", "failed", "cancelled")]

    async def moving(self) -> list[str]:
        """What has events to publish, is not yet as wanted, or is not followed yet."""
        async with open_studio(self.settings) as studio:
            pending = await studio.store.pending(COLLECTIONS, 1000)
            records = {c.name: await studio.store.find(c, {}, limit=10_000_000) for c in COLLECTIONS}
        outboxes = [f"outbox of {collection.name}/{document['_id']}" for collection, document in pending]
        return outboxes + moving({name: {d["_id"]: d for d in found} for name, found in records.items()})

    async def check(self) -> list[str]:
        dump = await collect(self.settings)
        ends = Counter(document["status"] for document in dump.records["jobs"].values())
        self.say(f"jobs by end: {dict(ends)}, events: {len(dump.journal)}, artifacts: {len(dump.committed)}")
        # an embedded broker is refilled behind what its new life brought first
        return violations(dump, read(self.folder / "history.jsonl"), ordered=self.plan.bootstrap is not None)

    def end(self) -> None:
        if self.studio.process is not None and self.studio.process.poll() is None:
            self.studio.stop()

    def say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="length of load and kills (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(10**6), help="of every choice; a new one by default"
    )
    parser.add_argument(
        "--bootstrap", help="run on this Kafka, or on one of its own for `own`, instead of the embedded broker"
    )
    parser.add_argument(
        "--over-s",
        type=float,
        default=OVER_S,
        help="seconds from the last kill until every job has ended (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {options.seed}, {options.minutes:g} minutes, in {folder}", flush=True)
    kafka = own_kafka(folder) if options.bootstrap == "own" else None
    plan = Plan(options.minutes, options.seed, kafka.bootstrap if kafka else options.bootstrap, options.over_s)
    try:
        report = Soak(plan, folder, kafka).run()
    finally:
        if kafka is not None:
            kafka.stop()
    return tell(report, folder)


def own_kafka(folder: Path) -> RealKafka:
    """A real Kafka that the soak may kill."""
    script = real_kafka.script()
    if script is None:
        raise SystemExit(f"set {SCRIPTS} to a folder with the script `kafka`")
    return RealKafka.start(script, folder / "kafka")


def tell(report: Report, folder: Path) -> int:
    print(f"requests {report.sent}, acknowledged {report.acknowledged}, POSTs sent twice under a key {report.repeats}")
    print(f"fine-tunes accepted {report.submitted}; all over after (s) {report.over_after_s}")
    print(f"kills {report.kills.total()}: {dict(sorted(report.kills.items()))}")
    print(f"violations {len(report.violations)}")
    for line in report.violations[:50]:
        print(f"  {line}")
    if report.violations:
        print(f"kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
