"""Failures as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

import re
from collections.abc import Sequence
from typing import Any

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
FIELD = re.compile(r"([a-z_][a-z0-9_.]{0,100}): ")
"""How our own messages begin where they are about a field."""
INVALID, CONFLICT = 422, 409
SHOWN_LENGTH = 2000


def openai_error(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The body of a failure."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def openai_body(status: int, code: str, message: str, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The body of a failure that the studio tells with details."""
    return openai_error(openai_status(status), told(message, details), code, param_of(message, details))


def openai_status(status: int) -> int:
    """What is invalid is 400 there."""
    return 400 if status == INVALID else status


def openai_headers(status: int) -> dict[str, str]:
    """The client would repeat a 409 if it were not told to leave it."""
    return {"x-should-retry": "false"} if status == CONFLICT else {}


def told(message: str, details: Sequence[dict[str, Any]]) -> str:
    """The message; of a wrong dataset with every line that is known to be wrong, as there are no details beside it."""
    lines = [told_line(each) for each in details if "line" in each]
    return f"file: {'; '.join(lines)}"[:SHOWN_LENGTH] if lines else message


def told_line(wrong: dict[str, Any]) -> str:
    field = f"{wrong['field']}: " if wrong["field"] else ""
    return f"line {wrong['line']}: {field}{wrong['message']}"


def param_of(message: str, details: Sequence[dict[str, Any]]) -> str | None:
    """The field that is wrong: `file` for what is wrong in its lines."""
    if details and "line" in details[0]:
        return "file"
    named = details[0].get("field") if details else None
    begins = FIELD.match(message)
    return str(named) if named else begins and begins[1]
