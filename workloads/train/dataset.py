"""From JSON lines to token ids with a loss weight each.

How a row is tokenized, so that asking the model later (`/predict` and the OpenAI paths) meets the same tokens:

- `prompt`/`completion`: the prompt as the tokenizer does by default (with a beginning-of-sequence token where the model uses
  one, without any end-of-sequence token), then the completion without special tokens, then the end-of-sequence token.
- chat: the base model's own chat template, see `workloads.train.chat`.

Weights: 1 on completions and assistant messages, `prompt_loss_weight` on everything before and between them, 0 on assistant
messages with `"weight": 0`.

A row that is too long loses the beginning of its prompt. Its last completion is never cut: a row whose completion alone is too
long fails the training and names the line.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workloads.files import sha256_of
from workloads.train.chat import ChatEncoder
from workloads.train.errors import TrainingFailure

_AT_ONCE = 256


@dataclass(frozen=True)
class Row:
    """One example: `ids` (int32) and their loss `weights` (float32), both of shape (tokens,)."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoded:
    """A whole dataset, ready to be trained on."""

    rows: list[Row]
    truncated: int

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)


@dataclass(frozen=True)
class Pieces:
    """One line's tokens before truncation; from `keep_from` on they are the last completion."""

    ids: list[int]
    weights: list[float]
    keep_from: int


def check_hash(path: Path, expected: str, dataset_id: str = "") -> None:
    """Raises `dataset_changed` unless the file is the one that was uploaded."""
    try:
        actual = sha256_of(path)
    except FileNotFoundError as error:
        raise TrainingFailure(
            "dataset_changed",
            f"The file {path} of dataset {dataset_id} has gone: was the dataset deleted? Upload it again, and submit again.",
        ) from error
    if actual != expected:
        raise TrainingFailure(
            "dataset_changed",
            f"The dataset file {path} is not the one that was uploaded any more; upload the dataset again.",
        )


class Encoder:
    """Encodes lines with a tokenizer of transformers (a fast one where there is one)."""

    def __init__(self, tokenizer: Any, *, prompt_loss_weight: float, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._prompt_loss_weight = prompt_loss_weight
        self._max_length = max_length
        self._chat = ChatEncoder(tokenizer, prompt_loss_weight)
        self._bos = tokenizer.bos_token_id
        self._eos = tokenizer.eos_token_id
        if self._eos is None:
            raise TrainingFailure(
                "base_model", "The base model's tokenizer has no end-of-sequence token, so it cannot be trained."
            )

    def encode(self, path: Path, report: Callable[[int], None] = lambda _rows: None) -> Encoded:
        """All rows of a file; `report` is told how many are done. Raises `bad_row`, naming the line."""
        rows: list[Row] = []
        truncated = 0
        with path.open("rb") as file:  # bytes: a line ends with \n only, as it did when the upload was checked
            lines = enumerate(file, start=1)
            while block := list(islice(lines, _AT_ONCE)):
                for number, pieces in self._block(block):
                    row, cut = self._fit(number, pieces)
                    rows.append(row)
                    truncated += cut
                report(len(rows))
        if not any(row.weights[1:].any() for row in rows):
            raise TrainingFailure(
                "bad_row", "No row of the dataset has a completion or an assistant message to learn from."
            )
        return Encoded(rows, truncated)

    def _block(self, lines: list[tuple[int, bytes]]) -> Iterator[tuple[int, Pieces]]:
        """Encode some lines; prompts and completions of a block go through the tokenizer together."""
        parsed = [(number, _parsed(number, line)) for number, line in lines if line.strip()]
        pairs = [(number, row) for number, row in parsed if "messages" not in row]
        prompts = self._ids([row["prompt"] for _, row in pairs], special=True)
        completions = self._ids([row["completion"] for _, row in pairs], special=False)
        encoded = {
            number: self._pair(prompt, completion)
            for (number, _), prompt, completion in zip(pairs, prompts, completions, strict=True)
        }
        for number, row in parsed:
            yield number, encoded[number] if number in encoded else self._conversation(number, row)

    def _ids(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _pair(self, prompt: list[int], completion: list[int]) -> Pieces:
        if len(prompt) > 1 and prompt[-1] == self._eos:
            prompt = prompt[:-1]
        if not prompt:  # something has to stand before the first token that is learnt
            prompt = [self._bos if self._bos is not None else self._eos]
        learnt = [*completion, self._eos]
        weights = [self._prompt_loss_weight] * len(prompt) + [1.0] * len(learnt)
        return Pieces(prompt + learnt, weights, len(prompt))

    def _conversation(self, number: int, row: dict[str, Any]) -> Pieces:
        try:
            return Pieces(*self._chat.encode(row))
        except ValueError as error:
            raise TrainingFailure("bad_row", f"Line {number} of the dataset: {error}") from error

    def _fit(self, number: int, pieces: Pieces) -> tuple[Row, bool]:
        """Cut the beginning of the prompt where the row is too long; whether it was."""
        over = len(pieces.ids) - self._max_length
        start = 0
        if over > 0:
            start = over
            if start >= pieces.keep_from:  # at least one token of the prompt has to stay
                raise TrainingFailure(
                    "bad_row",
                    f"Line {number} of the dataset: its completion has {len(pieces.ids) - pieces.keep_from} tokens, and this base "
                    f"model takes {self._max_length} with the prompt; shorten it, or choose a model with a longer context.",
                )
        ids = np.asarray(pieces.ids[start:], dtype=np.int32)
        weights = np.asarray(pieces.weights[start:], dtype=np.float32)
        if start and pieces.ids[0] == self._bos:
            ids[0] = self._bos
        return Row(ids, weights), start > 0


def _parsed(number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except ValueError as error:
        raise TrainingFailure("bad_row", f"Line {number} of the dataset is not JSON: {error}") from error
    whole = isinstance(row, dict) and (
        isinstance(row.get("messages"), list)
        or (isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str))
    )
    if not whole:
        raise TrainingFailure(
            "bad_row", f"Line {number} of the dataset has neither messages nor a prompt and a completion."
        )
    return row  # type: ignore[no-any-return]
