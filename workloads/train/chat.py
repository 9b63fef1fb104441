"""Chat rows: the base model's template, and which of its tokens are learnt.

A message's place in the rendered conversation is found by rendering the conversation up to it, with the template's opening of an
assistant message, and up to and including it. A template that changes earlier text as a conversation grows is handled by
looking for the message's text instead.
"""

import json
from typing import Any

from workloads.base_models.chat import chatml

Message = dict[str, Any]


class ChatEncoder:
    """Encodes conversations; gives a tokenizer without a chat template a plain one, at the first conversation."""

    def __init__(self, tokenizer: Any, prompt_loss_weight: float) -> None:
        self._tokenizer = tokenizer
        self._prompt_loss_weight = prompt_loss_weight

    def encode(self, row: dict[str, Any]) -> tuple[list[int], list[float], int]:
        """Token ids, their weights, and where the last learnt message starts. Raises `ValueError` for a bad row."""
        if not self._tokenizer.chat_template:
            self._tokenizer.chat_template = chatml(self._tokenizer.eos_token)
        messages = [self._plain(message) for message in row["messages"]]
        tools = row.get("tools") or None
        text = self._render(messages, tools)
        spans = list(self._spans(messages, tools, text))
        wanted = [float(message.get("weight", 1)) for message in row["messages"] if message["role"] == "assistant"]
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return self._weigh(text, encoded, list(zip(spans, wanted, strict=True)))

    def _weigh(
        self, text: str, encoded: Any, spans: list[tuple[tuple[int, int], float]]
    ) -> tuple[list[int], list[float], int]:
        ids: list[int] = list(encoded["input_ids"])
        weights = [self._prompt_loss_weight] * len(ids)
        learnt_from = 0
        for (start, end), weight in spans:
            inside = [
                index for index, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start and b > a
            ]
            for index in inside:
                weights[index] = weight
            if inside and weight > 0:
                learnt_from = inside[0]
        closing_weight = spans[-1][1] if spans and not text[spans[-1][0][1] :].strip() else None
        if closing_weight is not None and not self._closed(ids):
            ids.append(self._tokenizer.eos_token_id)
            weights.append(closing_weight)
        return ids, weights, learnt_from

    def _closed(self, ids: list[int]) -> bool:
        """Whether the template ends a message with a special token, by which the model learns to stop."""
        special = set(self._tokenizer.all_special_ids)
        tail = [index for index in ids[-3:] if index in special]
        return bool(tail)

    def _spans(self, messages: list[Message], tools: Any, text: str) -> Any:
        """The characters of each assistant message, its end-of-turn token included."""
        cursor = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            span = self._rendered_span(messages, index, tools, text) or _found(text, message["content"], cursor)
            cursor = span[1]
            yield span

    def _rendered_span(self, messages: list[Message], index: int, tools: Any, text: str) -> tuple[int, int] | None:
        if index == 0:
            return None
        try:
            before = self._render(messages[:index], tools, opened=True)
            after = self._render(messages[: index + 1], tools)
        except ValueError:
            return None
        if not (text.startswith(before) and text.startswith(after) and len(after) > len(before)):
            return None
        # what follows the end-of-turn token is never written by the model: it has stopped by then
        return len(before), len(before) + len(after[len(before) :].rstrip())

    def _render(self, messages: list[Message], tools: Any, *, opened: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=opened
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the base model's chat template does not take it: {error}") from error
        return text

    def _plain(self, message: Message) -> Message:
        """Content as one string; tool calls inside it where the template would leave them out."""
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
        plain = {key: value for key, value in message.items() if key != "weight"} | {"content": content or ""}
        legacy = plain.pop("function_call", None)
        calls = message.get("tool_calls") or ([{"type": "function", "function": legacy}] if legacy else None)
        if calls and "tool_calls" in str(self._tokenizer.chat_template):
            plain["tool_calls"] = calls
        elif calls:
            plain.pop("tool_calls", None)
            plain["content"] = (plain["content"] + "\n" + json.dumps(calls)).strip()
        return plain


def _found(text: str, content: str, cursor: int) -> tuple[int, int]:
    start = text.find(content.strip(), cursor)
    if start < 0:
        raise ValueError("the base model's chat template leaves an assistant message out")
    return start, start + len(content.strip())
