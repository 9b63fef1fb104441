"""Generation with continuous batching: one thread steps a batch of sequences; new ones join between steps, finished ones leave.

The batch's key/value cache is one tensor pair per layer, padded on the left: rows [batch, heads, length, head size].
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from workloads.serve.errors import BadInput, Overloaded
from workloads.serve.payload import DEFAULT_MAX_TOKENS, Sampling
from workloads.serve.text import Detokenizer

MAX_BATCH = 16
MAX_WAITING = 256


@dataclass(frozen=True)
class Piece:
    """A part of an answer; the last one has a `finish_reason`."""

    text: str
    tokens: int
    finish_reason: str | None = None


@dataclass
class Sequence_:
    prompt: list[int]
    sampling: Sampling
    limit: int
    emit: Callable[[Piece | Exception], None]
    text: Detokenizer
    generator: torch.Generator | None
    cancelled: bool = False
    generated: int = 0
    last: int = 0


@dataclass
class Batch:
    """The running sequences and their padded cache."""

    rows: list[Sequence_] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    mask: torch.Tensor | None = None

    def join(self, row: Sequence_, cache: Any, length: int) -> None:
        keys = [layer.keys for layer in cache.layers]
        values = [layer.values for layer in cache.layers]
        mask = torch.ones(1, length, dtype=torch.long)
        if self.mask is None:
            self.keys, self.values, self.mask = keys, values, mask
        else:
            width = max(length, self.mask.shape[1])
            self.keys = [_cat(old, new, width) for old, new in zip(self.keys, keys, strict=True)]
            self.values = [_cat(old, new, width) for old, new in zip(self.values, values, strict=True)]
            self.mask = torch.cat([_pad(self.mask, width, 1), _pad(mask, width, 1)])
        self.rows.append(row)

    def keep(self, kept: list[int]) -> None:
        """Drop the other rows, and the padding that no row needs any more."""
        self.rows = [self.rows[n] for n in kept]
        if not kept or self.mask is None:
            self.keys, self.values, self.mask = [], [], None
            return
        index = torch.tensor(kept)
        self.mask = self.mask[index]
        spare = int((self.mask.sum(0) == 0).sum())
        self.mask = self.mask[:, spare:]
        self.keys = [tensor[index][:, :, spare:] for tensor in self.keys]
        self.values = [tensor[index][:, :, spare:] for tensor in self.values]


def _pad(tensor: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    missing = width - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim)


def _cat(old: torch.Tensor, new: torch.Tensor, width: int) -> torch.Tensor:
    return torch.cat([_pad(old, width, 2), _pad(new, width, 2)])


class Engine:
    """Serves one loaded model. `submit` is for the event loop; everything else runs in the engine's thread."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.context = int(getattr(model.config, "max_position_embeddings", 2048))
        self.prompt_tokens = self.generation_tokens = self.finished = 0
        self._model = model
        self._stop_tokens = stop_tokens(model, tokenizer)
        self._waiting: queue.Queue[Sequence_] = queue.Queue()
        self._batch = Batch()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._waiting.qsize()

    @property
    def running(self) -> int:
        return len(self._batch.rows)

    def encode_prompt(self, prompt: str) -> list[int]:
        """As the trainer encoded prompts: the tokenizer's own special tokens, without an end."""
        tokens = list(self.tokenizer(prompt)["input_ids"])
        while tokens and tokens[-1] in self._stop_tokens:
            tokens.pop()
        return tokens or [self.tokenizer.bos_token_id or 0]

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise BadInput("this model has no chat template; send prompt instead of messages", param="messages")
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:
            raise BadInput(f"the model's chat template refuses these messages: {error}", param="messages") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def submit(self, prompt: list[int], sampling: Sampling) -> "Answer":
        """Queue one sequence. Raises `BadInput` when it does not fit, `Overloaded` when too many wait."""
        room = self.context - len(prompt)
        if room < 1 or (sampling.max_tokens or 1) > room:
            wanted = f" and {sampling.max_tokens} were asked for" if sampling.max_tokens else ""
            raise BadInput(
                f"the model's context is {self.context} tokens; the prompt has {len(prompt)}{wanted}",
                param="max_tokens" if room >= 1 else "prompt",
                code="context_length_exceeded",
            )
        if self._waiting.qsize() >= MAX_WAITING:
            raise Overloaded
        answer = Answer(asyncio.get_running_loop())
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator()
            generator.manual_seed(sampling.seed & (2**63 - 1)) if sampling.seed is not None else generator.seed()
        limit = sampling.max_tokens or min(room, DEFAULT_MAX_TOKENS)
        text = Detokenizer(lambda tokens: str(self.tokenizer.decode(tokens, skip_special_tokens=True)), sampling.stop)
        answer.sequence = Sequence_(prompt, sampling, limit, answer.emit, text, generator)
        self._waiting.put(answer.sequence)
        return answer

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                try:
                    self._turn()
                except Exception as error:
                    for row in self._batch.rows:
                        row.emit(error)
                    self._batch = Batch()

    def _turn(self) -> None:
        while len(self._batch.rows) < MAX_BATCH:
            try:
                row = self._waiting.get(block=not self._batch.rows)
            except queue.Empty:
                break
            if not row.cancelled:
                self._prefill(row)
        if self._batch.rows:
            self._step()

    def _prefill(self, row: Sequence_) -> None:
        try:
            cache = DynamicCache()
            output = self._model(input_ids=torch.tensor([row.prompt]), past_key_values=cache, use_cache=True)
            self.prompt_tokens += len(row.prompt)
            if self._take(row, output.logits[0, -1]):
                self._batch.join(row, cache, len(row.prompt))
        except Exception as error:
            row.emit(error)

    def _step(self) -> None:
        batch = self._batch
        assert batch.mask is not None  # noqa: S101  # there are rows
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
            cache.update(keys, values, layer)
        positions = batch.mask.sum(1, keepdim=True)
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], 1)
        tokens = torch.tensor([[row.last] for row in batch.rows])
        output = self._model(
            input_ids=tokens, attention_mask=batch.mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        batch.keys = [layer.keys for layer in cache.layers]
        batch.values = [layer.values for layer in cache.layers]
        kept = [n for n, row in enumerate(batch.rows) if self._goes_on(row, output.logits[n, -1])]
        if len(kept) < len(batch.rows):
            batch.keep(kept)

    def _goes_on(self, row: Sequence_, logits: torch.Tensor) -> bool:
        """`_take`, whose failure ends this row only."""
        try:
            return self._take(row, logits)
        except Exception as error:
            row.emit(error)
            return False

    def _take(self, row: Sequence_, logits: torch.Tensor) -> bool:
        """Choose the row's next token and emit its text; whether the row goes on."""
        if row.cancelled:
            return False
        token = choose(logits, row.sampling, row.generator)
        if token in self._stop_tokens:
            self._end(row, "stop", row.generated)
            return False
        row.generated, row.last = row.generated + 1, token
        self.generation_tokens += 1
        text = row.text.push(token)
        if row.text.stopped or row.generated >= row.limit:
            self._end(row, "stop" if row.text.stopped else "length", row.generated, text)
            return False
        row.emit(Piece(text, row.generated))
        return True

    def _end(self, row: Sequence_, reason: str, tokens: int, text: str = "") -> None:
        text += row.text.finish()
        self.finished += 1
        row.emit(Piece(text, tokens, "stop" if row.text.stopped else reason))


class Answer:
    """The pieces of one sequence, as they come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.sequence: Sequence_ | None = None
        self._loop = loop
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def emit(self, piece: Piece | Exception) -> None:
        """From the engine's thread."""
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self) -> Piece:
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return piece

    def cancel(self) -> None:
        """Nobody reads on: the sequence leaves the batch at its next step."""
        if self.sequence is not None:
            self.sequence.cancelled = True


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """Greedy at temperature 0, else from the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020)."""
    if sampling.temperature == 0 or generator is None or sampling.top_p == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, by the model's generation settings and by its tokenizer."""
    found: set[int] = set()
    for ids in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found |= set(ids) if isinstance(ids, Sequence) else {ids} if ids is not None else set()
    return frozenset(found)
