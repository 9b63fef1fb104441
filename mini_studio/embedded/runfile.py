"""The files of `<data>/run`: where the parts listen (`studio.json`), the S3 keys, the lock."""

import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import Any


def folder(data: Path) -> Path:
    return data / "run"


def run_file(data: Path) -> Path:
    """Same as `mini_studio.settings.run_file`, which would load pydantic."""
    return folder(data) / "studio.json"


def read(data: Path) -> dict[str, Any]:
    """What the last studio in `data` wrote; empty if none did."""
    try:
        content = json.loads(run_file(data).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(data: Path, content: dict[str, Any]) -> None:
    """Replace the file at once, readable by its owner alone: it holds the S3 keys."""
    _write_private(run_file(data), json.dumps(content, indent=2) + "\n")


def s3_keys(data: Path) -> tuple[str, str]:
    """Access key and secret, made once for each data folder."""
    path = folder(data) / "s3-keys.json"
    try:
        kept = json.loads(path.read_text())
        return str(kept["access_key"]), str(kept["secret_key"])
    except (OSError, ValueError, KeyError, TypeError):
        keys = {"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(20)}
        _write_private(path, json.dumps(keys) + "\n")
        return keys["access_key"], keys["secret_key"]


def lock(data: Path) -> int | None:
    """A descriptor that holds the folder until it is closed or this process ends; None if another studio holds it."""
    descriptor = os.open(folder(data) / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
