"""What one client may ask of a gateway: over any sequence of calls, on a clock of the test's own."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import headers_of
from api.gateway import limits as limits_module
from api.gateway.limits import BUSY_S, MINUTE, SECOND, UNLIMITED, Admission, Limits, duration
from mini_studio.errors import RateLimited
from mini_studio.settings import ClientLimits, Gateway

RATES = st.one_of(st.none(), st.floats(0.01, 50), st.sampled_from((1 / 3, 0.1, 7.0, 3e9, 1e-300)))
TOKENS = st.one_of(st.none(), st.integers(1, 10**6))
STREAMS = st.one_of(st.none(), st.integers(1, 4))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(0, 3 * SECOND)),
        st.tuples(st.just("ask"), st.just(0)),
        st.tuples(st.just("leave"), st.integers(0, 10**5)),
    ),
    max_size=80,
)


@dataclass
class Clock:
    now: int = 1

    def __call__(self) -> int:
        return self.now


@dataclass
class Caller:
    """One client that asks as it is told, and what came of it."""

    limits: Limits
    clock: Clock
    code: str = "acme"
    admitted: list[int] = field(default_factory=list)
    charged: list[tuple[int, int]] = field(default_factory=list)
    open: list[Admission] = field(default_factory=list)
    most_open: int = 0
    refusals: list[RateLimited] = field(default_factory=list)

    def do(self, step: str, amount: int) -> None:
        if step == "wait":
            self.clock.now += amount
        elif step == "leave" and self.open:
            self.open.pop(0).left(amount)
            self.charged.append((self.clock.now, amount))
        elif step == "ask":
            self.ask()

    def ask(self) -> bool:
        try:
            self.open.append(self.limits.admit(self.code))
        except RateLimited as error:
            self.refusals.append(error)
            return False
        self.admitted.append(self.clock.now)
        self.most_open = max(self.most_open, len(self.open))
        return True


def caller(requests_s: float | None, tokens_min: int | None, streams: int | None) -> Caller:
    settings = Gateway(client_requests_s=requests_s, client_tokens_min=tokens_min, client_streams=streams)
    clock = Clock()
    return Caller(Limits(settings, clock), clock)


@given(RATES, TOKENS, STREAMS, STEPS)
def test_no_window_has_more_requests_than_rate_and_burst_allow(
    rate: float | None, tokens: int | None, streams: int | None, steps: list[tuple[str, int]]
) -> None:
    client = caller(rate, tokens, streams)
    for step in steps:
        client.do(*step)
    if rate is not None:
        for first, begin in enumerate(client.admitted):
            for last in range(first, len(client.admitted)):
                window_s = (client.admitted[last] - begin) / SECOND
                assert last - first + 1 <= rate * window_s + max(1, rate) + 1e-6
    if streams is not None:
        assert client.most_open <= streams


@given(st.integers(1, 10**5), STREAMS, STEPS)
def test_nobody_is_admitted_while_more_tokens_were_used_than_the_bucket_had(
    rate: int, streams: int | None, steps: list[tuple[str, int]]
) -> None:
    """So what is used in a window is at most what the bucket had and got, and what those in flight at its end still use."""
    client = caller(None, rate, streams)
    for step in steps:
        before = len(client.admitted)
        client.do(*step)
        if len(client.admitted) > before:
            now = client.clock.now
            for begin, _ in client.charged:
                used = sum(tokens for at, tokens in client.charged if at >= begin)
                assert used < rate + rate * (now - begin) / MINUTE + 1e-6


@given(RATES, TOKENS, STREAMS, STEPS)
def test_who_comes_back_when_told_is_admitted_and_not_a_millisecond_earlier(
    rate: float | None, tokens: int | None, streams: int | None, steps: list[tuple[str, int]]
) -> None:
    client = caller(rate, tokens, streams)
    for step in steps:
        client.do(*step)
    asked = [client.ask() for _ in range(5)]
    if all(asked):
        return
    wait = round(client.refusals[-1].retry_after_s * SECOND)
    assert wait > 0
    full = streams is not None and len(client.open) >= streams
    if full and wait == BUSY_S * SECOND:
        return
    early = min(wait, 1_000_000)
    client.clock.now += wait - early
    assert not client.ask()
    client.clock.now += early
    if full:
        client.open.pop().left(None)
    assert client.ask()


@given(RATES, TOKENS, STEPS)
def test_a_second_goodbye_is_harmless(rate: float | None, tokens: int | None, steps: list[tuple[str, int]]) -> None:
    once, twice = caller(rate, tokens, 2), caller(rate, tokens, 2)
    for step, amount in steps:
        leaving = twice.open[0] if twice.open else None
        once.do(step, amount)
        twice.do(step, amount)
        if step == "leave" and leaving is not None:
            leaving.left(amount)
            leaving.left(None)
    assert once.admitted == twice.admitted


@given(RATES, TOKENS, STREAMS, STEPS)
def test_headers_say_what_is_left(
    rate: float | None, tokens: int | None, streams: int | None, steps: list[tuple[str, int]]
) -> None:
    client = caller(rate, tokens, streams)
    for step in steps:
        client.do(*step)
    if not client.ask():
        return
    found = dict(client.open[-1].headers)
    assert (b"x-ratelimit-limit-requests" in found) == (rate is not None)
    assert (b"x-ratelimit-limit-tokens" in found) == (tokens is not None)
    if rate is not None and streams is None:
        assert int(found[b"x-ratelimit-remaining-requests"]) <= int(found[b"x-ratelimit-limit-requests"])
        if tokens is None and rate < 1000:
            for _ in range(int(found[b"x-ratelimit-remaining-requests"])):
                assert client.ask()
            assert not client.ask()


def test_with_no_limit_nothing_is_counted() -> None:
    limits = Limits(Gateway(clients={"acme": ClientLimits()}))
    assert limits.admit("acme") is limits.admit("") is UNLIMITED
    assert UNLIMITED.headers == []
    limits = Limits(Gateway(clients={"acme": ClientLimits(streams=1)}))
    assert limits.admit("other") is UNLIMITED
    assert limits.admit("acme") is not UNLIMITED


def test_a_slow_rate_lets_single_requests_through() -> None:
    client = caller(0.1, None, None)
    assert (client.ask(), client.ask()) == (True, False)
    assert client.refusals[0].retry_after_s == 10
    client.clock.now += 10 * SECOND
    assert (client.ask(), client.ask()) == (True, False)


def test_clients_do_not_share_and_may_have_limits_of_their_own() -> None:
    clock = Clock()
    settings = Gateway(client_requests_s=1, client_streams=2, clients={"big": ClientLimits(requests_s=3)})
    limits = Limits(settings, clock)
    for code, number in (("acme", 1), ("", 1), ("other", 1), ("big", 2)):
        client = Caller(limits, clock, code)
        assert [client.ask() for _ in range(number + 1)] == [True] * number + [False]
    assert "big' may have 2 requests in flight" in client.refusals[0].message, "the default, where its own says nothing"


def test_a_refusal_says_which_limit_and_when() -> None:
    client = caller(2, 60, 3)
    assert client.ask()
    client.open.pop().left(90)
    assert not client.ask()
    refused = client.refusals.pop()
    assert refused.message == "client 'acme' may have 60 tokens a minute at this gateway; try again in 30 s"
    headers = dict(headers_of(refused))
    assert headers[b"retry-after"] == b"31", "at 30 s it is empty, and not yet above"
    assert headers[b"x-ratelimit-remaining-tokens"] == b"0"
    assert headers[b"x-ratelimit-reset-tokens"] == b"1m30s"
    assert headers[b"x-ratelimit-remaining-requests"] == b"1"
    assert headers[b"x-ratelimit-reset-requests"] == b"500ms"


def test_a_short_wait_is_a_whole_second_and_its_milliseconds() -> None:
    refused = RateLimited("x", retry_after_s=0.0004, headers=((b"x-ratelimit-limit-tokens", b"1"),))
    wanted = [(b"retry-after", b"1"), (b"retry-after-ms", b"1"), (b"x-ratelimit-limit-tokens", b"1")]
    assert headers_of(refused) == wanted


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, b"0ms"),
        (1, b"1ms"),
        (12_000_000, b"12ms"),
        (999_000_001, b"1s"),
        (SECOND, b"1s"),
        (SECOND + 1, b"2s"),
        (360 * SECOND, b"6m0s"),
        (3723 * SECOND, b"1h2m3s"),
    ],
)
def test_durations(nanoseconds: int, text: bytes) -> None:
    assert duration(nanoseconds) == text


def many(monkeypatch: pytest.MonkeyPatch, most: int) -> tuple[Limits, Clock, Callable[[], int]]:
    monkeypatch.setattr(limits_module, "MAX_CLIENTS", most)
    clock = Clock()
    limits = Limits(Gateway(client_requests_s=1, client_tokens_min=60), clock)
    return limits, clock, lambda: len(limits._clients)


def test_made_up_clients_are_forgotten_when_their_buckets_are_full_again(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, clock, known = many(monkeypatch, 100_000)
    for number in range(5000):
        limits.admit(f"c{number}").left(None)
        clock.now += SECOND // 100
    assert known() < 250, "about those of the last second, and as many again"


def test_who_is_in_flight_or_in_debt_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, clock, _ = many(monkeypatch, 100_000)
    streaming = limits.admit("streaming")
    limits.admit("debtor").left(1000)
    for number in range(500):
        limits.admit(f"c{number}").left(None)
        clock.now += SECOND
    with pytest.raises(RateLimited):
        limits.admit("debtor")
    limits.admit("streaming")
    streaming.left(None)


def test_there_are_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, _, known = many(monkeypatch, 10)
    kept = limits.admit("kept")
    for number in range(500):
        limits.admit(f"c{number}").left(10**6)
        assert known() <= 10
    with pytest.raises(RateLimited):
        limits.admit("c499")
    limits.admit("c0"), "the longest idle is a new client"
    with pytest.raises(RateLimited):
        limits.admit("kept")
    kept.left(None)
