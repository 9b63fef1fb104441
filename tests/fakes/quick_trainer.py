"""`python -m tests.fakes.quick_trainer SPEC`: a trainer that trains nothing and takes 0.2 s, or goes wrong as its job's seed says.

Its attempt folder, fence, heartbeat and manifest are the real ones of `workloads.train.attempt`; its weights are the base model's own
files, so they can be served.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from workloads.base_models.catalogue import installed_path
from workloads.specs import WEIGHTS, TrainSpec
from workloads.train.attempt import Attempt
from workloads.train.errors import TrainingFailure

STEPS, STEP_S = 4, 0.05
ONCE = {"killed": 0.04, "crashes": 0.02, "silent": 0.01, "deaf": 0.03, "killed after": 0.03}
"""Share of the jobs whose first attempt goes wrong so."""
ALWAYS = {"fails": 0.04}
DEAF_S = 5.0
SILENT_S = 60.0


def fate(spec: TrainSpec) -> str:
    """What becomes of an attempt: the same for the same seed."""
    shares = {**ALWAYS, **(ONCE if spec.attempt == 1 else {})}
    return random.Random(spec.seed).choices([*shares, "well"], [*shares.values(), 1 - sum(shares.values())])[0]


def main() -> int:
    spec = TrainSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    attempt, becomes = Attempt(spec), fate(spec)
    with attempt.exclusive():
        if attempt.complete():
            return 0
        attempt.say(kind="started")
        if becomes == "silent":
            time.sleep(SILENT_S)
            return 1
        if becomes != "deaf":
            attempt.watch()
        return train(attempt, becomes)


def train(attempt: Attempt, becomes: str) -> int:
    attempt.say(kind="prepared", rows=6, tokens=60, truncated_rows=0, method="full")
    for step in range(1, STEPS + 1):
        time.sleep(STEP_S)
        attempt.say(kind="progress", step=step, total_steps=STEPS, epoch=1.0, train_loss=1 / step, eta_seconds=0.0)
    if becomes == "fails":
        attempt.fail(TrainingFailure("bad_row", "Row 3 has no tokens. Mend the dataset and submit again."))
        return 1
    if becomes == "crashes":
        return 3
    if becomes == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if becomes == "deaf":  # it shows no life and sees no fence until it is done: what it writes then comes late
        time.sleep(DEAF_S)
    attempt.commit(weights=weights(attempt), train_loss=1 / STEPS, steps=STEPS, tokens=60)
    if becomes == "killed after":
        os.kill(os.getpid(), signal.SIGKILL)
    attempt.say(kind="finished", message="the model is saved", step=STEPS, total_steps=STEPS)
    return 0


def weights(attempt: Attempt) -> Path:
    folder = attempt.folder / WEIGHTS
    folder.mkdir(exist_ok=True)
    base = installed_path(attempt.spec.base_model, attempt.spec.models_root)
    assert base is not None
    for file in base.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            os.link(file, folder / file.name)
    return folder


if __name__ == "__main__":
    sys.exit(main())
