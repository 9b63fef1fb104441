"""One attempt's folder: its progress, its sign of life, its fence, its manifest."""

import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workloads.files import sha256_of, sync_folder, write_whole
from workloads.specs import (
    CURRENT_ATTEMPT,
    HEARTBEAT,
    MANIFEST,
    PROGRESS,
    Manifest,
    ManifestFile,
    Progress,
    TrainSpec,
    attempt_dir,
)
from workloads.train.errors import FENCED, TrainingFailure

_BEAT_S = 2.0
_REPEAT_AFTER_S = 4.0


class Attempt:
    """The only thing a trainer writes to. Safe to use from several threads.

    Of several workers one speaks for all; the others only watch the fence.
    """

    def __init__(self, spec: TrainSpec, *, speaks: bool = True) -> None:
        self.spec = spec
        self._speaks = speaks
        self.folder = attempt_dir(spec.job_dir, spec.attempt)
        self._lock = threading.RLock()
        self._last: Progress | None = None

    def complete(self) -> bool:
        """Whether this very attempt has finished before."""
        try:
            return Manifest.model_validate_json((self.folder / MANIFEST).read_bytes()).token == self.spec.token
        except (OSError, ValueError):
            return False

    def fenced(self) -> bool:
        """Whether the attempt may no longer go on. An unreadable file system is not a fence."""
        try:
            return (self.spec.job_dir / CURRENT_ATTEMPT).read_text().strip() != self.spec.token
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False

    def check_fence(self) -> None:
        if self.fenced():
            raise TrainingFailure("fenced", FENCED)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until no other process works on this attempt: a restarted cluster may start one that never stopped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self.check_fence()
                    time.sleep(0.5)
            yield

    def say(self, **fields: Any) -> None:
        """Append one `Progress` line; `time` is added."""
        self._append(Progress(time=time.time(), **fields))

    def preparing(self, message: str) -> None:
        if self._speaks:
            print(message, flush=True)
        self.say(kind="preparing", message=message)

    def tell(self, **fields: Any) -> None:
        """Say how far the training is. What cannot be written for now is not worth the training: the next line tells more."""
        try:
            self.say(kind="progress", **fields)
        except OSError as error:
            print(f"the progress could not be written: {error}", file=sys.stderr, flush=True)

    def remark(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        self.tell(message=message)

    def hand_over(self) -> None:
        """Another process speaks from now on: show life, and repeat nothing."""
        with self._lock:
            self._last = None

    def _append(self, line: Progress) -> None:
        if not self._speaks:
            return
        with self._lock:
            self._last = line
            path = self.folder / PROGRESS
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                # a process killed in the middle of a line must not spoil the next one
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                os.write(
                    descriptor, (b"\n" if torn else b"") + line.model_dump_json(exclude_none=True).encode() + b"\n"
                )
            finally:
                os.close(descriptor)

    def _repeat(self) -> None:
        """Say the last line again with a fresh time, so that long steps and loads are not taken for silence."""
        with self._lock:
            last = self._last
            if (
                last is not None
                and last.kind not in ("finished", "failed")
                and time.time() - last.time >= _REPEAT_AFTER_S
            ):
                self._append(last.model_copy(update={"time": time.time()}))

    def fail(self, failure: TrainingFailure) -> None:
        print(f"failed ({failure.code}): {failure}", file=sys.stderr, flush=True)
        try:
            self.say(kind="failed", code=failure.code, message=str(failure))
        except OSError as error:
            print(f"the failure could not be recorded: {error}", file=sys.stderr, flush=True)

    def watch(self, stop: Callable[[int], None] = os._exit) -> threading.Thread:
        """Start the thread that shows life and, when the attempt is fenced, ends the process, whatever it is doing."""
        self._beat()
        thread = threading.Thread(target=self._watch, args=(stop,), name="heartbeat", daemon=True)
        thread.start()
        return thread

    def _watch(self, stop: Callable[[int], None]) -> None:
        while True:
            if self.fenced():
                self.fail(TrainingFailure("fenced", FENCED))
                stop(1)
                return
            try:
                self._beat()
                self._repeat()
            except OSError as error:
                print(f"no sign of life could be written: {error}", file=sys.stderr, flush=True)
            time.sleep(_BEAT_S)

    def _beat(self) -> None:
        if self._speaks:
            (self.folder / HEARTBEAT).touch()

    def commit(self, *, weights: Path, train_loss: float, steps: int, tokens: int) -> None:
        """Make the weights durable, then write the manifest, last and atomically. Raises when the attempt is fenced."""
        files = [durable(path, self.folder) for path in sorted(weights.rglob("*")) if path.is_file()]
        sync_folder(weights)
        manifest = Manifest(
            job_id=self.spec.job_id,
            attempt=self.spec.attempt,
            token=self.spec.token,
            files=files,
            train_loss=train_loss,
            steps=steps,
            tokens=tokens,
        )
        self.check_fence()
        write_whole(self.folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def durable(path: Path, folder: Path) -> ManifestFile:
    """Write a file through to the disk and hash it; its path is given relative to `folder`."""
    path.chmod(0o644)  # safetensors writes 0600, and model servers may be other users
    with path.open("rb") as file:
        os.fsync(file.fileno())
    relative = path.relative_to(folder).as_posix()
    return ManifestFile(path=relative, size_bytes=path.stat().st_size, sha256=sha256_of(path))
