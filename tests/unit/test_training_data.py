"""The rules of a dataset's lines."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.types import DatasetFormat
from schemas.training_data import DatasetSummary, InvalidDataset, LineValidator

PAIR = b'{"prompt": "a", "completion": "b"}\n'
CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def validator(max_line_bytes: int = 10_000, max_depth: int = 8, max_errors: int = 20) -> LineValidator:
    return LineValidator(max_line_bytes=max_line_bytes, max_depth=max_depth, max_errors=max_errors)


def check(content: bytes, **limits: int) -> DatasetSummary:
    lines = validator(**limits)
    lines.feed(content)
    return lines.finish()


def errors(content: bytes, **limits: int) -> list[tuple[int, str, str]]:
    with pytest.raises(InvalidDataset) as caught:
        check(content, **limits)
    return [(e.line, e.field, e.message) for e in caught.value.errors]


def chat(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode() + b"\n"


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

GOOD: list[tuple[bytes, DatasetFormat, int]] = [
    (PAIR * 3, DatasetFormat.PROMPT_COMPLETION, 3),
    (PAIR[:-1], DatasetFormat.PROMPT_COMPLETION, 1),
    (b"\xef\xbb\xbf" + PAIR, DatasetFormat.PROMPT_COMPLETION, 1),
    (PAIR.replace(b"\n", b"\r\n") * 2, DatasetFormat.PROMPT_COMPLETION, 2),
    (PAIR + b"\n  \n", DatasetFormat.PROMPT_COMPLETION, 1),
    (b'{"prompt": "", "completion": "\xe2\x82\xac"}\n', DatasetFormat.PROMPT_COMPLETION, 1),
    (CHAT * 2, DatasetFormat.CHAT, 2),
    (chat(USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}), DatasetFormat.CHAT, 1),
    (chat({"role": "user", "content": [{"type": "text", "text": "a"}]}, ASSISTANT), DatasetFormat.CHAT, 1),
    (chat(USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}, tools=[]), DatasetFormat.CHAT, 1),
]

BAD: list[tuple[bytes, int, str]] = [
    (b"", 1, "no rows"),
    (b"\n\n", 1, "no rows"),
    (b"not json\n", 1, "not JSON"),
    (b"[1]\n", 1, "not a list"),
    (b"3\n", 1, "not a number"),
    (b'{"prompt": "a", "completion": NaN}\n', 1, "not JSON"),
    (b'{"prompt": "\xff", "completion": "b"}\n', 1, "not UTF-8"),
    (b'{"prompt": "\\ud800", "completion": "b"}\n', 1, "not JSON"),
    (b'{"prompt": "a"}\n', 1, "is missing"),
    (b'{"prompt": 1, "completion": "b"}\n', 1, "not a number"),
    (b'{"prompt": "a", "completion": null}\n', 1, "not null"),
    (b'{"prompt": "a", "completion": ""}\n', 1, "nothing to learn"),
    (b'{"prompt": "a", "completion": "b", "messages": []}\n', 1, "one or the other"),
    (PAIR + CHAT, 2, "do not mix"),
    (PAIR + b"\n" + PAIR, 2, "empty"),
    (chat(), 1, "non-empty"),
    (chat(USER), 1, "assistant"),
    (chat(USER, {**ASSISTANT, "weight": 0}), 1, "weight 0"),
    (chat({**USER, "weight": 1}, ASSISTANT), 1, "assistant messages only"),
    (chat(USER, {**ASSISTANT, "weight": 2}), 1, "0 or 1"),
    (chat({"role": "robot", "content": "x"}, ASSISTANT), 1, "must be one of"),
    (chat("x"), 1, "must be an object"),
    (chat({"role": "user"}, ASSISTANT), 1, "must be a string"),
    (chat({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT), 1, "text part"),
    (chat(USER, ASSISTANT, tools=json.loads("[" * 20 + "]" * 20)), 1, "nested deeper"),
    (b"[" * 5000 + b"]" * 5000 + b"\n", 1, ""),
    (PAIR + b'{"prompt": "' + b"x" * 20_000 + b'", "completion": "b"}\n', 2, "MAX_LINE_BYTES"),
]


@pytest.mark.parametrize(("content", "format", "rows"), GOOD)
def test_what_is_accepted(content: bytes, format: DatasetFormat, rows: int) -> None:
    summary = check(content)
    assert (summary.format, summary.rows, summary.size_bytes) == (format, rows, len(content))


@pytest.mark.parametrize(("content", "line", "text"), BAD)
def test_what_is_refused_names_the_line(content: bytes, line: int, text: str) -> None:
    first = errors(content)[0]
    assert first[0] == line
    assert text in first[2]


def test_the_first_twenty_errors_are_enough() -> None:
    found = errors(b"x\n" * 1000)
    assert [line for line, _, _ in found] == list(range(1, 21))


def test_an_endless_line_is_refused_before_it_is_held() -> None:
    lines = validator()
    with pytest.raises(InvalidDataset):
        for _ in range(10):
            lines.feed(b"x" * 5000)


@given(st.lists(st.sampled_from([PAIR, CHAT, b"\n", b"x\n", b"\xff\n"]), max_size=6), st.data())
def test_the_blocks_do_not_matter(parts: list[bytes], data: st.DataObject) -> None:
    content = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=5)))

    def outcome(blocks: list[bytes]) -> Any:
        lines = validator()
        try:
            for block in blocks:
                lines.feed(block)
            return lines.finish()
        except InvalidDataset as error:
            return error.errors

    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    assert outcome(pieces) == outcome([content])


def test_other_keys_are_kept_and_not_looked_at() -> None:
    content = (
        b'{"prompt": "a", "completion": "b", "source": {"page": 1}}\n{"id": 2, "prompt": "c", "completion": "d"}\n'
    )
    assert check(content).rows == 2
