"""Several workers for one attempt, through Ray Train. This process starts them, waits, and says why they ended if they did not finish.

A worker that is lost fails the attempt: the studio starts the next one, which goes on from the last checkpoint. Ray Train's own
retries and its `report` are not used; the latter would wait for the controller's poll at every step.
"""

import os
import shutil
import signal
from collections.abc import Iterable
from typing import Any

import ray
from ray import train as ray_train
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from workloads.specs import Checkpoint, TrainSpec
from workloads.train.attempt import Attempt
from workloads.train.errors import TrainingFailure, explained
from workloads.train.job import work
from workloads.train.team import LOST, Team

_POLL_S = "1"
"""How soon Ray Train sees that a worker has ended, or is lost; its default is 2 s."""
_START_S = "300"
"""How long workers may take to start before Ray Train tries anew: its minute is too short for a busy machine to load torch."""
_HANDED_DOWN = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY")
_UNSPECIFIC = ("internal", "lost_worker")


def train_together(attempt: Attempt, checkpoint: Checkpoint | None) -> None:
    """Run `work` on as many workers as the specification says. Raises the `TrainingFailure` that ended them."""
    spec = attempt.spec
    attempt.preparing(f"starting {spec.workers} workers")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_S)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_S)
    stop = signal.getsignal(signal.SIGTERM)
    ray.init()
    signal.signal(signal.SIGTERM, stop)  # Ray has set its own, which says nothing
    results = attempt.folder / "ray"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "spec": spec.model_dump_json(),
            "checkpoint": checkpoint.model_dump_json() if checkpoint else None,
        },
        scaling_config=ScalingConfig(
            num_workers=spec.workers, use_gpu=spec.gpus > 0, resources_per_worker={"CPU": spec.cpus, "GPU": spec.gpus}
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # its stub is that of an older class
            name="train",
            storage_path=str(results),
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": {name: os.environ[name] for name in _HANDED_DOWN if name in os.environ}},
        ),
    )
    attempt.hand_over()
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _cause(getattr(error, "worker_failures", {}).values(), error) from error
    finally:
        shutil.rmtree(results, ignore_errors=True)


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker's process."""
    context = ray_train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size())
    attempt = Attempt(TrainSpec.model_validate_json(config["spec"]), speaks=team.leads)
    attempt.watch()
    checkpoint = config["checkpoint"]
    try:
        work(attempt, Checkpoint.model_validate_json(checkpoint) if checkpoint else None, team)
    except Exception as error:
        raise explained(error) from error


def _cause(failures: Iterable[Exception], error: Exception) -> TrainingFailure:
    """The failure that explains the others: when one worker fails, the others only see that it is gone."""
    found = [
        failure
        if isinstance(failure, TrainingFailure)
        else TrainingFailure("lost_worker", LOST.format(failure))  # not what `_worker` raised: it has gone itself
        for failure in failures
    ]
    specific = [failure for failure in found if failure.code not in _UNSPECIFIC]
    lost = [failure for failure in found if failure.code == "lost_worker"]
    return [*specific, *lost, *found, TrainingFailure("lost_worker", LOST.format(error))][0]
