"""Kill -9 before and after every await of handlers, relay, consumers and reconcilers: `python -m tests.faults.crash_points`.

First every scenario is done once, to see which points it passes. Then, for each point, a life is killed there, another one begins, the
client repeats what was not answered, everything comes to its end, and tests/faults/crash_checks.py looks for what was lost or done twice.
Some points share a data folder and a broker, one after another; each has a client of its own, so a violation names its point.

The full form (`MINI_STUDIO_TEST_LENGTH=full`) also kills at the second time that a point is passed, and in the whole scenario.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path

from tests.faults.board import BOARD
from tests.faults.crash_checks import violations
from tests.faults.crash_client import Client
from tests.faults.crash_life import Died, World, unfinished, world
from tests.faults.crash_scenarios import SCENARIOS
from tests.faults.failpoints import points
from tests.faults.length import length

WORKERS = 6
"""They wait more than they work."""
TOGETHER = 16
"""Points that share a data folder."""
TRIES = 4
"""Ways to reach a point that are tried: which one passes it is a matter of timing for a few."""
SETTLE_S, DIE_S = 40.0, 3.0
GROUPED = ("consumers.jobs:", "consumers.training:", "mini_studio.bus.relay:")
"""One point of each of these is also checked with consumers that join their groups."""


@dataclass(frozen=True)
class Way:
    """A point in a scenario: there, or while the life before it begins."""

    point: str
    scenario: str
    at_birth: bool
    passed: int
    """How often."""
    seconds: float
    times: int = 1
    """Which of the times that it is passed is the last."""
    must: bool = True
    """Whether it is wrong not to reach it: timing may decide how often a point is passed."""

    def __str__(self) -> str:
        return f"{self.point} ({self.scenario}{', at birth' * self.at_birth}, {self.times})"


@dataclass
class Verdict:
    way: Way
    killed: bool = False
    problems: list[str] = field(default_factory=list)


class NotReached(Exception):
    """The life went on: the scenario does not pass the point this way."""


def look(name: str) -> tuple[list[Way], str | None]:
    """One scenario, undisturbed: what it passes, and what went wrong even so."""
    BOARD.renew()
    scenario = SCENARIOS[name]
    with folder() as made, world(made, grouped=scenario.grouped) as where:
        client = Client(where, "look")
        if scenario.before:
            scenario.before(client)
            BOARD.passed()
        where.start()
        beginning = {} if scenario.before else BOARD.passed()
        began = time.monotonic()
        problem = None
        try:
            scenario.run(client)
            settle(where, client.code)
        except Died:  # one scenario has the life end
            pass
        except (AssertionError, TimeoutError) as error:
            problem = f"{name}: {error!r}; {unfinished(where.documents(client.code))[:5]}"
        took, then = time.monotonic() - began, BOARD.passed()
        found = [Way(point, name, scenario.before is not None, count, took) for point, count in then.items()]
        found += [Way(point, name, True, count, took) for point, count in beginning.items() if point not in then]
        return found, problem


def kill_at(chosen: Sequence[Sequence[Way]], *, grouped: bool = False) -> list[Verdict]:
    """A few points, one after another, in one data folder; each in the first of its ways that passes it."""
    BOARD.renew()
    with folder() as made, world(made, grouped=grouped) as where:
        verdicts: dict[str, Verdict] = {}
        for number, ways in enumerate(chosen):
            for attempt, way in enumerate(ways):
                code = f"p{number}-{attempt}"
                verdicts[code] = Verdict(way)
                try:
                    kill_once(where, Client(where, code), way)
                    verdicts[code].killed = True
                except NotReached:
                    if way is ways[-1] and way.must:
                        verdicts[code].problems.append("was not reached")
                    continue
                except (AssertionError, TimeoutError, Died) as error:
                    verdicts[code].problems.append(
                        f"{error!r}; {unfinished(where.documents(code))[:5]}; {where.said()[-1000:]}"
                    )
                    BOARD.disarm()
                    where.end()
                break
        where.end()
        for code, problem in where.apart(lambda: asyncio.run(violations(where))):
            (verdicts.get(code) or next(iter(verdicts.values()))).problems.append(problem)
        return list(verdicts.values())


def kill_once(where: World, client: Client, way: Way) -> None:
    """One life that ends at the point, and one that has to make good for it."""
    scenario = SCENARIOS[way.scenario]
    if way.at_birth:
        where.end()
        if scenario.before:
            scenario.before(client)
        BOARD.arm(way.point, way.times)
        where.start()
    else:
        if not where.alive:
            where.start()
        BOARD.arm(way.point, way.times)
    with contextlib.suppress(Died):
        scenario.run(client)
        if not where.dies(DIE_S):
            BOARD.disarm()
            raise NotReached
    BOARD.disarm()
    if not where.was_killed:
        assert where.ended == 0, f"the life broke: {where.ended}"
        raise NotReached
    where.start()
    with contextlib.suppress(Died):  # one scenario has the life end
        scenario.run(client)
    if not where.alive:
        where.start()
    settle(where, client.code)


def settle(where: World, code: str) -> None:
    """Until nothing of the client is on its way any more."""
    where.wait(lambda: not unfinished(where.documents(code)), SETTLE_S)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="crash-"))
    try:
        yield made / "world"
    finally:
        shutil.rmtree(made)


def in_order(ways: list[Way]) -> list[Way]:
    """The quickest first; among the next ones, those in which the life begins with the point armed."""
    first = min(ways, key=lambda way: (way.at_birth, way.seconds))
    born = replace(first, at_birth=True)
    rest = sorted((way for way in ways if way is not first), key=lambda way: (not way.at_birth, way.seconds))
    return list(dict.fromkeys([first, born, *rest]))[:TRIES]


def plan(ways: list[Way]) -> list[list[Way]]:
    """For each thing to be checked, the ways to do it."""
    by_point: dict[str, list[Way]] = {}
    alone = {way.point for way in ways if not SCENARIOS[way.scenario].grouped}
    for way in ways:
        if not SCENARIOS[way.scenario].grouped or way.point not in alone:  # a group takes its time
            by_point.setdefault(way.point, []).append(way)
    todo = [in_order(all) for all in by_point.values()]
    if length(short=0, full=1):
        for all in by_point.values():
            often = sorted((way for way in all if way.passed > 2), key=lambda way: way.seconds)
            todo += [[replace(way, times=2, must=False) for way in often[:TRIES]]] if often else []
            todo += [[replace(way, must=False)] for way in all if way.scenario == "whole"]
    return sorted(todo, key=lambda ways: (ways[0].at_birth, ways[0].scenario))


def look_at_all(pool: Pool) -> tuple[list[Way], list[str]]:
    """What the scenarios pass, and what is wrong before anything was killed."""
    ways, problems = [], []
    for found, problem in pool.imap_unordered(look, SCENARIOS):
        ways += found
        problems += [problem] if problem else []
    passed = {way.point for way in ways}
    problems += [f"{p}: no scenario of tests/faults/crash_scenarios.py passes it" for p in points() if p not in passed]
    return ways, problems


def kill_at_all(pool: Pool, todo: list[list[Way]], *, grouped: bool) -> Iterator[Verdict]:
    some = [[ways] for ways in todo if SCENARIOS[ways[0].scenario].grouped]
    alone = [ways for ways in todo if [ways] not in some]
    parts = [alone[at : at + TOGETHER] for at in range(0, len(alone), TOGETHER)]
    some += [[next(ways for ways in alone if ways[0].point.startswith(start))] for start in GROUPED if grouped]
    running = [pool.apply_async(partial(kill_at, grouped=True), (part,)) for part in some]
    running += [pool.apply_async(kill_at, (part,)) for part in parts]
    for done, part in enumerate(running, 1):
        yield from part.get()
        print(f"{done} of {len(running)} parts", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only points whose name, or `(scenario`, contains this")
    only, began, killed = parser.parse_args().only, time.monotonic(), 0
    with multiprocessing.get_context("fork").Pool(WORKERS, maxtasksperchild=1) as pool:
        ways, problems = look_at_all(pool)
        print("\n".join([f"{len(points())} points, {len({way.point for way in ways})} passed", *problems]), flush=True)
        todo = [one for one in plan(ways) if only in str(one[0])]
        for verdict in kill_at_all(pool, todo, grouped=not only):
            killed += verdict.killed
            found = [f"{verdict.way}: {problem}" for problem in verdict.problems]
            problems += found
            print("".join(line + "\n" for line in found), end="", flush=True)
    print(f"killed {killed} lives in {time.monotonic() - began:.0f} s; {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
