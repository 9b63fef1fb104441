"""Requests in OpenAI's parameter names, checked field by field."""

import json
from dataclasses import dataclass, replace
from typing import Any

from workloads.serve.errors import BadInput

ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
}
"""Parameters that would change the answer, and the values besides null that ask for nothing."""
GREEDY_BELOW = 1e-5
"""Temperatures under it count as 0: dividing by them overflows. vLLM's bound."""
MAX_CHOICES = 4
MAX_PROMPTS = 16
MAX_STOPS = 4
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy."""

    max_tokens: int | None
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int | None

    def nth(self, index: int) -> "Sampling":
        """For one of several choices: a seed of its own, so that they differ."""
        return self if self.seed is None else replace(self, seed=self.seed + index)


@dataclass(frozen=True)
class Payload:
    """A checked request: `messages` for a chat, else `prompts`."""

    messages: list[dict[str, Any]] | None
    prompts: list[str]
    sampling: Sampling
    n: int
    stream: bool
    include_usage: bool


def parse(body: bytes, model: str, *, chat: bool | None) -> Payload:
    """The request in `body`. `chat` None: whichever of `messages` and `prompt` is there. Raises `BadInput`."""
    data = _object(body)
    named = data.get("model")
    if named is not None and named != model:
        raise BadInput(
            f"this server has the model {model!r}, not {str(named)[:200]!r}",
            param="model",
            status=404,
            code="model_not_found",
        )
    if chat is None:
        if ("messages" in data) == ("prompt" in data):
            raise BadInput("give either messages (chat) or prompt (completion)")
        chat = "messages" in data
    for name, neutral in UNSUPPORTED.items():
        value = data.get(name)
        if value is not None and not any(
            value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral
        ):
            raise BadInput(f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    options = data.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadInput("stream_options must be an object", param="stream_options")
    return Payload(
        messages=_messages(data) if chat else None,
        prompts=[] if chat else _prompts(data),
        sampling=_sampling(data),
        n=_integer(data, "n", 1, 1, MAX_CHOICES) or 1,
        stream=_boolean(data, "stream"),
        include_usage=bool(options.get("include_usage")),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise BadInput("the body is not JSON") from None
    if not isinstance(data, dict):
        raise BadInput("the body must be a JSON object")
    return data


def _messages(data: dict[str, Any]) -> list[dict[str, Any]]:
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadInput("messages must be a non-empty list", param="messages")
    return [_message(message, f"messages.{n}") for n, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadInput(f"{where} must be an object whose role is one of {', '.join(sorted(ROLES))}", param=where)
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise BadInput(f"{where}.content may hold text parts only", param=f"{where}.content")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise BadInput(f"{where}.content must be a string or a list of text parts", param=f"{where}.content")
    return {"role": message["role"], "content": _encodable(content, f"{where}.content")}


def _prompts(data: dict[str, Any]) -> list[str]:
    prompt = data.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise BadInput("prompt must be a string or a non-empty list of strings", param="prompt")
    if len(prompts) > MAX_PROMPTS:
        raise BadInput(f"at most {MAX_PROMPTS} prompts at a time", param="prompt")
    return [_encodable(p, "prompt") for p in prompts]


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where} has characters that are not Unicode text", param=where) from None
    return text


def _sampling(data: dict[str, Any]) -> Sampling:
    newer = "max_completion_tokens" if data.get("max_completion_tokens") is not None else "max_tokens"
    temperature = _number(data, "temperature", 1.0, 0.0, 2.0)
    return Sampling(
        max_tokens=_integer(data, newer, None, 1, 1_000_000),
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=_number(data, "top_p", 1.0, 0.0, 1.0),
        stop=_stop(data.get("stop")),
        seed=_integer(data, "seed", None, -(2**63), 2**63 - 1),
    )


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise BadInput(f"stop must be a string, or up to {MAX_STOPS} non-empty strings", param="stop")
    return tuple(stops)


def _integer(data: dict[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"{name} must be a whole number from {low} to {high}", param=name)
    return value


def _number(data: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"{name} must be a number from {low:g} to {high:g}", param=name)
    return float(value)


def _boolean(data: dict[str, Any], name: str) -> bool:
    value = data.get(name)
    if value not in (None, True, False):
        raise BadInput(f"{name} must be true or false", param=name)
    return bool(value)
