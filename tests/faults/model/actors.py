"""What both models have in common: handlers, relays and watchers that run at once, may crash anywhere, and read a log again."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from tests.faults.model.kernel import Call, Model, Programs, Thread

Steps = Iterator[tuple[str, Any]]


class Actors:
    """Every step that a world may take. The world has `threads`, `faults`, `log`, `journal` and `offsets`."""

    READERS: ClassVar[tuple[str, ...]]
    """The consumers, in the order of the world's `offsets`."""
    TAKES = 1000
    """Events that a reader takes at once, at most."""
    FAIR: ClassVar[tuple[str, ...]]
    """Who goes first when nothing goes wrong any more."""

    def __init__(self, slots: Sequence[str], programs: Programs, *, acknowledges_first: bool = False) -> None:
        """`slots`: who runs, one name twice for two at once; with a `!` it does its work in one step, and nothing comes between.

        `acknowledges_first` is a seeded bug.
        """
        self._slots = [(slot.rstrip("!"), slot.endswith("!")) for slot in slots]
        self._programs, self._acknowledges_first = programs, acknowledges_first

    # --- what each model says

    def answers(self, world: Any, call: Call, *, fair: bool) -> Iterator[tuple[str, Any, Any]]:
        raise NotImplementedError

    def surroundings(self, world: Any) -> Steps:
        """What happens around the studio, faults among it."""
        raise NotImplementedError

    def fair_surroundings(self, world: Any) -> Steps:
        raise NotImplementedError

    def due(self, world: Any, name: str) -> bool:
        """Whether that one has something to do."""
        raise NotImplementedError

    def done(self, world: Any, thread: Thread) -> Any:
        """The world after a thread's end."""
        return world

    # --- steps

    def steps(self, world: Any) -> Steps:
        for slot, (name, whole) in enumerate(self._slots):
            thread = world.threads[slot]
            if thread is None:
                yield from self._begins(world, slot, name, whole=whole)
            else:
                yield from self._goes_on(world, slot, thread)
        yield from self.surroundings(world)
        if world.log and (left := world.faults.spend("broker")):
            refilled = world._replace(faults=left, log=world.journal, offsets=(0,) * len(world.offsets))
            yield "the log is lost and refilled", refilled
        for reader, offset in enumerate(world.offsets):
            if self.READERS[reader] in dict(self._slots) and (left := world.faults.spend("again")):
                for earlier in range(offset):
                    back = _with_offset(world._replace(faults=left), reader, earlier)
                    yield f"{self.READERS[reader]} reads on from {earlier} again", back

    def _begins(self, world: Any, slot: int, name: str, *, whole: bool) -> Steps:
        thread = self._next_thread(world, name)
        if thread is None:
            return
        if whole:
            for note, after in self._whole_run(world, thread):
                yield f"{name}{note}", after
        else:
            after = self._acknowledged(world, thread) if self._acknowledges_first else world
            yield f"{name} begins", _placed(after, slot, thread)

    def _next_thread(self, world: Any, name: str) -> Thread | None:
        if name in self.READERS:
            offset = world.offsets[self.READERS.index(name)]
            taken = world.log[offset : offset + self.TAKES]
            return Thread(name, (offset, taken)) if taken else None
        return Thread(name, ()) if self.due(world, name) else None

    def _goes_on(self, world: Any, slot: int, thread: Thread) -> Steps:
        call, who = self._programs.next_call(thread), f"{thread.program}[{slot}]"
        if call is None:
            yield f"{who} is done", self._finished(_placed(world, slot, None), thread)
        else:
            for note, after, result in self.answers(world, call, fair=False):
                yield f"{who} {_said(call)}{note}", _placed(after, slot, thread.answered(result))
        if left := world.faults.spend("crash"):
            after = _placed(world._replace(faults=left), slot, None)
            yield f"{who} crashes before {call.name if call else 'it acknowledges'}", after

    def _whole_run(self, world: Any, thread: Thread) -> Steps:
        call = self._programs.next_call(thread)
        if call is None:
            yield "", self._finished(world, thread)
            return
        for note, after, result in self.answers(world, call, fair=False):
            for more, end in self._whole_run(after, thread.answered(result)):
                yield f" {note}{more}".rstrip(), end

    def _finished(self, world: Any, thread: Thread) -> Any:
        after = self.done(world, thread)
        return after if self._acknowledges_first else self._acknowledged(after, thread)

    def _acknowledged(self, world: Any, thread: Thread) -> Any:
        """What was read is done with; who was overtaken changes nothing."""
        if thread.program not in self.READERS:
            return world
        reader, (first, ids) = self.READERS.index(thread.program), thread.args
        end = min(len(world.log), first + len(ids))
        return _with_offset(world, reader, max(world.offsets[reader], end))

    # --- and when nothing goes wrong any more

    def fair(self, world: Any, but_for: str = "") -> tuple[str, Any] | None:
        """What is under way goes on; then its surroundings; then whoever has work that changes something."""
        for slot, thread in enumerate(world.threads):
            if thread is not None:
                call = self._programs.next_call(thread)
                if call is None:
                    return f"{thread.program} is done", self._finished(_placed(world, slot, None), thread)
                _, after, result = next(self.answers(world, call, fair=True))
                return f"{thread.program} {_said(call)}", _placed(after, slot, thread.answered(result))
        for label, after in self.fair_surroundings(world):
            return label, after
        for name in self.FAIR:
            thread = None if name == but_for else self._next_thread(world, name)
            if thread is not None and (after := self._fair_run(world, thread)) != world:
                return name, after
        return None

    def _fair_run(self, world: Any, thread: Thread) -> Any:
        while (call := self._programs.next_call(thread)) is not None:
            _, world, result = next(self.answers(world, call, fair=True))
            thread = thread.answered(result)
        return self._finished(world, thread)

    def until(self, world: Any, reached: Callable[[Any], bool], but_for: str) -> Any:
        """The world when all has gone well so far, and one of them has not begun."""
        while not reached(world):
            step = self.fair(world, but_for)
            assert step is not None, "it does not get there"
            world = step[1]
        return world

    def until_done(self, world: Any, name: str) -> Any:
        """The world after that one's whole turn."""
        return self._fair_run(world, Thread(name, ()))

    def model(self, wrong: Any, wrong_step: Any, wrong_end: Any, reached: Any) -> Model:
        return Model(self.steps, self.fair, wrong, wrong_step, wrong_end, reached)


def _said(call: Call) -> str:
    return f"{call.name}({', '.join(str(a) for a in call.args if isinstance(a, str | int))})"


def _placed(world: Any, slot: int, thread: Thread | None) -> Any:
    return world._replace(threads=(*world.threads[:slot], thread, *world.threads[slot + 1 :]))


def _with_offset(world: Any, reader: int, offset: int) -> Any:
    return world._replace(offsets=(*world.offsets[:reader], offset, *world.offsets[reader + 1 :]))
