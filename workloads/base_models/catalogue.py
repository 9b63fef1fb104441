"""The catalogue of base models, read without any machine learning library.

Every installed model is a folder `<models root>/.base/<slug>/` with a `source.json`:

    {"name": "org/name", "how": "built" | "registry" | "hub" | "local", "parameters": 134515008 | null, "path": "/a/folder" | null}

The model's files lie beside it, except for `"how": "local"`, where `path` names the folder they stay in. A folder without
`source.json` is no model: it is written before the folder gets its name, so nothing half-made is ever listed.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workloads.base_models.errors import BaseModelInvalid
from workloads.specs import BASE_MODELS

SOURCE = "source.json"
How = Literal["built", "registry", "hub", "local"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Entry:
    """One base model of the catalogue. `parameters` is None when nobody has counted them."""

    name: str
    description: str
    parameters: int | None
    installed: bool
    how: How


BUILT_IN: tuple[Entry, ...] = (
    Entry(
        name="tiny-llama",
        description="A Llama of 1M parameters with random weights, for tests and first tries; built here in about a second",
        parameters=886_400,
        installed=False,
        how="built",
    ),
    Entry(
        name="smollm2-135m-instruct",
        description="SmolLM2 135M Instruct, a real chat model in English (Apache-2.0); a download of 93 MB from the package registry",
        parameters=134_515_008,
        installed=False,
        how="registry",
    ),
)


def built_in(name: str) -> Entry | None:
    return next((entry for entry in BUILT_IN if entry.name == name), None)


def checked(name: str) -> str:
    """The name itself, if it can be a base model's. Raises `BaseModelInvalid`."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise BaseModelInvalid(
            f"{name!r} cannot name a base model: use letters, digits, '.', '_' and '-', at most one '/' (a hub id, org/name)."
        )
    return name


def is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name))


def slug(name: str) -> str:
    """The folder name of a model: `org/name` becomes `org--name`; a name that could be mistaken for another gets a hash."""
    readable = checked(name).replace("/", "--")
    if "--" in name or name != name.lower():
        # `a/b` and `a--b`, and on some file systems `A` and `a`, would share a folder
        return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return readable


def root(models_root: Path) -> Path:
    return models_root / BASE_MODELS


def folder(name: str, models_root: Path) -> Path:
    """Where the catalogue keeps the model, installed or not."""
    return root(models_root) / slug(name)


def source(at: Path) -> dict[str, Any] | None:
    """What `source.json` in an installed model's folder says; None when there is no installed model."""
    try:
        content = json.loads((at / SOURCE).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("name"), str) else None


def installed_path(name: str, models_root: Path) -> Path | None:
    """The folder that transformers can load the model from; None when it is not installed."""
    at = folder(name, models_root)
    found = source(at)
    if found is None:
        return None
    path = Path(found["path"]) if found.get("path") else at
    return path if (path / "config.json").is_file() else None


def list_models(models_root: Path) -> list[Entry]:
    """Built-in models first, then the installed and registered ones by name."""
    entries = {entry.name: entry for entry in BUILT_IN}
    base = root(models_root)
    for at in sorted(base.iterdir()) if base.is_dir() else []:
        found = None if at.name.startswith(".") else source(at)
        if found:
            entries[found["name"]] = _installed(found)
    names = [entry.name for entry in BUILT_IN]
    return [entries[name] for name in names + sorted(entries.keys() - names)]


def _installed(found: dict[str, Any]) -> Entry:
    name = found["name"]
    known = built_in(name)
    descriptions = {"hub": f"{name} from the Hugging Face hub", "local": f"The local folder {found.get('path')}"}
    return Entry(
        name=name,
        description=known.description if known else descriptions.get(found.get("how", ""), name),
        parameters=found.get("parameters") or (known.parameters if known else None),
        installed=True,
        how=known.how if known else found.get("how", "local"),
    )
