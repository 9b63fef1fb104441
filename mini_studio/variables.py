"""The environment variables behind the settings: all of them, for the reference page, and those that were misspelt."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import structlog
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mini_studio.settings import Settings

log = structlog.get_logger(__name__)

PREFIX = "MINI_STUDIO_"
NOT_SETTINGS = re.compile(r"HEALTH_PORT|RUN_ID|RUN_DATA|PART|SERVER|REAL|TEST_.*")
"""An option of the command line, the launcher's marks, and what is the tests' and their servers'."""
SERVICE_LINK = re.compile(r".*_(SERVICE_(HOST|PORT)|TCP|UDP)(_.*)?")
"""What Kubernetes tells every pod of a Service whose name begins with `mini-studio-`."""


@dataclass(frozen=True)
class Variable:
    name: str
    section: tuple[str, ...]
    field: FieldInfo


def variables(model: type[BaseModel] = Settings, section: tuple[str, ...] = ()) -> Iterator[Variable]:
    """Every setting, a section's own before those of the sections in it."""
    sections = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((name, field.annotation))
        else:
            yield Variable(PREFIX + "__".join((*section, name)).upper(), section, field)
    for name, inner in sections:
        yield from variables(inner, (*section, name))


def unknown(environment: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Variables that look like settings and are none, each with the setting that was probably meant."""
    known = {variable.name for variable in variables()}
    whole = {PREFIX + "__".join(variable.section).upper() for variable in variables()}
    for name, value in environment.items():
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in known | whole or value.startswith(("tcp://", "udp://")):
            continue
        rest = upper.removeprefix(PREFIX)
        entry_of_one = any(upper.startswith(setting + "__") for setting in known)
        if not (entry_of_one or NOT_SETTINGS.fullmatch(rest) or SERVICE_LINK.fullmatch(rest)):
            near = difflib.get_close_matches(upper, known, 1)
            yield name, near[0] if near else None


def warn_of_unknown(environment: Mapping[str, str]) -> None:
    """They change nothing, and whoever set them should hear so."""
    for name, near in unknown(environment):
        log.warning("settings.unknown", variable=name, did_you_mean=near)
