"""Pure rules: projections fold, deciders fence, names never collide."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.base import Cause, Envelope, Event
from events.deployments import (
    DeploymentApplied,
    DeploymentFailed,
    DeploymentReady,
    DeploymentRemoved,
    DeployRequested,
    Scale,
    UndeployRequested,
)
from events.fine_tuning import (
    DatasetRef,
    FineTuneCancelRequested,
    FineTuneFailed,
    FineTuneProgressed,
    FineTuneQueued,
    FineTuneRequested,
    FineTuneStarted,
    FineTuneSucceeded,
    Hyperparameters,
)
from events.registry import UndecodableEvent, decode, restore
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.bus.routes import RouteTable, revision_in
from mini_studio.records.deployments import Deployment, deployment_id, readable_name, suffixed
from mini_studio.records.jobs import Job
from mini_studio.records.projection import fold, requested
from mini_studio.records.routes import Route, RouteRecord
from mini_studio.records.training_runs import RunPhase, TrainingRun
from schemas.fine_tuning import FineTuningJobRequest, default_batch_size, default_learning_rate_multiplier

CAUSE = Cause(correlation_id="r")
JOB = "job_" + "a" * 24


def request_event() -> FineTuneRequested:
    return FineTuneRequested(
        job_id=JOB,
        base_model="tiny-llama",
        fine_tuned_model="ft:tiny-llama:acme:x",
        dataset=DatasetRef(id="ds_" + "b" * 24, dfs_path="/d", sha256="0" * 64, rows=3),
        hyperparameters=Hyperparameters(
            n_epochs=1, batch_size=1, learning_rate_multiplier=0.1, prompt_loss_weight=0, seed=0, method="full"
        ),
    )


def envelope(event: Event, sequence: int, subject: str = JOB) -> Envelope[Any]:
    return Envelope.of(event, subject=subject, sequence=sequence, client_code="acme", cause=CAUSE)


def history() -> list[Envelope[Any]]:
    a = {"job_id": JOB, "attempt": 1}
    told: list[Event] = [
        FineTuneQueued(job_id=JOB, attempt=0),
        FineTuneStarted(**a, submission_id="s"),
        FineTuneProgressed(**a, step=1, total_steps=2, train_loss=1.5),
        FineTuneSucceeded(**a, fine_tuned_model="m", fine_tuned_weights_path="/w", train_loss=0.5, steps=2, tokens=9),
    ]
    return [envelope(request_event(), 1), *(envelope(event, n + 1) for n, event in enumerate(told))]


def test_a_job_is_its_events_folded() -> None:
    job = fold(Job, history())
    assert job is not None
    assert (job.status, job.attempt, job.dataset.tokens, job.progress.train_loss) == ("succeeded", 1, 9, 0.5)
    assert job.finished_at


def test_repeats_change_nothing() -> None:
    once = fold(Job, history())
    for repeated in itertools.product(range(1, 4), repeat=2):
        events = history()
        events[2:4] = [e for e, n in zip(events[2:4], repeated, strict=True) for _ in range(n)]
        again = fold(Job, events)
        assert again is not None and once is not None
        assert again.applied == once.applied
        assert again.status == once.status


def test_a_final_state_never_changes() -> None:
    job = fold(Job, history())
    assert job is not None
    late = FineTuneFailed(job_id=JOB, attempt=2, code="internal", message="late")
    after = job.apply(envelope(late, 9))
    assert after is not None
    assert (after.status, after.error) == ("succeeded", None)


def test_a_cancel_shows_the_same_whenever_it_is_read() -> None:
    request, *training = history()
    asked = envelope(FineTuneCancelRequested(job_id=JOB), 2)
    made = [fold(Job, [request, *training[:n], asked, *training[n:]]) for n in range(len(training) + 1)]
    assert all(job is not None and job.cancel_requested and not job.cancelling for job in made)
    assert len({job.model_dump_json(exclude={"outbox"}) for job in made if job}) == 1


def test_every_event_reads_back_as_written() -> None:
    for sent in history():
        stored = sent.stored()
        assert restore(stored) == sent
        headers = {**stored["headers"], "ce_source": "/mini-studio/nobody"}
        with pytest.raises(UndecodableEvent):
            decode(stored["key"].encode(), headers, stored["value"].encode())


def run() -> TrainingRun:
    return TrainingRun.claim(envelope(request_event(), 1))


def test_a_stale_attempt_can_do_nothing() -> None:
    first = run().begin_attempt()
    assert first is not None
    running = first.started(first.token)
    assert running is not None
    queued = running.lose(first.token, "gone", 3, interrupted=False)
    assert queued is not None and queued.phase is RunPhase.QUEUED
    second = queued.begin_attempt()
    assert second is not None and second.attempt == 2 and second.token != first.token
    current = second.started(second.token)
    assert current is not None
    assert current.commit(first.token) is None
    assert current.fail(first.token, code="internal", message="x") is None
    assert current.lose(first.token, "x", 3, interrupted=False) is None
    committed = current.commit(second.token)
    assert committed is not None and committed.commit(second.token) is None
    sequences = [entry["headers"]["ce_sequence"] for entry in committed.outbox]
    assert sequences == [str(n + 1) for n in range(len(sequences))]


def test_attempts_run_out() -> None:
    present: TrainingRun | None = run()
    for _ in range(3):
        assert present is not None
        begun = present.begin_attempt()
        assert begun is not None
        present = begun.lose(begun.token, "The worker died.", 3, interrupted=False)
    assert present is not None and present.phase is RunPhase.FAILED
    assert '"lost_worker"' in present.outbox[-1]["value"]


SCALE = Scale(gpu_count=0, min_replicas=1, max_replicas=1, prometheus_threshold=5)


def deployment(client: str = "acme", model: str = "tiny-llama", weights: str | None = "/w") -> Deployment:
    kind = DeploymentKind.FINE_TUNED if weights else DeploymentKind.BASE
    id = deployment_id(client, kind, model, weights)
    event = DeployRequested(
        deployment_id=id,
        generation=1,
        name=readable_name(kind, client, model),
        kind=kind,
        model=f"ft:{model}:{client}:{(weights or '').strip('/')}" if weights else model,
        base_model=model,
        weights_path=weights,
        scale=SCALE,
    )
    return requested(Deployment, event, subject=id, client_code=client, cause=CAUSE)


def status(present: Deployment, event_type: Any, sequence: int, generation: int = 1, **fields: Any) -> Deployment:
    event = event_type(deployment_id=present.id, generation=generation, name=present.name, **fields)
    sent = Envelope.of(event, subject=present.id, sequence=sequence, client_code=present.client_code, cause=CAUSE)
    return present.apply(sent) or present


def test_a_late_removal_never_hits_the_successor() -> None:
    present = status(deployment(), DeploymentApplied, 1)
    present = present.asking(UndeployRequested(deployment_id=present.id, generation=2, name=present.name), CAUSE)
    again = DeployRequested(
        deployment_id=present.id,
        generation=3,
        name=present.name,
        kind=present.kind,
        model=present.model,
        base_model=present.base_model,
        weights_path=present.weights_path,
        scale=SCALE,
    )
    present = present.asking(again, CAUSE)
    present = status(present, DeploymentRemoved, 2, generation=2)
    assert present.status is DeploymentStatus.DEPLOYING
    assert present.generation == 3


def causal_orders(requests: list[Envelope[Any]], reports: list[Envelope[Any]]) -> Iterator[list[Envelope[Any]]]:
    """Every order of both sources in which a report stands behind the request that it answers."""
    if not requests or not reports:
        yield [*requests, *reports]
        return
    for rest in causal_orders(requests[1:], reports):
        yield [requests[0], *rest]
    if reports[0].data.generation < requests[0].data.generation:
        for rest in causal_orders(requests, reports[1:]):
            yield [reports[0], *rest]


def test_a_deployment_is_the_same_in_every_causal_order() -> None:
    asked = deployment()
    (first,) = (restore(entry) for entry in asked.outbox)
    of = {"deployment_id": asked.id, "name": asked.name}
    here = {"endpoints": ["http://h:1"], "replicas": 1, "predict_path": "/elsewhere", "message": "up"}
    more = first.data.model_copy(update={"generation": 2, "scale": SCALE.model_copy(update={"max_replicas": 2})})
    told: list[Event] = [
        DeploymentApplied(**of, generation=1),
        DeploymentReady(**of, generation=1, **here),
        DeploymentApplied(**of, generation=2),
        DeploymentFailed(**of, generation=2, refused=True, message="no room"),
        DeploymentReady(**of, generation=2, **here),
        DeploymentRemoved(**of, generation=3),
        DeploymentApplied(**of, generation=4),
        DeploymentReady(**of, generation=4, **here),
    ]
    later = [more, UndeployRequested(**of, generation=3), more.model_copy(update={"generation": 4})]
    requests = [first, *(envelope(event, n, asked.id) for n, event in enumerate(later, start=2))]
    for reported in range(len(told) + 1):
        reports = [envelope(event, n, asked.id) for n, event in enumerate(told[:reported], start=1)]
        for known in range(max([r.data.generation for r in reports], default=1), len(requests) + 1):
            orders = causal_orders(requests[:known], reports)
            folded = [found.model_dump(exclude={"outbox"}) for order in orders if (found := fold(Deployment, order))]
            assert all(found == folded[0] for found in folded)


def test_a_rescale_does_not_take_the_endpoints_away() -> None:
    present = status(deployment(), DeploymentReady, 1, endpoints=["http://h:1"], replicas=1)
    more = DeployRequested(
        **present.model_dump(include=set(DeployRequested.model_fields) - {"scale", "generation"}),
        deployment_id=present.id, generation=2, scale=SCALE.model_copy(update={"max_replicas": 2}),
    )  # fmt: skip
    present = present.asking(more, CAUSE)
    assert (present.status, present.endpoints) == (DeploymentStatus.DEPLOYING, ["http://h:1"])
    present = status(present, DeploymentApplied, 2, generation=2)
    assert (present.status, present.endpoints) == (DeploymentStatus.DEPLOYED, ["http://h:1"])


def test_a_model_that_is_started_again_answers_nowhere() -> None:
    present = status(deployment(), DeploymentApplied, 1)
    present = status(present, DeploymentReady, 2, endpoints=["http://h:1"], replicas=1)
    assert status(present, DeploymentApplied, 3).endpoints == []


def test_readable_names_are_the_contracts() -> None:
    assert readable_name(DeploymentKind.BASE, "", "facebook/opt-125m") == "vllm-base-facebook-opt-125m"
    assert readable_name(DeploymentKind.FINE_TUNED, "acme", "gpt-neo") == "vllm-ft-acme-gpt-neo"


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,150}", fullmatch=True))
def test_names_are_dns_labels(model: str) -> None:
    name = readable_name(DeploymentKind.BASE, "", model)
    for label in (name, suffixed(name, "dep_" + "0" * 24)):
        assert len(label) <= 63
        assert label.strip("-") == label
        assert set(label) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def follow(record: RouteRecord, present: Deployment) -> RouteRecord:
    following = record.following(present)
    assert following is not None
    return following


def ready(present: Deployment, port: int) -> RouteRecord:
    answering = status(present, DeploymentReady, 1, endpoints=[f"http://h:{port}"], replicas=1)
    return follow(RouteRecord.of(present), answering)


def removed(record: RouteRecord) -> RouteRecord:
    return follow(record, status(deployment(), DeploymentRemoved, 2))


def test_routes_prefer_the_callers_own() -> None:
    table = RouteTable()
    shared, own, other = deployment("", weights=None), deployment("acme"), deployment("rival")
    for port, present in enumerate((shared, own, other)):
        record = ready(present, port)
        table.put(record.id, record.route, record.revision)
    found = {who: table.lookup(who, "tiny-llama") for who in (None, "acme", "rival", "third")}
    assert {who: route and route.endpoints for who, route in found.items()} == {
        None: ["http://h:0"],
        "acme": ["http://h:1"],
        "rival": ["http://h:2"],
        "third": ["http://h:0"],
    }
    assert table.lookup("acme", "ft:tiny-llama:rival:w") is None
    table.put(own.id, None, 3)
    fallback = table.lookup("acme", "tiny-llama")
    assert fallback is not None and fallback.endpoints == ["http://h:0"]


def test_two_fine_tunes_of_one_base_stay_addressable() -> None:
    table = RouteTable()
    first, second = deployment("acme", weights="/one"), deployment("acme", weights="/two")
    for port, present in enumerate((first, second)):
        record = ready(present, port)
        table.put(record.id, record.route, record.revision)
    for name, endpoint in (("ft:tiny-llama:acme:one", "http://h:0"), ("ft:tiny-llama:acme:two", "http://h:1")):
        route = table.lookup("acme", name)
        assert route is not None and route.endpoints == [endpoint]
    latest = table.lookup("acme", "tiny-llama")
    assert latest is not None and latest.endpoints == ["http://h:1"]


def test_a_routes_late_duplicates_change_nothing() -> None:
    table, record = RouteTable(), ready(deployment(), 1)
    before = record.route
    table.put(record.id, before, 4)
    table.put(record.id, None, 5)
    table.put(record.id, before, 4)
    assert table.all() == [], "what was removed stays so"
    table.put(record.id, before, 6)
    table.put(record.id, None, 5)
    assert table.all() == [before], "a late removal does not hit the successor"


def test_a_route_built_anew_is_identical() -> None:
    asked = deployment()
    answering = status(asked, DeploymentReady, 1, endpoints=["http://h:1"], replicas=1)
    said_again = status(answering, DeploymentReady, 2, endpoints=["http://h:1"], replicas=1)
    grown = follow(follow(RouteRecord.of(asked), answering), said_again)
    anew = RouteRecord.of(said_again)
    assert anew.model_dump(exclude={"outbox"}) == grown.model_dump(exclude={"outbox"})
    assert anew.revision == 3


def test_a_route_is_published_whenever_its_deployment_has_a_newer_event_and_never_otherwise() -> None:
    asked = deployment()
    answering = status(asked, DeploymentReady, 1, endpoints=["http://h:1"], replicas=1)
    said_again = status(answering, DeploymentReady, 2, endpoints=["http://h:1"], replicas=1)
    record = RouteRecord.of(answering)
    assert record.following(answering) is None
    assert record.following(asked) is None, "a late reader of the deployment takes nothing back"
    assert len(follow(record, said_again).outbox) == 2


def test_a_route_that_sleeps_keeps_its_address() -> None:
    awake = ready(deployment(), 1)
    asleep = follow(awake, status(deployment(), DeploymentReady, 2, endpoints=["http://h:1"], replicas=0)).route
    assert awake.route is not None and asleep is not None
    assert (awake.route.asleep, asleep.asleep, asleep.endpoints) == (False, True, ["http://h:1"])
    without = follow(awake, status(deployment(), DeploymentReady, 2, endpoints=[], replicas=0)).route
    assert without is not None and without.asleep, "nor need it have one"
    starting = RouteRecord.of(deployment()).route
    assert starting is not None and not starting.asleep, "what never answered does not sleep"
    earlier = awake.route.model_dump(exclude={"replicas"})
    assert not Route.model_validate(earlier).asleep, "routes of earlier versions say no replicas"


def test_every_route_record_says_its_revision_and_time() -> None:
    gone = removed(ready(deployment(), 1))
    assert [revision_in({"ce_id": e["headers"]["ce_id"].encode()}) for e in gone.outbox] == [1, 2, 3]
    assert gone.outbox[-1]["value"] is None
    assert all(entry["headers"]["ce_time"] for entry in gone.outbox)


def test_legacy_defaults() -> None:
    assert [default_batch_size(rows) for rows in (1, 1000, 50_000, 10**7)] == [1, 2, 100, 256]
    assert [default_learning_rate_multiplier(size) for size in (1, 16, 64)] == [0.05, 0.1, 0.2]
    body = FineTuningJobRequest(model="tiny-llama", client_code="acme", dataset_filename="x")
    resolved = body.resolve(1000, "full")
    assert (resolved.n_epochs, resolved.prompt_loss_weight, resolved.method, resolved.lora) == (4, 0.01, "full", None)
