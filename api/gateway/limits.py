"""What one client may ask of this gateway: requests a second, tokens a minute, requests in flight.

The buckets are in this process's memory: N gateways let a client have N times as much, and a restart fills them again. They are
integers of nanoseconds (generic cell rate algorithm, ITU-T I.371): a bucket is the time at which it will be full, so it
refills by itself, no sum drifts, and the time to come back at is exact.
"""

import functools
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from api.gateway.headers import Headers, pairs
from mini_studio.errors import RateLimited
from mini_studio.settings import ClientLimits, Gateway

SECOND, MINUTE = 1_000_000_000, 60_000_000_000
"""In nanoseconds."""
SLOWEST = 10**15
"""The least frequent that requests may be: one in 11 days, which a float of nanoseconds still tells exactly."""
BUSY_S = 1.0
"""When to come back if too many requests are in flight: nobody knows when the next one ends."""
MAX_CLIENTS = 100_000
LOOKS = 2
"""Clients that are looked at, to forget them, when one is added."""

MILLISECONDS = [*(b"%dms" % number for number in range(1000)), b"1s"]
LINES = b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n"


class Admission:
    """One admitted request. `left` at its end; a second time it does nothing. This one counts nothing, and is shared."""

    __slots__ = ()

    @property
    def lines(self) -> bytes:
        """`x-ratelimit-*` for the answer, as it stands now, each line with its end; none where nothing is limited."""
        return b""

    @property
    def headers(self) -> Headers:
        """The same as names and values."""
        return pairs(self.lines)

    def left(self, tokens: int | None) -> None:
        """The request is over, and used so many tokens, as far as the model server said."""


UNLIMITED = Admission()


class Terms:
    """The limits of one client, in nanoseconds."""

    __slots__ = ("cost", "lines", "requests_s", "streams", "tokens_min", "window")

    def __init__(self, requests_s: float | None, tokens_min: int | None, streams: int | None) -> None:
        self.requests_s, self.tokens_min, self.streams = requests_s, tokens_min, streams
        self.cost = math.ceil(min(SLOWEST, max(1, SECOND / requests_s))) if requests_s else 0
        """What one request takes out of its bucket; 0: no limit."""
        self.window = max(SECOND, self.cost)
        """What the bucket of requests holds: one second's worth, and at least one request."""
        limits = ((b"requests", self.window // self.cost if self.cost else None), (b"tokens", tokens_min))
        self.lines = b"".join(LINES % (name, limit, name, name) for name, limit in limits if limit is not None)
        """With what remains and how long it takes to be reset left out, for requests, then for tokens."""

    @classmethod
    def of(cls, settings: Gateway, own: ClientLimits | None = None) -> "Terms | None":
        """The client's own limits where it has some, else everybody's; None where there are none."""
        own = own or ClientLimits()
        requests_s = own.requests_s or settings.client_requests_s
        tokens_min = own.tokens_min or settings.client_tokens_min
        streams = own.streams or settings.client_streams
        return cls(requests_s, tokens_min, streams) if requests_s or tokens_min or streams else None


class Client:
    """Where one client stands."""

    __slots__ = ("in_flight", "requests_full_at", "terms", "tokens_full_at")

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.in_flight = self.requests_full_at = self.tokens_full_at = 0

    def lines(self, now: int) -> bytes:
        terms = self.terms
        said: tuple[int | bytes, ...] = ()
        if terms.cost:
            missing = max(self.requests_full_at - now, 0)
            said = (terms.window - missing) // terms.cost, duration(missing)
        if terms.tokens_min:
            missing = max(self.tokens_full_at - now, 0)
            said += max(0, (MINUTE - missing) * terms.tokens_min // MINUTE), duration(missing)
        return terms.lines % said


class Counted(Admission):
    """One admitted request of a client that has limits."""

    __slots__ = ("_client", "_clock", "_over")

    def __init__(self, client: Client, clock: Callable[[], int]) -> None:
        self._client, self._clock, self._over = client, clock, False

    @property
    def lines(self) -> bytes:
        return self._client.lines(self._clock())

    def left(self, tokens: int | None) -> None:
        if self._over:
            return
        self._over = True
        client = self._client
        client.in_flight -= 1
        if tokens and tokens > 0 and client.terms.tokens_min:
            took = -(-tokens * MINUTE // client.terms.tokens_min)
            client.tokens_full_at = max(client.tokens_full_at, self._clock()) + took


class Limits:
    """Where every client stands. An empty client code is its own client: whoever names none."""

    def __init__(self, settings: Gateway, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """`clock` gives nanoseconds, and never goes back."""
        self._clock = clock
        self._default = Terms.of(settings)
        self._own = {code: Terms.of(settings, own) for code, own in settings.clients.items()}
        self._unlimited = self._default is None and not any(self._own.values())
        self._clients: OrderedDict[str, Client] = OrderedDict()
        """The last to come is at the end."""

    def admit(self, client: str) -> Admission:
        """Count one more request of the client, which is in flight from now on. Raises `RateLimited`, and counts nothing then."""
        if self._unlimited:
            return UNLIMITED
        now, known = self._clock(), self._clients.get(client)
        if known is None:
            terms = self._own.get(client, self._default)
            if terms is None:
                return UNLIMITED
            self._forget(now)
            known = self._clients[client] = Client(terms)
        else:
            terms = known.terms
            self._clients.move_to_end(client)
        full_at = known.requests_full_at
        full_at = (full_at if full_at > now else now) + terms.cost
        if (
            full_at - now > terms.window
            or (known.tokens_full_at - now >= MINUTE and terms.tokens_min)
            or (terms.streams and known.in_flight >= terms.streams)
        ):
            raise refusal(client, known, now)
        known.requests_full_at = full_at
        known.in_flight += 1
        return Counted(known, self._clock)

    def _forget(self, now: int) -> None:
        """Drop who has nothing in flight and full buckets, longest idle first; with too many clients, also who has not."""
        clients = self._clients
        for _ in range(min(LOOKS, len(clients))):
            code, client = next(iter(clients.items()))
            if client.in_flight or (client.tokens_full_at - now > MINUTE and len(clients) < MAX_CLIENTS):
                clients.move_to_end(code)
            elif max(client.requests_full_at, client.tokens_full_at) <= now or len(clients) >= MAX_CLIENTS:
                del clients[code]
            else:
                return


def refusal(code: str, client: Client, now: int) -> RateLimited:
    """Names the limit that takes longest to be free again: to come back earlier would be in vain."""
    terms = client.terms
    waits: list[tuple[float, str]] = []
    if terms.streams and client.in_flight >= terms.streams:
        waits.append((BUSY_S, f"{terms.streams} requests in flight"))
    if (wait := max(client.requests_full_at, now) + terms.cost - terms.window - now) > 0:
        waits.append((wait / SECOND, f"{terms.requests_s:g} requests a second"))
    if terms.tokens_min and (wait := client.tokens_full_at - now - MINUTE + 1) > 0:
        waits.append((wait / SECOND, f"{terms.tokens_min} tokens a minute"))
    wait_s, limit = max(waits)
    who = f"client {code!r} may have" if code else "callers who name no client may together have"
    message = f"{who} {limit} at this gateway; try again in {max(wait_s, 0.001):.3g} s"
    return RateLimited(message, retry_after_s=wait_s, headers=pairs(client.lines(now)))


def duration(nanoseconds: int) -> bytes:
    """`12ms`, `7s`, `6m0s`, rounded up."""
    if nanoseconds <= SECOND:
        return MILLISECONDS[-(-nanoseconds // 1_000_000)]
    return _in_words(-(-nanoseconds // SECOND))


@functools.lru_cache(maxsize=4096)
def _in_words(seconds: int) -> bytes:
    hours, minutes = seconds // 3600, seconds // 60 % 60
    ahead = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{ahead}{seconds % 60}s".encode()
