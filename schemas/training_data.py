"""What a training dataset may hold: JSON lines, all `prompt`/`completion` or all chat `messages` (OpenAI's rules).

Other keys of a line (ids, sources, tools) are kept in the stored file and not looked at.

`LineValidator` is incremental: it is fed blocks of bytes and keeps only the unfinished line.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson

from events.types import DatasetFormat

ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
PAIR_KEYS = frozenset(("prompt", "completion"))
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class DatasetSummary:
    """What a valid dataset holds."""

    format: DatasetFormat
    rows: int
    size_bytes: int
    sha256: str
    characters: int
    """Of all texts."""
    longest_line_bytes: int


@dataclass(frozen=True)
class LineError:
    line: int
    """From 1."""
    field: str
    message: str


class InvalidDataset(ValueError):
    """The lines that are wrong, as many as were looked for."""

    def __init__(self, errors: list[LineError]) -> None:
        super().__init__(f"{len(errors)} invalid lines")
        self.errors = errors


class RowError(ValueError):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class LineValidator:
    """Feed it the file's bytes in blocks of any size, then `finish`. Both raise `InvalidDataset`."""

    def __init__(self, *, max_line_bytes: int, max_depth: int, max_errors: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._max_depth = max_depth
        self._max_errors = max_errors
        self._sha256 = hashlib.sha256()
        self._tail = b""
        self._line = 0
        self._rows = self._size = self._characters = self._longest = 0
        self._blank_at: int | None = None
        self._format: DatasetFormat | None = None
        self._errors: list[LineError] = []

    def feed(self, block: bytes) -> None:
        """Check the lines that this block completes."""
        self._sha256.update(block)
        self._size += len(block)
        lines = block.split(b"\n")
        lines[0] = self._tail + lines[0]
        self._tail = lines.pop()
        for line in lines:
            self._check(line)
        if len(self._tail) > self._max_line_bytes:
            self._line += 1
            self._too_long(len(self._tail))
            raise InvalidDataset(self._errors)

    def finish(self) -> DatasetSummary:
        """The summary of the whole file."""
        if self._tail:
            self._check(self._tail)
            self._tail = b""
        if not self._rows and not self._errors:
            self._fail(1, "", "the file has no rows; it needs one JSON object a line")
        if self._errors:
            raise InvalidDataset(self._errors)
        return DatasetSummary(
            format=self._format or DatasetFormat.CHAT,
            rows=self._rows,
            size_bytes=self._size,
            sha256=self._sha256.hexdigest(),
            characters=self._characters,
            longest_line_bytes=self._longest,
        )

    def _check(self, line: bytes) -> None:
        self._line += 1
        if self._line == 1:
            line = line.removeprefix(BOM)
        length = len(line)
        if length > self._longest:
            if length > self._max_line_bytes:
                self._too_long(length)
                return
            self._longest = length
        if not line or line.isspace():
            self._blank_at = self._blank_at or self._line
            return
        if self._blank_at is not None:
            self._fail(self._blank_at, "", "the line is empty; remove it (empty lines may only stand at the end)")
            self._blank_at = None
        try:
            self._row(line)
        except RowError as error:
            self._fail(self._line, error.field, str(error))

    def _row(self, line: bytes) -> None:
        row = parse(line)
        if type(row) is not dict:
            raise RowError("", f"must be a JSON object, not {kind(row)}")
        # A row of two keys that is a valid pair has no depth: counting brackets would cost as much as parsing.
        if len(row) > 2 or "prompt" not in row:
            self._not_too_deep(row, line)
        found = format_of(row)
        if self._format is not None and found is not self._format:
            raise RowError("", f"is {found.value}, but the lines before are {self._format.value}; do not mix the two")
        self._characters += check_chat(row) if found is DatasetFormat.CHAT else check_pair(row)
        self._format = found
        self._rows += 1

    def _not_too_deep(self, row: dict[str, Any], line: bytes) -> None:
        if line.count(b"[") + line.count(b"{") > self._max_depth and depth(row) > self._max_depth:
            raise RowError("", f"nested deeper than {self._max_depth} (MINI_STUDIO_UPLOADS__MAX_DEPTH)")

    def _too_long(self, length: int) -> None:
        limit = f"{self._max_line_bytes} (MINI_STUDIO_UPLOADS__MAX_LINE_BYTES)"
        self._fail(self._line, "", f"the line has {length} bytes or more; at most {limit}")

    def _fail(self, line: int, field: str, message: str) -> None:
        self._errors.append(LineError(line, field, message))
        if len(self._errors) >= self._max_errors:
            raise InvalidDataset(self._errors)


def parse(line: bytes) -> Any:
    """The line's JSON value. Raises `RowError` with what is wrong with it."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as wrong:
            raise RowError("", f"is not UTF-8 (byte {wrong.start + 1} of the line); save the file as UTF-8") from None
        raise RowError("", f"is not JSON: {error.msg} at character {error.pos + 1}") from None


def depth(value: Any) -> int:
    """How deeply lists and objects are nested; a plain value has 0."""
    deepest, open_values = 0, [(value, 1)]
    while open_values:
        present, level = open_values.pop()
        children = present.values() if isinstance(present, dict) else present if isinstance(present, list) else None
        if children is not None:
            deepest = max(deepest, level)
            open_values += [(child, level + 1) for child in children]
    return deepest


def format_of(row: dict[str, Any]) -> DatasetFormat:
    if "messages" not in row:
        return DatasetFormat.PROMPT_COMPLETION
    if "prompt" in row or "completion" in row:
        raise RowError("messages", "stands beside prompt or completion; a line is one or the other")
    return DatasetFormat.CHAT


def check_pair(row: dict[str, Any]) -> int:
    """Characters of a valid prompt/completion row."""
    if not row.keys() >= PAIR_KEYS:
        missing = sorted(PAIR_KEYS - row.keys())
        raise RowError(missing[0], "is missing; each line needs prompt and completion, or messages")
    prompt, completion = row["prompt"], row["completion"]
    if type(prompt) is not str:
        raise RowError("prompt", f"must be a string, not {kind(prompt)}")
    if type(completion) is not str:
        raise RowError("completion", f"must be a string, not {kind(completion)}")
    if not completion:
        raise RowError("completion", "is empty: there is nothing to learn from this line")
    return len(prompt) + len(completion)


def check_chat(row: dict[str, Any]) -> int:
    """Characters of a valid chat row."""
    messages = row["messages"]
    if type(messages) is not list or not messages:
        raise RowError("messages", "must be a non-empty list")
    characters = sum(check_message(message, f"messages.{n}") for n, message in enumerate(messages))
    learned = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1) == 1]
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError("messages", "needs at least one message with role assistant: that is what is learned")
    if not learned:
        raise RowError("messages", "every assistant message has weight 0: there is nothing to learn from this line")
    return characters


def check_message(message: Any, field: str) -> int:
    if type(message) is not dict:
        raise RowError(field, f"must be an object, not {kind(message)}")
    role = message.get("role")
    if type(role) is not str or role not in ROLES:
        raise RowError(f"{field}.role", f"must be one of {', '.join(sorted(ROLES))}")
    check_weight(message, role, field)
    content = message.get("content")
    if type(content) is str:
        if not content and role == "assistant" and not calls_a_tool(message):
            raise RowError(f"{field}.content", "is empty: there is nothing to learn from this message")
        return len(content)
    if type(content) is list:
        return check_parts(content, f"{field}.content")
    if content is None and role == "assistant" and calls_a_tool(message):
        return 0
    raise RowError(f"{field}.content", "must be a string, a list of text parts, or absent beside a tool call")


def check_weight(message: dict[str, Any], role: str, field: str) -> None:
    if "weight" not in message:
        return
    if role != "assistant":
        raise RowError(f"{field}.weight", "is for assistant messages only")
    if type(message["weight"]) is not int or message["weight"] not in (0, 1):
        raise RowError(f"{field}.weight", "must be 0 or 1")


def calls_a_tool(message: dict[str, Any]) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def check_parts(parts: list[Any], field: str) -> int:
    characters = 0
    for n, part in enumerate(parts):
        if type(part) is not dict or part.get("type") != "text" or type(part.get("text")) is not str:
            raise RowError(f"{field}.{n}", 'must be a text part: {"type": "text", "text": "..."}')
        characters += len(part["text"])
    if not parts:
        raise RowError(field, "must not be an empty list")
    return characters


KINDS: dict[type, str] = {
    dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number",
    type(None): "null",
}  # fmt: skip


def kind(value: Any) -> str:
    return KINDS.get(type(value), type(value).__name__)
