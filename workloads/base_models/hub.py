"""Models of the Hugging Face hub, by their id `org/name`. Code from a repository is never run."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from workloads.base_models.errors import BaseModelUnavailable

_ANSWER_S = 10.0
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_PICKLED = ["pytorch_model*.bin"]

Report = Callable[[str], None]


def build(name: str, target: Path, report: Report) -> None:
    """Download the repository's model files into `target`. Ends within seconds when the hub cannot be reached.

    Raises `BaseModelUnavailable`.
    """
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "15")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["HF_HUB_OFFLINE"] = "0"
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    report(f"asking the Hugging Face hub for {name}")
    try:
        info = HfApi().model_info(name, files_metadata=True, timeout=_ANSWER_S)
        files = {file.rfilename: file.size or 0 for file in info.siblings or []}
        patterns = _FILES if any(file.endswith(".safetensors") for file in files) else _FILES + _PICKLED
        size = sum(size for file, size in files.items() if any(Path(file).match(pattern) for pattern in patterns))
        report(f"downloading {name} from the Hugging Face hub ({size / 1e6:.0f} MB)")
        snapshot_download(
            name, revision=info.sha, local_dir=target, allow_patterns=patterns, etag_timeout=_ANSWER_S, max_workers=4
        )
    except GatedRepoError as error:
        raise BaseModelUnavailable(
            f"{name} on the Hugging Face hub asks for its licence to be accepted: do so on its page, then set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelUnavailable(
            f"The Hugging Face hub has no public model {name}: check the spelling, or set HF_TOKEN if it is a private one."
        ) from error
    except Exception as error:  # the hub's client lets the errors of the HTTP library under it through
        raise unreachable(name, error) from error
    if not (target / "config.json").is_file():
        raise BaseModelUnavailable(
            f"{name} on the Hugging Face hub has no config.json, so it is not a transformers model."
        )
    if "auto_map" in json.loads((target / "config.json").read_text()):
        raise BaseModelUnavailable(
            f"{name} wants to run code of its own, which is never done here; choose another model."
        )


def unreachable(name: str, error: Exception) -> BaseModelUnavailable:
    """What to do when the hub does not answer."""
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return BaseModelUnavailable(
        f"{name} is not on this machine and the Hugging Face hub could not be reached ({type(error).__name__}: {cause}). "
        f"Connect to it (HF_ENDPOINT names a mirror), or copy the model's folder here and register it with "
        f"`mini-studio models add {name} --path FOLDER`."
    )
