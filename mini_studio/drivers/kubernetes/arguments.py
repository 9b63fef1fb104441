"""What model servers are started with: a fixed list of options, each value checked, so that nothing from a request becomes an option.

Options are written `--name=value`, one item each, and no value may start with `-`. Kubernetes replaces `$(NAME)` in arguments, and vLLM
reads URLs, quantizations (`:Q4_K`) and more from a model's name: values are made of plain characters only.
"""

import re
from importlib.resources import files

from events.types import MODEL_NAME_PATTERN
from mini_studio.drivers.ports import ReleaseSpec
from mini_studio.errors import Refused
from mini_studio.settings import Kubernetes

CACHE = "/cache"
"""Where a pod may write: models that its server fetches or builds itself."""
MIDDLEWARE = "predict.Predict"
"""In the file of `predict_source`, which has to be on the pod's PYTHONPATH."""
FINISH_S = 320
"""How long answers may go on after the server was told to end, so that none is lost when pods are replaced; the pod's grace is longer."""
_PORT = 8000
_FOLDER = re.compile(r"(/[A-Za-z0-9_.@+-]+)+")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_BASE_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_MODEL = re.compile(MODEL_NAME_PATTERN)
_CPU = re.compile(r"([0-9]+)(?:\.[0-9]+)?(m?)")


def predict_source() -> str:
    """The text of `predict.py`, the middleware that vLLM loads."""
    return files("workloads").joinpath("predict", "predict.py").read_text()


def vllm_arguments(spec: ReleaseSpec, weights: str | None) -> list[str]:
    """For `vllm serve`, which wants the model first. Raises `Refused`.

    `weights` None: a hub model, which vLLM fetches. Fine-tuned weights are whole models, adapters merged. Prompts and answers are
    never logged, and code from a model's repository is never run: both are vLLM's defaults, and the first is said again.
    """
    several = [f"--tensor-parallel-size={spec.gpu_count}"] if spec.gpu_count > 1 else []
    return [
        _folder(weights) if weights is not None else _hub_id(spec.base_model),
        f"--served-model-name={_model(spec.model)}",
        "--host=0.0.0.0",
        f"--port={_PORT}",
        *several,
        f"--middleware={MIDDLEWARE}",
        f"--shutdown-timeout={FINISH_S}",
        "--no-enable-log-requests",
        "--disable-access-log-for-endpoints=/health,/metrics",
        "--disable-fastapi-docs",
    ]


def studio_arguments(spec: ReleaseSpec, settings: Kubernetes, weights: str | None, models_root: str) -> list[str]:
    """For `python -m workloads.serve`. Raises `Refused`, also for weights outside the models root: the pod has no other folder.

    `weights` None: a catalogue name or a hub model, which the server builds or fetches into its cache.
    """
    if weights is None:
        source = [f"--base-model={_base_model(spec.base_model)}", f"--models-root={CACHE}"]
    elif weights.startswith(f"{models_root.rstrip('/')}/"):
        source = [f"--weights={_folder(weights)}"]
    else:
        raise Refused(f"The weights {weights[:200]!r} are not below the models root {models_root}.")
    return [
        f"--served-model-name={_model(spec.model)}",
        *source,
        "--host=0.0.0.0",
        f"--port={_PORT}",
        f"--finish-s={FINISH_S}",
        f"--threads={threads(settings.cpu)}",
    ]


def threads(cpu: str) -> int:
    """Whole CPUs in a quantity of Kubernetes (`2`, `1.5`, `500m`), at least one. Raises `Refused`."""
    found = _CPU.fullmatch(cpu)
    if found is None:
        raise Refused(f"serving.kubernetes.cpu: {cpu!r} is not an amount of CPU such as 2 or 500m.")
    return max(1, int(found[1]) // (1000 if found[2] else 1))


def _folder(path: str) -> str:
    if not _FOLDER.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise Refused(
            f"The weights' folder {path[:200]!r} cannot be served on Kubernetes: use letters, digits and _ . @ + - in its path."
        )
    return path


def _model(name: str) -> str:
    # vLLM reads "None" as no name at all
    if not _MODEL.fullmatch(name) or name == "None":
        raise Refused(f"{name[:200]!r} cannot name a model.")
    return name


def _base_model(name: str) -> str:
    if not _BASE_MODEL.fullmatch(name) or ".." in name:
        raise Refused(f"{name[:200]!r} cannot name a base model.")
    return name


def _hub_id(name: str) -> str:
    if not _HUB_ID.fullmatch(name) or ".." in name:
        raise Refused(
            f"The base model {name[:200]!r} is not installed under the models root, and vLLM cannot fetch it: that takes a hub id, "
            f"org/name. Install it with `mini-studio models add`."
        )
    return name
