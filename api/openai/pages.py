"""Lists with OpenAI's cursors."""

from collections.abc import Sequence
from typing import Any, TypeVar

from schemas.openai import Page

P = TypeVar("P", bound=Page)


def paged(page: type[P], found: Sequence[Any], limit: int) -> P:
    """The first `limit` of what was found; one more than that says that there is more."""
    data = found[:limit]
    ids = [entry.id for entry in data]
    return page.model_validate(
        {
            "data": data,
            "has_more": len(found) > limit,
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
        }
    )
