"""Runs real coroutines through every order of their steps, and every crash between two of them.

A coroutine is run until its first I/O and no further; it says what it wants (a `Call`), the model says in which ways the world may
answer. A coroutine that always does the same with the same answers is told apart by these alone: so `Thread` is program,
arguments and answers, a world that contains threads can be hashed, and a step is to run the coroutine again from its
start with one answer more. What comes after given answers is remembered.
"""

from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from mini_studio.errors import StudioError
from mini_studio.records.store import DuplicateRecord

MOST_STEPS = 2000
"""A fair run is over by then, or never."""


class Call(NamedTuple):
    """One I/O that a coroutine waits for."""

    name: str
    args: tuple[Any, ...]


class Thread(NamedTuple):
    """A coroutine on its way."""

    program: str
    args: tuple[Any, ...]
    answers: tuple[Any, ...] = ()

    def answered(self, answer: Any) -> "Thread":
        return self._replace(answers=(*self.answers, answer))


@dataclass(frozen=True)
class Raised:
    """An answer that is an error."""

    kind: type[Exception]
    said: str

    def error(self) -> Exception:
        return self.kind(self.said)


class Io:
    def __init__(self, call: Call) -> None:
        self._call = call

    def __await__(self) -> Generator[Call, Any, Any]:
        return (yield self._call)


async def io(name: str, *args: Any) -> Any:
    """Wait for the model's answer. Arguments and answers are hashable."""
    return await Io(Call(name, args))


class Programs:
    """What threads run, by name."""

    def __init__(self, makers: dict[str, Callable[..., Coroutine[Any, Any, Any]]]) -> None:
        self._makers = makers
        self._next: dict[Thread, Call | None] = {}

    def next_call(self, thread: Thread) -> Call | None:
        """What the thread waits for; None when it has ended."""
        if thread not in self._next:
            self._next[thread] = self._run(thread)
        return self._next[thread]

    def _run(self, thread: Thread) -> Call | None:
        coroutine = self._makers[thread.program](*thread.args)
        try:
            call: Call = coroutine.send(None)
            for answer in thread.answers:
                call = coroutine.throw(answer.error()) if isinstance(answer, Raised) else coroutine.send(answer)
            return call
        except StopIteration:
            return None
        except (StudioError, DuplicateRecord, OSError):
            return None  # whoever called it logs that, and its next turn tries again
        finally:
            coroutine.close()


W = TypeVar("W", bound=NamedTuple)


class Violation(AssertionError):
    """Something that must never be, and how it came to be."""

    def __init__(self, what: str, trace: Iterable[str]) -> None:
        self.what, self.trace = what, list(trace)
        super().__init__("\n  ".join([what, *self.trace]))


@dataclass
class Explored:
    states: int = 0
    transitions: int = 0
    complete: bool = False
    """Whether there is no state beside these; False: the search stopped at its bound."""
    fair_runs: int = 0
    reached: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        end = "all there are" if self.complete else "the bound"
        counts = f"{self.states} states ({end}), {self.transitions} transitions, {self.fair_runs} fair runs"
        return f"{counts}; {', '.join(f'{name}: {count}' for name, count in sorted(self.reached.items()))}"


@dataclass
class Model:
    """What the search is given."""

    steps: Callable[[Any], Iterator[tuple[str, Any]]]
    """Every step that may come next, faults among them, with the world after it."""
    fair: Callable[[Any], tuple[str, Any] | None]
    """The next step when nothing goes wrong any more; None: there is nothing left to do."""
    wrong: Callable[[Any], str | None]
    """What must never be and is."""
    wrong_step: Callable[[Any, Any], str | None]
    wrong_end: Callable[[Any], str | None]
    """What must not be left when nothing is left to do."""
    reached: Callable[[Any], str]
    """Where a world is, in a word: says how far the search got."""
    ends_well: set[Any] = field(default_factory=set)


def explore(model: Model, start: Any, limit: int) -> Explored:
    """Breadth first, so a violation comes with a shortest way to it. From every state a fair run must end well."""
    came: dict[Any, tuple[Any, str]] = {start: (None, "")}
    waiting, done = deque([start]), Explored()
    while waiting and done.states < limit:
        world = waiting.popleft()
        done.states += 1
        done.reached[model.reached(world)] += 1
        done.fair_runs += _fair_run(model, world, came)
        for label, after in model.steps(world):
            done.transitions += 1
            if (what := model.wrong_step(world, after)) is not None:
                raise Violation(what, [*_trace(came, world), label])
            if after in came:
                continue
            came[after] = (world, label)
            if (what := model.wrong(after)) is not None:
                raise Violation(what, _trace(came, after))
            waiting.append(after)
    done.complete = not waiting
    return done


def _fair_run(model: Model, start: Any, came: dict[Any, tuple[Any, str]]) -> int:
    """Run to the end without further faults, or until a state from which that was done before."""
    path, labels, world = [], [], start
    while world not in model.ends_well:
        path.append(world)
        step = model.fair(world)
        if step is None:
            if (what := model.wrong_end(world)) is not None:
                raise Violation(what, [*_trace(came, start), "-- and then nothing goes wrong any more --", *labels])
            break
        if len(path) > MOST_STEPS:
            raise Violation("it never ends", [*_trace(came, start), "-- fair --", *labels[-60:]])
        label, after = step
        labels.append(label)
        if (what := model.wrong_step(world, after) or model.wrong(after)) is not None:
            raise Violation(what, [*_trace(came, start), "-- fair --", *labels])
        world = after
    model.ends_well.update(path)
    return bool(path)


def _trace(came: dict[Any, tuple[Any, str]], world: Any) -> list[str]:
    labels: list[str] = []
    while came[world][0] is not None:
        world, label = came[world]
        labels.append(label)
    return labels[::-1]
