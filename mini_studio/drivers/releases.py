"""What a serving driver on this machine was told to have: checked, resolved, and kept in `release.json`."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from events.types import CLIENT_CODE_PATTERN, DeploymentKind
from mini_studio.drivers.ports import ReleaseSpec
from mini_studio.errors import Refused
from mini_studio.files import replace_file

RELEASE = "release.json"
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Held:
    """A release as the driver holds it. `weights` is resolved once, so what a link points at later changes nothing until a new
    generation; `fingerprint` names the content: the same one is served by the same processes."""

    spec: ReleaseSpec
    weights: Path | None
    fingerprint: str

    @property
    def deployment_id(self) -> str:
        return self.spec.deployment_id

    @property
    def generation(self) -> int:
        return self.spec.generation

    @property
    def notes(self) -> list[str]:
        """What this machine does otherwise than asked."""
        notes = []
        if self.spec.gpu_count > 0:
            notes.append(f"It is served on the CPU of this machine; gpu_count {self.spec.gpu_count} is ignored here.")
        return notes


def plan(spec: ReleaseSpec, models_root: Path, threads: int) -> Held:
    """Raises `Refused` for a name or a weights path that must not be used."""
    if not NAME.fullmatch(spec.name):
        raise Refused(f"{spec.name[:80]!r} cannot name a deployment.")
    weights = confined(spec.weights_path, spec.client_code, models_root) if spec.weights_path else None
    content = [spec.deployment_id, spec.model, spec.base_model, str(weights), threads, _state_of(weights)]
    return Held(spec, weights, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12])


def confined(path: Path, client_code: str, models_root: Path) -> Path:
    """The real folder behind a weights path, which must lie in the client's own folder, links followed. Raises `Refused`."""
    own = models_root / client_code
    if not re.fullmatch(CLIENT_CODE_PATTERN, client_code):
        raise Refused(f"{client_code[:80]!r} is not a client code.")
    try:
        real = (models_root / path).resolve()
    except (OSError, ValueError, RuntimeError):
        raise Refused("fine_tuned_weights_path is not a path.") from None
    if not real.is_relative_to(own.resolve()) or real == own.resolve() or not own.resolve().is_relative_to(models_root):
        raise Refused(f"fine_tuned_weights_path must be a folder below {own}.")
    if not real.is_dir():
        raise Refused(f"There is no folder {path}; give the fine_tuned_weights_path of a job that has succeeded.")
    return real


def _state_of(weights: Path | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files: weights that were replaced in place are other content."""
    if weights is None:
        return []
    files = [path for path in sorted(weights.iterdir()) if path.is_file()]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def hold(folder: Path, held: Held) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / RELEASE, json.dumps(asdict(held), default=str, indent=1))


def held_in(folder: Path) -> Held | None:
    try:
        content: dict[str, Any] = json.loads((folder / RELEASE).read_text())
        spec: dict[str, Any] = content["spec"]
        kind, weights_path = DeploymentKind(spec["kind"]), _path(spec["weights_path"])
        restored = ReleaseSpec(**{**spec, "kind": kind, "weights_path": weights_path})
        return Held(restored, _path(content["weights"]), content["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
