"""Consumer `jobs`: job records follow the log."""

from typing import Any

from events.base import Envelope
from events.fine_tuning import (
    FineTuneFailed,
    FineTuneProgressed,
    FineTuneQueued,
    FineTuneRequested,
    FineTuneStarted,
    FineTuneSucceeded,
)
from mini_studio.bus.consumer import Consumer
from mini_studio.wiring import Studio

consumer = Consumer("jobs")


@consumer.projects(
    FineTuneRequested, FineTuneQueued, FineTuneStarted, FineTuneProgressed, FineTuneSucceeded, FineTuneFailed
)
async def project(envelopes: list[Envelope[Any]], studio: Studio) -> None:
    """Apply the events to their job records."""
    await studio.jobs.apply_all(envelopes)
