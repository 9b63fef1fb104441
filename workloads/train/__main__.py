"""`python -m workloads.train <spec.json>`: one attempt at one fine-tuning job, as `workloads.specs` lays it out.

The first line of progress is written before any heavy library loads. Exit code 0: the manifest is there; 1: the last
line of progress says what went wrong.
"""

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from workloads import cores
from workloads.specs import TrainSpec
from workloads.train.attempt import Attempt
from workloads.train.errors import Stopped, TrainingFailure, explained


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m workloads.train <spec.json>", file=sys.stderr)
        return 2
    try:
        spec = TrainSpec.model_validate_json(Path(arguments[0]).read_bytes())
    except (OSError, ValidationError) as error:
        print(f"the specification {arguments[0]} cannot be read: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _stop)
    return run(Attempt(spec))


def run(attempt: Attempt) -> int:
    try:
        with attempt.exclusive():
            if attempt.complete():
                print("this attempt is complete already")
                return 0
            attempt.say(kind="started")
            attempt.watch()
            _prepare_environment(attempt.spec)
            attempt.preparing("loading the training libraries")
            from workloads.train.job import train  # torch and transformers take seconds to load

            train(attempt)
            return 0
    except (Exception, Stopped, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not isinstance(error, TrainingFailure | Stopped):
            traceback.print_exc()
        attempt.fail(explained(error))
        return 1


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise Stopped


def _prepare_environment(spec: TrainSpec) -> None:
    """What the libraries read when they load."""
    cores.prepare(spec.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
