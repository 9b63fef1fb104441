"""What a client did wrong, in OpenAI's error shape."""

from typing import Any


class BadInput(Exception):
    """A request that cannot be served; `param` names the field."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Overloaded(BadInput):
    """Too many requests wait; try again shortly."""

    def __init__(self) -> None:
        super().__init__("too many requests are waiting; try again shortly", status=503, code="overloaded")
