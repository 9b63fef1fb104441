"""What the head of a request says, worked out once: clients send the same bytes again and again."""

from urllib.parse import unquote

from api.gateway.dialect import FIELDS
from api.gateway.exchange import checked_client
from api.gateway.headers import Headers, lines, passed_up
from mini_studio.errors import StudioError

INFER = b"/inference/infer/"
CALLS = {path.encode(): path for path in FIELDS}


def wanted_at(target: bytes) -> bool:
    """Whether a POST there is one of a model."""
    return target.startswith(INFER) or target.partition(b"?")[0] in CALLS


class Wanted:
    """A request of a model, but for its body. Never changed: requests share it."""

    __slots__ = (
        "authorization",
        "expects",
        "http_1_0",
        "keep_alive",
        "length",
        "model",
        "organization",
        "passed_up",
        "path",
        "problem",
        "request_id",
        "user",
    )

    def __init__(self, target: bytes, headers: Headers, *, http_1_0: bool, keep_alive: bool, expects: bool) -> None:
        path = target.partition(b"?")[0]
        self.path = CALLS.get(path)
        """Of a call of OpenAI's; None for one that has the model in its path."""
        self.model = "" if self.path else unquote(path[len(INFER) :].decode())
        self.http_1_0 = http_1_0
        self.keep_alive = keep_alive
        self.expects = expects
        """The client waits for `100 Continue`."""
        named = {name: value.decode("latin-1") for name, value in headers}
        self.length = int(named[b"content-length"]) if b"content-length" in named else None
        self.request_id = named.get(b"x-request-id")
        self.authorization = named.get(b"authorization") or None
        self.organization = named.get(b"openai-organization")
        self.passed_up = lines(passed_up(headers))
        self.user = named.get(b"x-user-id")
        self.problem: StudioError | None = None
        try:
            if self.user is not None:
                checked_client(self.user, "X-User-ID")
        except StudioError as error:
            self.problem = error
