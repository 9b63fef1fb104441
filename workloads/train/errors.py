"""Why a training ends early.

TrainingFailure         goes into the last line of `progress.jsonl` as `code` and message
Stopped                 SIGTERM; not an `Exception`, so that no library's `except Exception` swallows it
"""

import errno
from typing import Literal

Code = Literal[
    "out_of_memory",
    "bad_row",
    "base_model",
    "dataset_changed",
    "no_space",
    "fenced",
    "stopped",
    "lost_worker",
    "internal",
]


class TrainingFailure(Exception):
    """A training that cannot go on; the message is for the person who submitted it and says what to do."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code

    def __reduce__(self) -> tuple[type["TrainingFailure"], tuple[Code, str]]:
        """A worker's failure travels to the process that started it."""
        return TrainingFailure, (self.code, str(self))


class Stopped(BaseException):
    """The process was asked to stop."""


OUT_OF_MEMORY = (
    "The training ran out of memory. Submit it again with a smaller batch_size, shorter rows, or LoRA instead of full "
    "fine-tuning; or give the trainer more memory."
)
FENCED = "Another attempt at this job has taken over, or the job was removed; this one stopped and left no model."
STOPPED = "The training was asked to stop before it was done; submit it again to start anew."
_NO_SPACE = f"os error {errno.ENOSPC}"  # as safetensors says it


def explained(error: BaseException) -> TrainingFailure:
    """Any error as a failure that a person understands."""
    if isinstance(error, TrainingFailure):
        return error
    if isinstance(error, Stopped | KeyboardInterrupt):
        return TrainingFailure("stopped", STOPPED)
    if _out_of_memory(error):
        return TrainingFailure("out_of_memory", OUT_OF_MEMORY)
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or _NO_SPACE in str(error):
        return TrainingFailure(
            "no_space", f"The disk of the model folders is full ({error}); make room and submit again."
        )
    return TrainingFailure(
        "internal",
        f"The trainer broke: {type(error).__name__}: {error}. Its log has the details; submitting again may help.",
    )


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
