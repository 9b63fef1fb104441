"""The checker finds what it is there to find."""

from dataclasses import replace

import pytest

from events.base import Cause, Envelope
from events.fine_tuning import FineTuneQueued, FineTuneStarted
from events.topics import Topic
from events.types import new_id
from mini_studio.records.jobs import Job
from mini_studio.records.projection import fold
from mini_studio.wiring import RECORDS
from tests.consumers.cases import fine_tune
from tests.faults.checker import Dump, violations
from tests.faults.history import Request

JOB = new_id("job")
ASKED = {"r1": Request("r1", "submit", "acme", status=201, subject=JOB)}


def event(data: object, sequence: int) -> Envelope:  # type: ignore[type-arg]
    cause = Cause(correlation_id="r1")
    return Envelope.of(data, subject=JOB, sequence=sequence, client_code="acme", cause=cause)  # type: ignore[type-var]


EVENTS = [
    event(fine_tune(JOB), 1),
    event(FineTuneQueued(job_id=JOB, attempt=0), 1),
    event(FineTuneStarted(job_id=JOB, attempt=1, submission_id=f"{JOB}-1"), 2),
]


def a_dump() -> Dump:
    """Of a studio in which nothing is wrong but that its job still runs."""
    job = fold(Job, EVENTS)
    assert job is not None
    records = {record.COLLECTION.name: {} for record in RECORDS} | {"jobs": {JOB: job.document()}}
    logged = {topic.value: list(EVENTS) if topic is Topic.FINE_TUNES else [] for topic in Topic}
    return Dump(log=logged, journal=list(EVENTS), records=records)


def found(dump: Dump, *, ordered: bool = True) -> str:
    return "\n".join(violations(dump, ASKED, all_over=False, ordered=ordered))


def test_nothing_is_wrong_with_what_is_right() -> None:
    assert found(a_dump()) == ""
    assert "is running" in "\n".join(violations(a_dump(), ASKED))


def test_what_was_acknowledged_and_is_gone() -> None:
    dump = a_dump()
    dump.records["jobs"].clear()
    assert "has no record" in found(dump)


@pytest.mark.parametrize(("index", "sign"), [(0, "no events"), (1, "goes from 0 to 2")])
def test_an_event_that_is_missing(index: int, sign: str) -> None:
    dump = a_dump()
    del dump.log[Topic.FINE_TUNES.value][index]
    assert "not on the log" in found(dump)
    dump = a_dump()
    del dump.journal[index]
    assert "not in the journal" in found(dump)
    assert sign in found(dump)


def test_an_event_that_nobody_asked_for() -> None:
    dump = a_dump()
    assert "follows from no request" in "\n".join(violations(dump, {}, all_over=False))


def test_two_events_of_one_sequence() -> None:
    dump = a_dump()
    dump.journal.append(EVENTS[2].model_copy(update={"id": "another"}))
    assert "two events of sequence 2" in found(dump)


def test_order_is_asked_of_a_log_only_where_it_is_promised() -> None:
    dump = a_dump()
    dump.log[Topic.FINE_TUNES.value].reverse()
    assert "goes from 0 to 2" in found(dump)
    assert found(dump, ordered=False) == ""


def test_two_things_under_one_key() -> None:
    twice = {id: replace(ASKED["r1"], request_id=id, key="k", subject=s) for id, s in (("r1", JOB), ("r2", "job_2"))}
    assert "'k') made" in "\n".join(violations(a_dump(), twice, all_over=False))


def test_an_artifact_of_a_job_that_has_not_ended() -> None:
    dump = a_dump()
    dump.committed[JOB] = "attempts/1/weights"
    assert "has a final path and no end" in found(dump)


def test_what_was_dead_lettered_and_what_still_waits() -> None:
    dump = a_dump()
    dump.dead.append("a topic@1: a reason")
    dump.records["jobs"][JOB]["outbox"] = [{}]
    assert "dead letter" in found(dump)
    assert "in its outbox" in found(dump)
