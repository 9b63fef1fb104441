"""Events of finished jobs, for benchmarks."""

from events.base import Cause, Envelope, Event
from events.fine_tuning import (
    DatasetRef,
    FineTuneProgressed,
    FineTuneQueued,
    FineTuneRequested,
    FineTuneStarted,
    FineTuneSucceeded,
    Hyperparameters,
)
from events.types import new_id

PER_JOB = 10


def history(id: str) -> list[Envelope[Event]]:
    """The events of one job that succeeded."""
    parameters = Hyperparameters(
        n_epochs=1, batch_size=1, learning_rate_multiplier=0.1, prompt_loss_weight=0, seed=0, method="full"
    )
    dataset = DatasetRef(id=new_id("ds"), dfs_path="/d", sha256="0" * 64, rows=3)
    told: list[Event] = [FineTuneQueued(job_id=id, attempt=0), FineTuneStarted(job_id=id, attempt=1, submission_id="s")]
    told += [FineTuneProgressed(job_id=id, attempt=1, step=n, train_loss=1.0) for n in range(PER_JOB - 4)]
    told.append(
        FineTuneSucceeded(
            job_id=id, attempt=1, fine_tuned_model="m", fine_tuned_weights_path="/w", train_loss=1, steps=9, tokens=9
        )
    )
    asked = FineTuneRequested(
        job_id=id, base_model="tiny-llama", fine_tuned_model="m", dataset=dataset, hyperparameters=parameters
    )
    sequence: list[tuple[Event, int]] = [(asked, 1), *((event, n + 1) for n, event in enumerate(told))]
    cause = Cause(correlation_id="benchmark")
    return [Envelope.of(e, subject=id, sequence=n, client_code="bench", cause=cause) for e, n in sequence]
