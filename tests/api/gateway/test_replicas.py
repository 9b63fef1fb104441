"""Which replica is asked: loads stay bounded, prompts stay where they were, and who was ejected comes back."""

import asyncio
import contextlib
import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import REGISTRY

from api.gateway.replicas import EJECTED_AT_MOST_S, Probe, Replicas, follow
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.bus.routes import RouteTable
from mini_studio.records.routes import Route
from mini_studio.settings import Gateway
from tests.fakes.waiting import until

SETTINGS = Gateway(eject_after=3, eject_s=5)
PROMPTS = [f"prompt {n}".encode() for n in range(400)]
URLS = [f"http://127.0.0.1:{port}" for port in range(9000, 9008)]
A, B, C = URLS[:3]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def route(*endpoints: str, name: str = "d") -> Route:
    return Route(
        deployment_id=name,
        name=name,
        client_code="",
        kind=DeploymentKind.BASE,
        model="m",
        base_model="m",
        status=DeploymentStatus.READY,
        endpoints=list(endpoints),
        requested_at="",
        revision=1,
    )


def replicas() -> tuple[Replicas, Clock]:
    clock = Clock()
    return Replicas(SETTINGS, clock), clock


def homes(*endpoints: str) -> dict[bytes, str | None]:
    """Where each prompt goes when nothing else is in flight."""
    found = {}
    table = Replicas(SETTINGS)
    for prompt in PROMPTS:
        found[prompt] = endpoint = table.take(route(*endpoints), prompt)
        assert endpoint is not None
        table.done(endpoint, failed=False)
    return found


def eject(table: Replicas, endpoint: str, times: int = SETTINGS.eject_after) -> None:
    """Fail so often, with another one beside it that is not asked."""
    others = route(endpoint, "http://other")
    for _ in range(times):
        taken = table.take(others, but="http://other")
        assert taken == endpoint
        table.done(taken, failed=True)


def ejected(name: str = "d") -> float | None:
    return REGISTRY.get_sample_value("mini_studio_gateway_ejected_replicas", {"deployment": name})


class Asking(RuleBasedStateMachine):
    """Requests begin and end in any order, replicas fail, routes change."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas, self.clock = replicas()
        self.route = route(A, B, C)
        self.open: list[str] = []
        self.ejected: set[str] = set()
        """Since when no answer came."""
        self.failures: Counter[str] = Counter()
        self.lingering: set[str] = set()
        """In flight when the routes changed last."""

    def count(self, endpoint: str) -> int:
        return sum(taken == endpoint for taken in self.open)

    @rule(beginning=st.none() | st.sampled_from(PROMPTS[:5]), but=st.none() | st.sampled_from(URLS))
    def begin(self, beginning: bytes | None, but: str | None) -> None:
        others = [endpoint for endpoint in self.route.endpoints if endpoint != but]
        well = [endpoint for endpoint in others if endpoint not in self.ejected]
        loads = {endpoint: self.count(endpoint) for endpoint in well}
        taken = self.replicas.take(self.route, beginning, but)
        if taken is None:
            assert not others, "a gateway never refuses what may work"
            return
        assert taken in others
        if isinstance(taken, Probe):
            assert taken in self.ejected
            assert not any(isinstance(other, Probe) and other == taken for other in self.open if taken in self.ejected)
        elif well:
            assert taken in well
            if beginning is None:
                assert loads[taken] == min(loads.values())
            else:
                bound = math.ceil(SETTINGS.affinity_load * (1 + sum(loads.values())) / len(well))
                assert loads[taken] + 1 <= bound
        self.open.append(taken)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), failed=st.booleans())
    def end(self, data: st.DataObject, failed: bool) -> None:
        taken = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.replicas.done(taken, failed=failed)
        replica = self.replicas._replicas[taken]
        if failed:
            self.failures[taken] += 1
            if not replica.alone and self.failures[taken] >= SETTINGS.eject_after:
                self.ejected.add(str(taken))
        if not failed or replica.alone:
            self.failures[taken] = 0
            self.ejected.discard(taken)
            self.open = [str(other) if other == taken else other for other in self.open]

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(endpoints=st.lists(st.sampled_from(URLS), unique=True, max_size=6))
    def change(self, endpoints: list[str]) -> None:
        self.route = route(*endpoints)
        self.replicas.keep(set(endpoints))
        self.lingering = set(self.open)
        gone = (self.ejected | set(self.failures)) - set(endpoints)
        self.ejected -= gone
        for endpoint in gone:
            del self.failures[endpoint]
        self.open = [str(taken) if taken in gone else taken for taken in self.open]

    @invariant()
    def counts_are_right(self) -> None:
        counted = {endpoint: replica.in_flight for endpoint, replica in self.replicas._replicas.items()}
        assert {endpoint: count for endpoint, count in counted.items() if count} == Counter(map(str, self.open))
        assert {e for e, replica in self.replicas._replicas.items() if replica.ejections} == self.ejected
        assert ejected() == (len(self.ejected) or None)

    @invariant()
    def only_what_is_in_use_is_remembered(self) -> None:
        assert set(self.replicas._replicas) <= set(self.route.endpoints) | self.lingering

    def teardown(self) -> None:
        """Nobody starves: whatever happened, all come back when they answer again."""
        for taken in self.open:
            self.replicas.done(taken, failed=False)
        for _ in range(len(self.route.endpoints)):
            self.clock.now += EJECTED_AT_MOST_S
            if taken := self.replicas.take(self.route):
                self.replicas.done(taken, failed=False)
        seen = {self.replicas.take(self.route) for _ in self.route.endpoints}
        self.replicas.keep(())
        assert seen == set(self.route.endpoints)
        assert ejected() is None


TestAsking = Asking.TestCase
TestAsking.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(st.sampled_from(URLS), unique=True, min_size=2), st.sampled_from(URLS))
@settings(max_examples=30, deadline=None)
def test_adding_or_removing_a_replica_moves_only_its_share(endpoints: list[str], one: str) -> None:
    without = [endpoint for endpoint in endpoints if endpoint != one] or [C]
    before, after = homes(*without), homes(*without, one)
    moved = [prompt for prompt in PROMPTS if before[prompt] != after[prompt]]
    assert all(after[prompt] == one for prompt in moved)
    assert len(moved) <= 2 * len(PROMPTS) / (len(without) + 1)


def test_every_replica_has_its_share_of_the_prompts_whatever_their_order() -> None:
    shares = Counter(homes(*URLS).values())
    assert min(shares.values()) > len(PROMPTS) / len(URLS) / 2
    assert homes(*URLS) == homes(*reversed(URLS))


def test_while_a_replica_is_ejected_only_its_prompts_are_elsewhere_and_then_they_are_back() -> None:
    table, clock = replicas()
    before = homes(A, B, C)

    def now() -> dict[bytes, str | None]:
        found = {}
        for prompt in PROMPTS:
            found[prompt] = taken = table.take(route(A, B, C), prompt)
            assert taken is not None
            table.done(taken, failed=False)
        return found

    eject(table, A)
    during = now()
    assert A not in during.values()
    assert [prompt for prompt in PROMPTS if before[prompt] != during[prompt]] == [p for p in PROMPTS if before[p] == A]
    clock.now += SETTINGS.eject_s
    now()
    assert now() == before


def test_one_prompt_at_a_time_stays_where_it_is_and_many_at_once_spread() -> None:
    table, _ = replicas()
    loads = Counter(table.take(route(A, B, C), b"the same") for _ in range(300))
    assert max(loads.values()) <= math.ceil(SETTINGS.affinity_load * 100)
    assert min(loads.values()) >= 300 - 2 * math.ceil(SETTINGS.affinity_load * 100)


def test_requests_without_affinity_are_spread_evenly() -> None:
    table, _ = replicas()
    assert Counter(table.take(route(A, B, C)) for _ in range(9)) == {A: 3, B: 3, C: 3}
    one_by_one = Counter[str | None]()
    idle, _ = replicas()
    for _ in range(9):
        taken = idle.take(route(A, B, C))
        assert taken is not None
        idle.done(taken, failed=False)
        one_by_one[taken] += 1
    assert one_by_one == {A: 3, B: 3, C: 3}


def test_each_ejection_in_a_row_is_twice_as_long_up_to_a_limit_and_an_answer_ends_that() -> None:
    table, clock = replicas()
    both = route(A, B)
    eject(table, A)
    for length in (5, 10, 20, 40, 60, 60):
        clock.now += length - 0.1
        assert [table.take(both) for _ in range(3)] == [B, B, B]
        clock.now += 0.1
        probe = table.take(both)
        assert probe == A
        assert table.take(both) == B, "one at a time"
        table.done(probe, failed=True)
    clock.now += 60
    probe = table.take(both)
    assert probe == A
    table.done(probe, failed=False)
    assert table.take(both) == A
    table.done(A, failed=False)
    eject(table, A)
    clock.now += 5
    assert table.take(both) == A
    table.keep(())


def test_what_began_before_the_ejection_is_not_taken_for_the_probe() -> None:
    table, clock = replicas()
    both = route(A, B)
    old = [table.take(both, but=B) for _ in range(2)]
    eject(table, A)
    clock.now += 5
    probe = table.take(both)
    assert probe == A
    for taken in old:
        assert taken is not None
        table.done(taken, failed=True)
    assert table.take(both) == B
    clock.now += 5
    assert table.take(both) == B
    table.done(probe, failed=True)
    clock.now += 10
    assert table.take(both) == A
    table.keep(())


def test_a_request_that_failed_once_is_not_risked_with_a_probe() -> None:
    table, clock = replicas()
    eject(table, A)
    clock.now += 5
    assert table.take(route(A, B, C), but=B) == C
    assert table.take(route(A, B), but=B) == A, "there is no other"
    table.keep(())


def test_when_all_are_ejected_the_least_recently_ejected_one_is_asked() -> None:
    table, clock = replicas()
    for endpoint in (B, A, C):
        eject(table, endpoint)
        clock.now += 0.1
    asked = []
    for _ in range(4):
        taken = table.take(route(A, B, C))
        assert taken is not None
        clock.now += 0.1
        table.done(taken, failed=True)
        asked.append(taken)
    assert asked == [B, A, C, B]
    taken = table.take(route(A, B, C))
    assert taken == A
    table.done(taken, failed=False)
    assert [table.take(route(A, B, C)) for _ in range(2)] == [A, A]
    table.keep(())


def test_the_only_endpoint_is_never_refused() -> None:
    table, _ = replicas()
    for _ in range(10):
        assert table.take(route(A)) == A
        table.done(A, failed=True)
    assert ejected() is None
    assert table.take(route(A), but=A) is None
    assert table.take(route()) is None


def test_what_is_in_flight_outlives_a_change_of_routes() -> None:
    table, _ = replicas()
    old = [table.take(route(A, B)) for _ in range(4)]
    table.keep({B, C})
    assert [table.take(route(B, C)) for _ in range(2)] == [C, C]
    table.keep({A, B, C})
    assert table.take(route(A, B, C), but=C) in (A, B)
    for taken in old:
        assert taken is not None
        table.done(taken, failed=False)
    table.keep({B})
    assert set(table._replicas) <= {A, B, C}


async def test_it_forgets_what_no_route_has_any_more() -> None:
    table, _ = replicas()
    routes = RouteTable()
    following = asyncio.create_task(follow(table, routes))
    routes.put("d", route(A, B), 1)
    await asyncio.sleep(0)
    eject(table, A)
    assert ejected() == 1
    routes.put("d", None, 2)
    await until(lambda: not table._replicas, 20)
    assert ejected() is None
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
