"""From tokens to text as it comes: no broken characters, and never a part of a stop string."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"


class Detokenizer:
    """Turns the tokens of one answer into pieces of text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._decode = decode
        self._stops = stops
        self._tokens: list[int] = []
        self._context = 0
        """Tokens before this one are final; those from here on are decoded together with the next."""
        self._read = 0
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._read])
        now = self._decode(self._tokens[self._context :])
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """What is left when no more tokens come."""
        before = self._decode(self._tokens[self._context : self._read])
        now = self._decode(self._tokens[self._context :])
        rest = self._release(now[len(before) :]) if len(now) > len(before) else ""
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
