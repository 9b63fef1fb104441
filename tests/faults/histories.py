"""Random histories of aggregates, as their sources decide them: what a source says follows from what it has read."""

from random import Random
from typing import Any

from events.base import Cause, Envelope, Event
from events.datasets import DatasetProfiled, DatasetUploaded
from events.deployments import (
    DeploymentApplied,
    DeploymentFailed,
    DeploymentReady,
    DeploymentRemoved,
    DeployRequested,
    UndeployRequested,
)
from events.fine_tuning import (
    FineTuneFailed,
    FineTuneProgressed,
    FineTuneQueued,
    FineTuneStarted,
    FineTuneSucceeded,
)
from events.types import DatasetFormat
from tests.consumers.cases import deploy, fine_tune

History = list[Envelope[Any]]


def told(subject: str, events: list[Event]) -> History:
    """The events with the sequences that their sources gave them."""
    last: dict[str, int] = {}
    history: History = []
    for event in events:
        last[event.SOURCE] = sequence = last.get(event.SOURCE, 0) + 1
        cause = Cause(correlation_id="r", causation_id=history[-1].id if history else None)
        history.append(Envelope.of(event, subject=subject, sequence=sequence, client_code="acme", cause=cause))
    return history


def a_job(random: Random, subject: str, at_most: int = 12) -> History:
    """Attempts that are lost and queued again, until one ends or the history does."""
    events: list[Event] = [fine_tune(subject), FineTuneQueued(job_id=subject, attempt=0)]
    attempt = 1
    while len(events) < at_most:
        a = {"job_id": subject, "attempt": attempt}
        events.append(FineTuneStarted(**a, submission_id=f"{subject}-{attempt}"))
        for step in range(random.randrange(3)):
            events.append(
                FineTuneProgressed(**a, step=step, train_loss=random.random(), tokens=random.choice([None, 7]))
            )
        end = random.randrange(4)
        if end == 0:
            events.append(FineTuneFailed(**a, code="internal", message="broke", log_tail=["a"]))
        elif end == 1:
            weights = {"fine_tuned_model": "m", "fine_tuned_weights_path": "/w"}
            events.append(FineTuneSucceeded(**a, **weights, train_loss=0.5, steps=2, tokens=9))
        if end < 2:
            break
        events.append(FineTuneQueued(**a, reason="lost"))
        attempt += 1
    return told(subject, events[:at_most])


def a_deployment(random: Random, subject: str, at_most: int = 12) -> History:
    """Requests, rescales and removals, with what serving says of those that it has read."""
    first = deploy(subject)
    events: list[Event] = [first]
    generation = read = 1
    wanted = True
    while len(events) < random.randint(1, at_most):
        about = {"deployment_id": subject, "generation": read, "name": first.name}
        what = random.randrange(6)
        if what == 0:
            generation += 1
            scale = first.scale.model_copy(update={"max_replicas": random.randint(1, 9)})
            events.append(first.model_copy(update={"generation": generation, "scale": scale}))
        elif what == 1 and not isinstance(events[-1], UndeployRequested):
            generation += 1
            events.append(UndeployRequested(deployment_id=subject, generation=generation, name=first.name))
        elif what == 2:
            read = generation
            wanted = isinstance(newest_request(events), DeployRequested)
        elif not wanted:
            events.append(DeploymentRemoved(**about))
        elif what == 3:
            events.append(DeploymentApplied(**about, message=random.choice([None, "starting"])))
        elif what == 4:
            events.append(DeploymentReady(**about, endpoints=[f"http://127.0.0.1:{random.randrange(9)}"], replicas=1))
        else:
            events.append(DeploymentFailed(**about, message="broke", refused=random.random() < 0.3))
    return told(subject, events[:at_most])


def newest_request(events: list[Event]) -> Event:
    return [event for event in events if isinstance(event, DeployRequested | UndeployRequested)][-1]


def a_dataset(random: Random, subject: str, at_most: int = 2) -> History:
    """An upload, and mostly its profile."""
    sizes = {"rows": 1, "characters": 2, "longest_line_bytes": 3}
    uploaded = DatasetUploaded(
        dataset_id=subject, filename="x", dfs_path=f"/dfs/{subject}", s3_uri=f"s3://b/{subject}", size_bytes=3,
        sha256="0" * 64, format=DatasetFormat.CHAT, **sizes,
    )  # fmt: skip
    state = random.choice(["verified", "damaged"])
    profiled = DatasetProfiled(dataset_id=subject, state=state, message="m", tokens_estimated=1, **sizes)
    return told(subject, [uploaded, profiled][: random.randint(1, 2) if at_most > 1 else 1])
