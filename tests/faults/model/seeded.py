"""Bugs as people write them, to see that the searches find them."""

from collections.abc import Callable
from typing import Any

from events.base import Envelope
from mini_studio.bus.relay import outgoing
from mini_studio.records.projection import Projection
from mini_studio.records.releases import Release
from mini_studio.records.training_runs import RunPhase, TrainingRun
from tests.faults.model.parts import ModelPublisher, event, token_by_attempt

_apply, _want = Projection.apply, Release.want


def commit_without_a_fence(run: TrainingRun, _token: str) -> TrainingRun | None:
    return run.model_copy(update={"phase": RunPhase.COMMITTED}) if run.phase is RunPhase.RUNNING else None


def begin_attempt_without_a_token(run: TrainingRun) -> TrainingRun | None:
    begun = token_by_attempt(run)
    return begun and begun.model_copy(update={"token": "token"})


def apply_without_sequence(record: Projection, envelope: Envelope[Any]) -> Projection | None:
    before = {**record.applied, envelope.source.value: envelope.sequence - 1}
    return _apply(record.model_copy(update={"applied": before}), envelope)


def want_without_a_generation(release: Release, envelope: Envelope[Any]) -> Release | None:
    return _want(release.model_copy(update={"generation": 0}), envelope)


def remove_whatever_there_is(_held: Any, _generation: int) -> bool:
    return True


async def submit_without_a_second_look(_run: TrainingRun, _studio: Any) -> bool:
    return True


def cancel_whatever_was_chosen(run: TrainingRun, _envelope: Envelope[Any]) -> TrainingRun | None:
    return None if run.phase.over else run.model_copy(update={"phase": RunPhase.CANCELLING})


def publish_before_write(of: Any) -> Callable[..., Any]:
    async def claim(_offset: int, ids: tuple[str, ...]) -> None:
        for id in ids:
            if event(id).type == "fine_tune.requested.v1" and await of.runs.get("*", event(id).subject) is None:
                run = TrainingRun.claim(event(id))
                await of.store.journal(run.outbox)
                await ModelPublisher().publish([outgoing(entry) for entry in run.outbox])
                await of.runs.insert(run.model_copy(update={"outbox": ()}))

    return claim


def settle_before_ack(of: Any) -> Callable[..., Any]:
    async def sweep() -> None:
        for collection, document in await of.store.pending((of.jobs.collection, of.runs.collection), 100):
            entries = document["outbox"]
            await of.store.journal(entries)
            await of.store.settle([(collection, document["_id"], [e["headers"]["ce_id"] for e in entries])])
            await ModelPublisher().publish([outgoing(entry) for entry in entries])

    return sweep
