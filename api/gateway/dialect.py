"""OpenAI's inference calls: what a body has to be, and as which body the model server gets it."""

from typing import Any

import orjson

from api.gateway.exchange import LONGEST_NAME, checked_client
from mini_studio.errors import BadRequest
from mini_studio.records.routes import Route

FIELDS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}
"""The field that says what the model shall answer. The model server tells the calls apart by it."""


class Call:
    """The body of one call."""

    __slots__ = ("_body", "_changed", "_data", "client_code", "model")

    def __init__(self, path: str, body: bytes) -> None:
        """Raises `BadRequest`, or `Invalid` for what is no client code, with the field."""
        self._body = body
        self._data = _object(body)
        model = self._data.get("model")
        if not isinstance(model, str) or not model:
            raise wrong("model", "must be the name of a model")
        if len(model) > LONGEST_NAME:
            raise wrong("model", f"must have at most {LONGEST_NAME} characters")
        self.model = model
        _check(self._data, FIELDS[path])
        self._changed = "client_code" in self._data
        self.client_code = _client_code(self._data.pop("client_code", None))

    def body_for(self, route: Route) -> bytes:
        """As it came, unless it names the base of the route's model, which the model server does not know by that name."""
        if self.model != route.model:
            self._data["model"], self._changed = route.model, True
        try:
            return orjson.dumps(self._data) if self._changed else self._body
        except orjson.JSONEncodeError as error:
            raise BadRequest(f"the body cannot be passed on: {error}") from None


def named(organization: str | None, user: str | None, code: str | None) -> str | None:
    """The client, by OpenAI-Organization, X-User-ID, or `client_code` in the body. Raises `BadRequest`, `Invalid`."""
    if organization:
        checked_client(organization, "OpenAI-Organization")
    return same(organization, user, code)


def same(*named: str | None) -> str | None:
    """The client, if any was named. Raises `BadRequest` where two are: one of them may be an API key's."""
    clients = {name for name in named if name}
    if len(clients) > 1:
        raise BadRequest(f"this is in the name of more than one client: {' and '.join(map(repr, sorted(clients)))}")
    return clients.pop() if clients else None


def wrong(field: str, message: str) -> BadRequest:
    return BadRequest(f"{field} {message}", details=[{"field": field, "message": message}])


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadRequest("the body must be a JSON object")
    return data


def _check(data: dict[str, Any], field: str) -> None:
    for other in FIELDS.values():
        if other != field and data.get(other) is not None:
            raise wrong(other, f"does not belong here: this call takes {field}")
    value = data.get(field)
    if field == "messages":
        if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
            raise wrong(field, "must be a list of messages, and not empty")
    elif not isinstance(value, str | list) or value == []:
        raise wrong(field, "must be a text, or a list of them")


def _client_code(given: Any) -> str | None:
    if given is None or given == "":
        return None
    if not isinstance(given, str):
        raise wrong("client_code", "must be a text")
    return checked_client(given, "client_code")
