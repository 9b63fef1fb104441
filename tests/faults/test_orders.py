"""Events that come again and again, in any order, cut into any batches: the same final state, and every effect once.

The journal is complete, as the relay guarantees: it has an event before the log does.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from consumers import serving, training
from consumers.watchers import training as watcher
from events.base import Envelope
from events.deployments import UndeployRequested
from events.types import DeploymentStatus, new_id
from mini_studio.records.datasets import Dataset
from mini_studio.records.deployments import Deployment
from mini_studio.records.jobs import Job
from mini_studio.records.projection import Projection, Projections, fold
from mini_studio.records.record import ANYONE
from mini_studio.settings import Settings, Training
from mini_studio.wiring import Studio, open_studio
from tests.consumers.cases import deploy, envelope, fine_tune
from tests.fakes.training_cluster import FakeTrainingCluster
from tests.faults.checker import content
from tests.faults.histories import History, a_dataset, a_deployment, a_job, told

KINDS: dict[str, tuple[type[Projection], str, Callable[..., History]]] = {
    "jobs": (Job, "job", a_job),
    "deployments": (Deployment, "dep", a_deployment),
    "datasets": (Dataset, "ds", a_dataset),
}
SEED = 20_240


@pytest.fixture
async def studio(tmp_path: Path) -> AsyncIterator[Studio]:
    settings = Settings(data=tmp_path, training=Training(max_running=1000))
    async with open_studio(settings) as studio:
        studio.cluster = FakeTrainingCluster()
        yield studio


def repository(studio: Studio, kind: str) -> Projections[Any]:
    found: Projections[Any] = getattr(studio, kind)
    return found


async def check(studio: Studio, kind: str, histories: dict[str, History]) -> None:
    """Every record is its events, folded in order."""
    documents = await studio.store.get_all(KINDS[kind][0].COLLECTION, list(histories))
    for subject, history in histories.items():
        folded = fold(KINDS[kind][0], history)
        assert folded is not None
        assert content(documents[subject]) == content(folded.document()), [type(e.data).__name__ for e in history]


def retold(history: History, subject: str) -> History:
    """The same story of another aggregate."""
    field = next(name for name in ("job_id", "deployment_id", "dataset_id") if hasattr(history[0].data, name))
    changes = {field: subject, **({"name": f"n-{subject[4:]}"} if field == "deployment_id" else {})}
    return told(subject, [event.data.model_copy(update=changes) for event in history])


async def deliver(studio: Studio, kind: str, events: list[Envelope[Any]], random: Random) -> None:
    """In batches that are cut anywhere."""
    while events:
        size = random.choice([1, 1, 2, 5, 50, 500])
        await repository(studio, kind).apply_all(events[:size])
        events = events[size:]


@pytest.mark.parametrize("kind", KINDS)
async def test_every_event_ten_times(studio: Studio, kind: str) -> None:
    random = Random(SEED)
    histories = {id: KINDS[kind][2](random, id) for id in (new_id(KINDS[kind][1]) for _ in range(20))}
    await studio.store.journal([e.stored() for history in histories.values() for e in history])
    tenfold = [e for history in list(histories.values())[:10] for e in history for _ in range(10)]
    again = [e for history in list(histories.values())[10:] for _ in range(10) for e in history]
    await deliver(studio, kind, tenfold, random)
    await deliver(studio, kind, again, random)
    await check(studio, kind, histories)


async def every_permutation(studio: Studio, kind: str, length: int, stories: int) -> int:
    random, cases = Random(SEED + length), 0
    for _ in range(stories):
        make, prefix = KINDS[kind][2], KINDS[kind][1]
        story = next(h for _ in range(10_000) if len(h := make(random, new_id(prefix), length)) == length)
        histories: dict[str, History] = {}
        deliveries: list[Envelope[Any]] = []
        for order in itertools.permutations(range(length)):
            subject = new_id(prefix)
            histories[subject] = retold(story, subject)
            deliveries += [histories[subject][place] for place in order]
        await studio.store.journal([e.stored() for history in histories.values() for e in history])
        await deliver(studio, kind, deliveries, random)
        await check(studio, kind, histories)
        cases += len(histories)
    return cases


@pytest.mark.parametrize(
    ("kind", "length"), [("datasets", 2), *itertools.product(("jobs", "deployments"), range(2, 6))]
)
async def test_every_permutation_of_up_to_five_events(studio: Studio, kind: str, length: int) -> None:
    assert await every_permutation(studio, kind, length, stories=1 if length == 5 else 3)


@pytest.mark.real
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["jobs", "deployments"])
async def test_every_permutation_of_six_events(studio: Studio, kind: str) -> None:
    assert await every_permutation(studio, kind, 6, stories=3) == 3 * 720


async def random_cases(studio: Studio, count: int, seed: int) -> None:
    """Many aggregates at once: repeats, reorderings and losses (the journal has what is lost, if a later event comes)."""
    random = Random(seed)
    for kind, (_, prefix, make) in KINDS.items():
        histories = {id: make(random, id) for id in (new_id(prefix) for _ in range(count // len(KINDS)))}
        await studio.store.journal([e.stored() for history in histories.values() for e in history])
        events = [e for history in histories.values() for e in history for _ in range(random.choice([1, 1, 1, 2, 3]))]
        near = random.choice([3.0, 30.0, float(len(events))])
        events = [e for _, e in sorted(enumerate(events), key=lambda pair: pair[0] + random.random() * near)]
        await deliver(studio, kind, events, random)
        await check(studio, kind, histories)


async def test_six_hundred_random_cases(studio: Studio) -> None:
    for seed in range(4):
        await random_cases(studio, 150, SEED + seed)


@pytest.mark.real
@pytest.mark.timeout(600)
async def test_ten_thousand_random_cases(studio: Studio) -> None:
    for seed in range(20):
        await random_cases(studio, 501, seed)


def test_a_terminal_state_never_regresses() -> None:
    """Ten thousand histories, each shuffled and repeated, folded by the record's own rule alone: what is over stays over."""
    random = Random(SEED)
    for _ in range(1_000):
        history = a_job(random, "job_" + "a" * 24)
        late = [e.model_copy(update={"sequence": 90 + n}) for n, e in enumerate(history[1:])]
        begun = Job.begin(history[0])
        assert begun is not None
        for _ in range(10):
            record, over = begun, None
            for event in [*history, *random.sample(late, len(late)), *random.choices(history, k=3)]:
                record = record.apply(event) or record
                assert over is None or (record.status, record.finished_at, record.error) == over
                over = (record.status, record.finished_at, record.error) if record.status.final else over


async def test_a_fine_tune_is_claimed_and_submitted_once(studio: Studio) -> None:
    events = [envelope(fine_tune(id), id) for id in (new_id("job") for _ in range(20))]
    for number in range(10):
        await asyncio.gather(*(training.claim(event, studio) for event in Random(number).sample(events, len(events))))
        if number % 3 == 0:
            await watcher.reconcile(studio)
    await asyncio.gather(*(watcher.reconcile(studio) for _ in range(3)))
    cluster: Any = studio.cluster
    assert sorted(cluster.runs) == sorted(f"{event.subject}-1" for event in events), "one run of Ray for each job"
    for event in events:
        run = await studio.runs.get(ANYONE, event.subject)
        assert run is not None and run.sequence == len(run.outbox) == 1


async def test_a_release_follows_the_newest_request_in_every_order(studio: Studio) -> None:
    for order in itertools.permutations(range(4)):
        id = new_id("dep")
        first = deploy(id)
        removals = [UndeployRequested(deployment_id=id, generation=n, name=first.name) for n in (2, 4)]
        history = told(id, [first, removals[0], first.model_copy(update={"generation": 3}), removals[1]])
        for upto in (3, 4):
            subject = new_id("dep")
            story = retold(history[:upto], subject)
            await studio.store.journal([e.stored() for e in story])
            for place in order:
                for _ in range(10):
                    if place < upto:
                        await serving.want(story[place], studio)
            release = await studio.releases.get(ANYONE, subject)
            assert release is not None
            assert (release.generation, release.wanted, release.sequence) == (upto, upto == 3, 0)
            assert release.status is (DeploymentStatus.DEPLOYING if upto == 3 else DeploymentStatus.REMOVING)
            assert release.cause == story[-1].follows() and release.created_at
