"""The points are all there, wherever the code awaits, and only where a test asked for them."""

import ast
import subprocess
import sys
from importlib import import_module

from tests.faults import failpoints
from tests.faults.failpoints import INSTRUMENTED, LEFT_OUT, ROOT, modules, points, wrapped

HOOKED = """
from tests.faults.board import BOARD
from tests.faults.failpoints import installed, modules
from importlib import import_module
for name in modules(): import_module(name)
assert set(installed()) == set(modules()), set(modules()) - set(installed())
"""
KILLED = """
from tests.faults.board import BOARD
import asyncio
from consumers.watchers import turn
async def look(): return 0.0
BOARD.arm("consumers.watchers:turn#1:after", 3)
asyncio.run(turn(look, asyncio.Event()))
"""


def awaits(source: str) -> int:
    """How often the source waits, counted in another way than the points are."""
    count = 0
    for node in ast.walk(ast.parse(source)):
        count += isinstance(node, ast.Await | ast.AsyncFor) or (isinstance(node, ast.comprehension) and node.is_async)
        count += 2 * len(node.items) if isinstance(node, ast.AsyncWith) else 0
    return count


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT, capture_output=True, text=True)


def test_every_await_has_two_points_with_names_of_their_own() -> None:
    expected = {name: awaits(file.read_text()) for name, file in modules().items()}
    found = dict.fromkeys(modules(), 0) | {}
    for point in points():
        found[point.partition(":")[0]] += 1
    assert found == {name: 2 * count for name, count in expected.items()}
    assert len(set(points())) == len(points()) > 400


def test_what_is_left_out_is_there_and_has_awaits() -> None:
    files = {failpoints._module_of(file): file for pattern in INSTRUMENTED for file in ROOT.glob(pattern)}
    assert not LEFT_OUT.keys() - files.keys()
    for out in LEFT_OUT:
        parts = [file for name, file in files.items() if f"{name}.".startswith(f"{out}.")]
        assert any(awaits(file.read_text()) for file in parts), out


def test_a_new_await_gets_points() -> None:
    before = "class A:\n    async def f(self):\n        await g()\n"
    after = before + "        async with h() as x:\n            return [y async for y in x]\n"
    assert wrapped(before, "m")[1] == ["m:A.f#1"]
    assert wrapped(after, "m")[1] == ["m:A.f#1", "m:A.f#2.enter", "m:A.f#2.exit", "m:A.f#3.next"]


def test_the_hook_puts_points_into_every_module() -> None:
    done = run(HOOKED)
    assert done.returncode == 0, done.stderr


def test_an_armed_point_kills_its_process_the_time_it_was_told() -> None:
    assert run(KILLED).returncode == -9
    assert run(KILLED.replace("3)", "1)\nBOARD.disarm()").replace("0.0", "exit(7)")).returncode == 7


def test_the_product_has_none() -> None:
    for name in modules():
        assert not {"_awaited", "_entered", "_iterated"} & vars(import_module(name)).keys()
        assert type(import_module(name).__loader__).__module__ != failpoints.__name__
