"""How many replicas: whatever the load does, over any time."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_studio.drivers.loads import requests_in
from mini_studio.drivers.scaling import GAP_S, Bounds, Load, Needs
from mini_studio.drivers.slots import Leaving, Scale, hold_scale, scale_in
from mini_studio.settings import Api, Serving, Settings

WINDOW_S = 20.0
BOUNDS = st.builds(
    lambda least, more, threshold: Bounds(least, max(1, least + more), threshold),
    st.integers(0, 4), st.integers(0, 6), st.floats(0.01, 100),
)  # fmt: skip
LOADS = st.builds(Load, st.floats(0, 500) | st.just(0.0), st.booleans())
TURNS = st.lists(st.tuples(st.floats(0.01, 3), LOADS, st.booleans()), min_size=1, max_size=60)


@given(BOUNDS, TURNS, st.integers(0, 12))
def test_replicas_follow_the_highest_need_of_the_window_and_never_flap(
    bounds: Bounds, turns: list[tuple[float, Load, bool]], present: int
) -> None:
    needs, now, seen = Needs(WINDOW_S), 1000.0, [(1000.0, present)]
    began = now
    for pause_s, load, ready in turns:
        now += pause_s
        before, present = present, needs.decide(now, present, load, bounds, ready=ready)
        need = bounds.needed(load)
        seen.append((now, need))
        assert bounds.least <= present <= bounds.most
        assert present >= need, "what is needed now is there at once"
        if present > before:
            assert present == max(need, bounds.least), "and no more than that"
        if present < bounds.within(before):
            assert load.complete, "what is not known takes nothing away"
            assert present >= max(n for at, n in seen if now - at < WINDOW_S)
            assert now - began >= WINDOW_S
        if present == 0 and before:
            assert ready, "what does not answer does not fall asleep"


@given(BOUNDS, LOADS.filter(lambda load: load.complete), st.integers(0, 12))
def test_a_constant_load_settles_after_one_window(bounds: Bounds, load: Load, present: int) -> None:
    needs = Needs(WINDOW_S)
    for second in range(int(WINDOW_S) + 2):
        present = needs.decide(float(second), present, load, bounds, ready=True)
    assert present == bounds.needed(load)


@given(BOUNDS, st.floats(0, 1e6, allow_subnormal=False))
def test_no_replica_exactly_for_no_load(bounds: Bounds, requests: float) -> None:
    needed = bounds.needed(Load(requests))
    assert (needed == 0) == (requests == 0 and bounds.least == 0)
    assert needed == bounds.within(math.ceil(requests / bounds.threshold))


def test_a_gap_in_the_observation_begins_a_new_window() -> None:
    needs, bounds = Needs(WINDOW_S), Bounds(0, 3, 1)
    assert needs.decide(0, 3, Load(0), bounds, ready=True) == 3
    after = 2 * GAP_S
    assert needs.decide(after, 3, Load(0), bounds, ready=True) == 3, "who knows what was in between"
    assert needs.decide(after + WINDOW_S + 1, 3, Load(0), bounds, ready=True) == 0


def test_what_another_process_added_counts_as_needed_now() -> None:
    needs, bounds = Needs(WINDOW_S), Bounds(1, 3, 1)
    for second in range(30):
        needs.decide(second, 1, Load(1), bounds, ready=True)
    assert needs.decide(30, 3, Load(1), bounds, ready=True) == 3
    assert needs.decide(31, 2, Load(1), bounds, ready=True) == 2, "and what it took away is not put back"


def test_only_numbers_of_this_one_series_are_read() -> None:
    found = requests_in(
        "# HELP mini_studio_gateway_requests x\n"
        'mini_studio_gateway_requests{deployment="a-1"} 3.0\n'
        'mini_studio_gateway_requests{deployment="idle"} 0.0\n'
        'mini_studio_gateway_requests{deployment="nan"} NaN\n'
        'mini_studio_gateway_requests{deployment="inf"} +Inf\n'
        'mini_studio_gateway_requests{deployment="minus"} -4\n'
        'mini_studio_gateway_requests{deployment="word"} many\n'
        'mini_studio_gateway_requests{deployment="../../etc"} 5\n'
        'other_gateway_requests{deployment="b"} 5\n'
        ' mini_studio_gateway_requests{deployment="c"} 5\n'
    )
    assert found == {"a-1": 3.0}


SLOTS = st.lists(st.integers(0, 6), unique=True, max_size=4).map(tuple)


@given(SLOTS, SLOTS, st.sets(st.integers(0, 6)), st.integers(0, 6), st.sets(st.integers(0, 9)))
def test_a_slot_is_never_in_two_hands(
    slots: tuple[int, ...], others: tuple[int, ...], told: set[int], replicas: int, taken: set[int]
) -> None:
    leaving = tuple(Leaving(slot, 5.0, told=slot in told) for slot in others if slot not in slots)
    scale = Scale(slots, leaving).resized(replicas, 9.0, slots[:1], taken.__contains__)
    left = [gone.slot for gone in scale.leaving]
    assert len(scale.slots) == len(set(scale.slots)) == replicas
    assert not set(scale.slots) & set(left)
    assert set(slots) <= {*scale.slots, *left}, "none is forgotten"
    assert {gone.slot for gone in leaving if gone.told} <= set(left), "one that was told to end is not counted on"
    new = set(scale.slots) - set(slots) - {gone.slot for gone in leaving}
    assert not new & taken
    if slots and replicas:
        assert slots[0] in scale.slots, "the one that answers stays"


def test_a_scale_is_read_as_it_was_kept(tmp_path: Path) -> None:
    assert scale_in(tmp_path) is None
    scale = Scale((0, 2), (Leaving(1, 7.5, told=True),))
    hold_scale(tmp_path, scale)
    assert scale_in(tmp_path) == scale
    for broken in ("", "[]", '{"slots": [0]}', '{"slots": ["x"], "leaving": []}', '{"slots": [0], "leaving": [{}]}'):
        (tmp_path / "scale.json").write_text(broken)
        assert scale_in(tmp_path) is None


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),  # noqa: S104
        ("::", "http://[::1]:8000"),
        ("studio", "http://studio:8000"),
    ],
)
def test_the_own_api_is_the_gateway_unless_others_are_named(host: str, url: str) -> None:
    assert Settings(api=Api(host=host)).gateways == [url]
    named = ["http://gateway-1:8000", "http://gateway-2:8000"]
    assert Settings(api=Api(host=host), serving=Serving(gateways=named)).gateways == named
