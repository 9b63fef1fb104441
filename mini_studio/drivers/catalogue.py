"""The base models that there are, as the API and the command line see them: read from files, without any machine learning library."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mini_studio.errors import Invalid, Unavailable
from workloads import specs
from workloads.base_models.catalogue import Entry, installed_path, list_models
from workloads.base_models.errors import BaseModelInvalid

NAMED = 20
"""Models that an error message lists."""


class ModelCatalogue:
    """Base models under a models root. Cheap enough to be asked at every request: it reads one small file per installed model."""

    def __init__(self, models_root: Path) -> None:
        self._models_root = models_root

    def list(self) -> Sequence[Entry]:
        """Built-in models first, then the others by name."""
        return list_models(self._models_root)

    def names(self) -> Sequence[str]:
        return [entry.name for entry in list_models(self._models_root)]

    def get(self, name: str) -> Entry | None:
        return next((entry for entry in list_models(self._models_root) if entry.name == name), None)

    def folder(self, name: str) -> Path | None:
        """The real folder of an installed model's files; None when it is not installed, or cannot be a base model's name."""
        with contextlib.suppress(BaseModelInvalid):
            found = installed_path(name, self._models_root)
            return None if found is None else found.resolve()
        return None

    def require(self, name: str) -> Entry:
        """Raises `Invalid`, which names the models that exist and says how to add one."""
        if (entry := self.get(name)) is not None:
            return entry
        names = self.names()
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise Invalid(
            f"model: unknown base model {name[:200]!r}; these exist: {', '.join(names[:NAMED])}{more}; "
            "add one with `mini-studio models add NAME`",
            details=[{"field": "model", "known": names[:NAMED]}],
        )

    def add(self, name: str, path: Path | None = None) -> Iterator[str]:
        """Install a model, or register a local folder; yields lines of progress. In a process of its own: it needs torch.

        Raises `Invalid` when the model cannot be had, with what to do; `Unavailable` when the process was killed.
        """
        command = [sys.executable, "-m", "workloads.base_models", "add", "--json"]
        command += ["--models-root", str(self._models_root), *(["--path", str(path)] if path else []), "--", name]
        package = str(Path(specs.__file__).resolve().parents[1])
        search = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": search}
        ) as process:
            try:
                yield from _told(process)
            finally:
                if process.poll() is None:
                    process.terminate()


def _told(process: "subprocess.Popen[str]") -> Iterator[str]:
    """Progress, until it says how it ended."""
    for line in process.stdout or ():
        try:
            said = json.loads(line)
        except ValueError:
            continue  # a library that prints
        if "progress" in said:
            yield str(said["progress"])
        elif "error" in said:
            raise Invalid(f"model: {said['error']}")
        elif "installed" in said:
            yield f"{said['installed']} is ready in {said['path']}"
            return
    raise Unavailable(f"The installation ended with exit code {process.wait()} before it was done; try again.")
