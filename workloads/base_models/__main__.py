"""`python -m workloads.base_models list|add NAME [--path FOLDER] --models-root R [--json]`.

With `--json` each line of output is an object: `{"model": {...}}` for `list`; for `add` any number of
`{"progress": "..."}`, then `{"installed": NAME, "path": FOLDER}` or `{"error": "..."}`. Exit code 1 after an error.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from workloads.base_models import catalogue
from workloads.base_models.errors import BaseModelError


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    root: Path = options.models_root.resolve()
    if options.command == "list":
        return _list(root, as_json=options.json)
    return _add(options.name, options.path, root, as_json=options.json)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--models-root", type=Path, required=True, help="root of all model folders")
    shared.add_argument("--json", action="store_true", help="one JSON object a line")
    parser = argparse.ArgumentParser(prog="python -m workloads.base_models", description="Base models to fine-tune.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", parents=[shared], help="list the base models")
    add = commands.add_parser("add", parents=[shared], help="install a base model, or register a local folder")
    add.add_argument("name", help="a built-in name, a hub id (org/name), or with --path any name")
    add.add_argument("--path", type=Path, help="folder of a model that transformers can load")
    return parser


def _list(root: Path, *, as_json: bool) -> int:
    for entry in catalogue.list_models(root):
        if as_json:
            _say({"model": dataclasses.asdict(entry)})
        else:
            state = "installed" if entry.installed else "on first use"
            print(f"{entry.name:<28} {state:<13} {entry.description}")
    return 0


def _add(name: str, path: Path | None, root: Path, *, as_json: bool) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from workloads.base_models.install import add_local, ensure

    def report(message: str) -> None:
        if as_json:
            _say({"progress": message})
        else:
            print(message, flush=True)

    try:
        installed = add_local(name, path, root) if path else ensure(name, root, report)
    except BaseModelError as error:
        if as_json:
            _say({"error": str(error)})
        else:
            print(f"error: {error}", file=sys.stderr)
        return 1
    if as_json:
        _say({"installed": name, "path": str(installed)})
    else:
        print(f"{name}: {installed}")
    return 0


def _say(content: dict[str, object]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    sys.exit(main())
