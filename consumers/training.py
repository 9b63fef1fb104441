"""Consumer `training`: claims requested fine-tunes; the watcher beside it runs them on Ray."""

from consumers.watchers import training as watcher
from events.base import Envelope
from events.fine_tuning import FineTuneRequested
from mini_studio.bus.consumer import Consumer
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
