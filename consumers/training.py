"""Consumer `training`: claims requested fine-tunes; the watcher beside it runs them on Ray."""

from typing import Any

from consumers.watchers import training as watcher
from events.base import Envelope
from events.fine_tuning import FineTuneCancelRequested, FineTuneRequested
from events.registry import restore
from mini_studio.bus.consumer import Consumer
from mini_studio.errors import Conflict
from mini_studio.records.record import ANYONE
from mini_studio.records.store import DuplicateRecord
from mini_studio.records.training_runs import TrainingRun
from mini_studio.wiring import Studio

consumer = Consumer("training")
consumer.service(watcher.watch)


@consumer.on(FineTuneRequested)
async def claim(envelope: Envelope[FineTuneRequested], studio: Studio) -> None:
    """Queue one training run for a requested fine-tune; the watcher starts it when resources are free."""
    run = await studio.runs.get(ANYONE, envelope.subject)
    if run is not None:
        run.check_owner(envelope)
        return
    try:
        await studio.runs.insert(TrainingRun.claim(envelope))
    except DuplicateRecord:
        return
    studio.runs_changed.set()


@consumer.on(FineTuneCancelRequested)
async def cancel(envelope: Envelope[FineTuneCancelRequested], studio: Studio) -> None:
    """Choose that the run comes to no artifact, unless it has one; the watcher ends what trains."""
    if await studio.runs.get(ANYONE, envelope.subject) is None:
        await claim(await request_of(envelope, studio), studio)
    if await studio.runs.change(ANYONE, envelope.subject, lambda run: run.cancel(envelope)) is not None:
        studio.runs_changed.set()


async def request_of(envelope: Envelope[FineTuneCancelRequested], studio: Studio) -> Envelope[FineTuneRequested]:
    """What is to be cancelled and was not read yet; the journal has it, for both come from one record. Raises `Conflict`."""
    for entry in await studio.store.read_journal(key=envelope.subject, limit=1):
        request: Envelope[Any] = restore(entry.stored)
        if isinstance(request.data, FineTuneRequested):
            return request
    raise Conflict(f"no request of {envelope.subject} is in the journal")
