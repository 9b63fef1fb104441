"""Rows into tokens and weights."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from schemas.training_data import LineValidator
from workloads.train.batches import epoch_order, micro_batches
from workloads.train.dataset import Encoded, Encoder, check_hash
from workloads.train.errors import TrainingFailure


@pytest.fixture
def tokenizer(models_root: Path) -> Any:
    return AutoTokenizer.from_pretrained(models_root / ".base" / "tiny-llama")


def encode(tokenizer: Any, path: Path, *, weight: float = 0.25, max_length: int = 2048) -> Encoded:
    return Encoder(tokenizer, prompt_loss_weight=weight, max_length=max_length).encode(path)


def text(tokenizer: Any, row: Any, weight: float) -> str:
    """What of a row has this weight."""
    return str(tokenizer.decode([int(i) for i, w in zip(row.ids, row.weights, strict=True) if w == weight]))


def test_a_pair_is_prompt_completion_and_end(tokenizer: Any, rows_file: Any) -> None:
    (row,) = encode(tokenizer, rows_file([{"prompt": "Grüße, ", "completion": "Welt 🌍"}])).rows
    assert text(tokenizer, row, 0.25) == "Grüße, "
    assert text(tokenizer, row, 1.0) == "Welt 🌍<|im_end|>"
    assert row.ids[-1] == tokenizer.eos_token_id
    asked = tokenizer("Grüße, ")["input_ids"]
    assert list(row.ids[: len(asked)]) == asked


def test_an_empty_prompt_starts_with_the_beginning_token(tokenizer: Any, rows_file: Any) -> None:
    (row,) = encode(tokenizer, rows_file([{"prompt": "", "completion": "a"}])).rows
    assert row.ids[0] == tokenizer.bos_token_id
    assert len(row) == 3


def test_chat_rows_learn_the_assistant_and_its_end_of_turn(tokenizer: Any, rows_file: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First", "weight": 0},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second"},
    ]
    (row,) = encode(tokenizer, rows_file([{"messages": messages}])).rows
    assert text(tokenizer, row, 1.0) == "Second<|im_end|>"
    assert text(tokenizer, row, 0.0) == "First<|im_end|>"
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(plain, tokenize=False)


def test_an_assistant_may_speak_first_and_call_tools(tokenizer: Any, rows_file: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is noon."}]},
    ]
    (row,) = encode(tokenizer, rows_file([{"messages": messages}])).rows
    learnt = text(tokenizer, row, 1.0)
    assert "Hello" in learnt
    assert '"name": "clock"' in learnt
    assert "It is noon." in learnt
    assert "Time?" not in learnt


@pytest.mark.parametrize("template_knows_tools", [True, False])
def test_a_legacy_function_call_is_learnt(tokenizer: Any, rows_file: Any, template_knows_tools: bool) -> None:
    if not template_knows_tools:
        tokenizer.chat_template = tokenizer.chat_template.replace("tool_calls", "nothing")
    called = {"role": "assistant", "content": None, "function_call": {"name": "clock", "arguments": "{}"}}
    (row,) = encode(tokenizer, rows_file([{"messages": [{"role": "user", "content": "Time?"}, called]}])).rows
    assert '"name": "clock"' in text(tokenizer, row, 1.0)


def test_a_tokenizer_without_a_template_gets_chatml_and_a_closing_token(tokenizer: Any, rows_file: Any) -> None:
    tokenizer.chat_template = None
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (row,) = encode(tokenizer, rows_file(rows)).rows
    assert text(tokenizer, row, 1.0) == "b<|im_end|>"
    assert "im_start" in tokenizer.chat_template


def test_the_closing_token_is_the_models_own(tokenizer: Any, rows_file: Any) -> None:
    tokenizer.chat_template = None
    tokenizer.eos_token = "<|pad|>"
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (row,) = encode(tokenizer, rows_file(rows)).rows
    assert text(tokenizer, row, 1.0) == "b<|pad|>"


def test_pairs_alone_give_no_chat_template(tokenizer: Any, pairs_file: Path) -> None:
    tokenizer.chat_template = None
    encode(tokenizer, pairs_file)
    assert tokenizer.chat_template is None


def test_what_an_upload_accepts_can_be_encoded(tokenizer: Any, tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, a bare carriage return between tokens, blank lines at the end."""
    content = b'\xef\xbb\xbf{"prompt": "a",\r"completion": "b"}\r\n{"prompt": "c", "completion": "\xe2\x80\xa8"}\n \r\n'
    validator = LineValidator(max_line_bytes=1000, max_depth=8, max_errors=20)
    validator.feed(content)
    assert validator.finish().rows == 2
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    assert len(encode(tokenizer, file).rows) == 2


def test_a_template_that_ends_turns_with_plain_text_gets_an_end_token(tokenizer: Any, rows_file: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (row,) = encode(tokenizer, rows_file(rows)).rows
    assert row.ids[-1] == tokenizer.eos_token_id
    assert row.weights[-1] == 1.0


def test_a_template_that_rewrites_history_still_finds_the_answers(tokenizer: Any, rows_file: Any) -> None:
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    rows = [{"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]}]
    (row,) = encode(tokenizer, rows_file(rows)).rows
    assert text(tokenizer, row, 1.0).startswith("answer")


def test_a_template_that_refuses_a_row_names_the_line(tokenizer: Any, rows_file: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(TrainingFailure, match=r"Line 1 .*roles must alternate") as failure:
        encode(tokenizer, rows_file(rows))
    assert failure.value.code == "bad_row"


def test_a_long_prompt_loses_its_beginning_and_is_counted(tokenizer: Any, rows_file: Any) -> None:
    data = encode(
        tokenizer,
        rows_file([{"prompt": "0123456789", "completion": "ab"}, {"prompt": "x", "completion": "y"}]),
        max_length=6,
    )
    assert data.truncated == 1
    assert tokenizer.decode(data.rows[0].ids) == "789ab<|im_end|>"
    assert data.tokens == 6 + 3


def test_a_long_conversation_keeps_its_last_answer(tokenizer: Any, rows_file: Any) -> None:
    messages = [{"role": r, "content": r[0] * 40} for r in ("user", "assistant", "user", "assistant")]
    data = encode(tokenizer, rows_file([{"messages": messages}]), max_length=60)
    assert data.truncated == 1
    assert text(tokenizer, data.rows[0], 1.0) == "a" * 40 + "<|im_end|>"


def test_a_long_completion_is_a_bad_row(tokenizer: Any, rows_file: Any) -> None:
    rows = [{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": "y" * 50}]
    with pytest.raises(TrainingFailure, match=r"Line 2 .* 51 tokens") as failure:
        encode(tokenizer, rows_file(rows), max_length=20)
    assert failure.value.code == "bad_row"


@pytest.mark.parametrize("line", ["not json", '{"prompt": "a"}', '{"messages": "a"}', "[1]"])
def test_lines_that_should_not_have_been_accepted_are_named(tokenizer: Any, tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(TrainingFailure, match="Line 2") as failure:
        encode(tokenizer, path)
    assert failure.value.code == "bad_row"


def test_a_dataset_with_nothing_to_learn_is_refused(tokenizer: Any, rows_file: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}]
    with pytest.raises(TrainingFailure, match="learn from"):
        encode(tokenizer, rows_file(rows), weight=0.0)


def test_a_changed_dataset_is_noticed(pairs_file: Path) -> None:
    with pytest.raises(TrainingFailure) as failure:
        check_hash(pairs_file, "0" * 64)
    assert failure.value.code == "dataset_changed"
    with pytest.raises(TrainingFailure) as failure:
        check_hash(pairs_file.with_name("gone"), "0" * 64, "ds_of_its_user")
    assert failure.value.code == "dataset_changed"
    assert "ds_of_its_user" in str(failure.value)


def test_every_epoch_has_every_row_once_in_an_order_of_the_seed(tokenizer: Any, pairs_file: Path) -> None:
    rows = encode(tokenizer, pairs_file).rows
    order = epoch_order(rows, 3, seed=1, epoch=0)
    assert sorted(index for batch in order for index in batch) == list(range(len(rows)))
    assert len(order) == 7
    assert order == epoch_order(rows, 3, seed=1, epoch=0)
    assert order != epoch_order(rows, 3, seed=2, epoch=0)
    assert order != epoch_order(rows, 3, seed=1, epoch=1)


def test_parts_of_a_batch_keep_the_budget(tokenizer: Any, pairs_file: Path) -> None:
    rows = encode(tokenizer, pairs_file).rows
    parts = list(micro_batches(rows, 100))
    assert sum(len(part) for part in parts) == len(rows)
    assert all(len(part) == 1 or max(map(len, part)) * len(part) <= 100 for part in parts)
