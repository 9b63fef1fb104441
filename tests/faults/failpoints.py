"""Fail-points before and after every await of the code that does the studio's work, put there as its modules are imported.

Nothing of this is in the product: `install` adds an import hook to a process of a test, which compiles the modules listed here with
every `await`, `async with` and `async for` wrapped. A point is named after its place, without line numbers:

    consumers.training:claim#2:before             the second await of that function, before it starts
    api.submissions:receiving#1.exit:after        what an `async with` awaits at its end, after that

The armed point kills its own process with SIGKILL, as it is passed the k-th time.
"""

import ast
import importlib.util
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INSTRUMENTED = (
    "api/**/*.py",
    "consumers/**/*.py",
    "mini_studio/ingest.py",
    "mini_studio/bus/*.py",
    "mini_studio/records/*.py",
)
"""Handlers, relay, consumers and reconcilers, and what they do their I/O through."""
LEFT_OUT = {
    "api.gateway": "what proxies keeps nothing: with the process its connections end, and their callers ask again",
    "mini_studio.bus.connection": "asks brokers why they let a client not in, and changes nothing",
    "mini_studio.bus.kafka": "the Kafka client: what it is asked for is awaited by the relay and by delivery, which have points",
    "mini_studio.bus.liveness": "a meter, which changes nothing",
    "mini_studio.bus.reading": "reads whole topics into memory and changes nothing",
    "mini_studio.bus.replay": "runs while the broker is prepared, before there are handlers",
    "mini_studio.bus.routes": "the gateways' feed, which reads the log into memory and changes nothing",
    "mini_studio.bus.usage": "the gateways' way to the usage topic, at most once: what a kill takes with it is lost by design",
    "mini_studio.bus.wakeups": "hints: one that is lost costs the wait for the next look at the load",
    "mini_studio.records.mongo": "a store: each of its writes is of one document; test_journal_writers kills those of its journal",
    "mini_studio.records.shadow": "replay, which tests/replay kills at each of its bulk writes",
    "mini_studio.records.sqlite": "the store: awaited by the repositories, which have points; its write is one SQLite transaction",
    "mini_studio.records.store": "the port; what pages through a collection there is read by replay, refill and migration alone",
}
"""Modules of those folders without points, packages with all that is in them, with the reason."""
SIDES = ("before", "after")


def modules() -> dict[str, Path]:
    """The modules that get points, with their files."""
    files = {file for pattern in INSTRUMENTED for file in ROOT.glob(pattern)}
    named = {_module_of(file): file for file in sorted(files)}
    return {name: file for name, file in named.items() if not any(f"{name}.".startswith(f"{out}.") for out in LEFT_OUT)}


def _module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


class Wrapper(ast.NodeTransformer):
    """Wraps every await of a module, and names it."""

    def __init__(self, module: str) -> None:
        self.names: list[str] = []
        self._module = module
        self._scope: list[str] = []
        self._count: Counter[str] = Counter()

    def _scoped(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> ast.AST:
        self._scope.append(node.name)
        self.generic_visit(node)
        self._scope.pop()
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _scoped

    def visit_Await(self, node: ast.Await) -> ast.AST:
        node.value = self._wrapped("_awaited", self._named(""), node.value)
        self.generic_visit(node)
        return node

    def visit_AsyncWith(self, node: ast.AsyncWith) -> ast.AST:
        for item in node.items:
            item.context_expr = self._wrapped("_entered", self._named(".enter", ".exit"), item.context_expr)
        self.generic_visit(node)
        return node

    def visit_AsyncFor(self, node: ast.AsyncFor) -> ast.AST:
        node.iter = self._wrapped("_iterated", self._named(".next"), node.iter)
        self.generic_visit(node)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        if node.is_async:
            node.iter = self._wrapped("_iterated", self._named(".next"), node.iter)
        self.generic_visit(node)
        return node

    def _named(self, *parts: str) -> str:
        place = f"{self._module}:{'.'.join(self._scope)}"
        self._count[place] += 1
        name = f"{place}#{self._count[place]}"
        self.names += [name + part for part in parts]
        return name

    @staticmethod
    def _wrapped(wrapper: str, name: str, awaited: ast.expr) -> ast.expr:
        call = ast.Call(ast.Name(wrapper, ast.Load()), [ast.Constant(name), awaited], [])
        return ast.fix_missing_locations(ast.copy_location(call, awaited))


def wrapped(source: str, module: str) -> tuple[ast.Module, list[str]]:
    """The module with its awaits wrapped, and their names."""
    wrapper = Wrapper(module)
    return wrapper.visit(ast.parse(source)), wrapper.names


@cache
def points() -> tuple[str, ...]:
    """Every point that there is in the code as it stands."""
    awaits = [name for module, file in modules().items() for name in wrapped(file.read_text(), module)[1]]
    return tuple(f"{name}:{side}" for name in awaits for side in SIDES)


class Board:
    """Which point is armed, and how often each was passed: shared with the processes that are forked, and survives them."""

    def __init__(self) -> None:
        self._numbers = {point: number for number, point in enumerate(points())}
        self.renew()

    def renew(self) -> None:
        """Share it no more with those it was shared with so far."""
        self._armed = RawArray("i", [-1, 0])
        self._passed = RawArray("i", len(self._numbers))

    def arm(self, point: str, times: int = 1) -> None:
        """Have the next process that passes the point die, the `times`-th time."""
        self._armed[1] = times
        self._armed[0] = self._numbers[point]

    def disarm(self) -> None:
        self._armed[0] = -1

    def passed(self) -> dict[str, int]:
        """How often each point was passed since the last call; those that were not are left out."""
        counts = {point: self._passed[number] for point, number in self._numbers.items() if self._passed[number]}
        for number in self._numbers.values():
            self._passed[number] = 0
        return counts

    def reach(self, point: str) -> None:
        number = self._numbers[point]
        self._passed[number] += 1
        if self._armed[0] == number:
            self._armed[1] -= 1
            if self._armed[1] == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class _Hooks:
    """What the wrapped modules call. A point's "after" is passed however the await ended: it may have been an error."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def names(self) -> dict[str, Any]:
        return {"_awaited": self.awaited, "_entered": self.entered, "_iterated": self.iterated}

    async def awaited(self, name: str, awaitable: Awaitable[Any]) -> Any:
        self._board.reach(f"{name}:before")
        try:
            return await awaitable
        finally:
            self._board.reach(f"{name}:after")

    def entered(self, name: str, context: AbstractAsyncContextManager[Any]) -> "_Context":
        return _Context(self, name, context)

    async def iterated(self, name: str, iterable: AsyncIterable[Any]) -> AsyncIterator[Any]:
        iterator = aiter(iterable)
        while True:
            try:
                item = await self.awaited(f"{name}.next", anext(iterator))
            except StopAsyncIteration:
                return
            yield item


class _Context:
    def __init__(self, hooks: _Hooks, name: str, context: AbstractAsyncContextManager[Any]) -> None:
        self._hooks, self._name, self._context = hooks, name, context

    async def __aenter__(self) -> Any:
        return await self._hooks.awaited(f"{self._name}.enter", self._context.__aenter__())

    async def __aexit__(self, *error: Any) -> bool | None:
        return await self._hooks.awaited(f"{self._name}.exit", self._context.__aexit__(*error))


class _Loader(SourceFileLoader):
    """Compiles the source anew, wrapped, whatever compiled files there are."""

    def __init__(self, name: str, file: Path, hooks: _Hooks) -> None:
        super().__init__(name, str(file))
        self._hooks = hooks

    def get_code(self, fullname: str) -> CodeType:
        tree, _ = wrapped(self.get_data(self.path).decode(), fullname)
        return compile(tree, self.path, "exec")

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._hooks.names())
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, board: Board) -> None:
        self._files = modules()
        self._hooks = _Hooks(board)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self._files.get(fullname)
        if file is None:
            return None
        inside = [str(file.parent)] if file.name == "__init__.py" else None
        loader = _Loader(fullname, file, self._hooks)
        return importlib.util.spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=inside)


def install(board: Board) -> None:
    """Have this process, and those forked of it, pass points. None of the modules may have been imported before."""
    early = modules().keys() & sys.modules.keys()
    if early:
        raise RuntimeError(f"imported without points already: {sorted(early)}")
    sys.meta_path.insert(0, _Finder(board))


def installed() -> Iterator[str]:
    """Those of the listed modules that this process has with points."""
    return (name for name in modules() if isinstance(getattr(sys.modules.get(name), "__loader__", None), _Loader))
