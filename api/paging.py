"""Lists as OpenAI's API pages them: what a request may ask for, and what it gets. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from api.errors import InvalidRequestError

DEFAULT_LIMIT = 20
MAX_LIMIT = 100


def limit_of(request: Request) -> int:
    """How many rows a page may hold. Raises InvalidRequestError."""
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    # Not `isdecimal` alone: it takes the digits of every script.
    if text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= MAX_LIMIT:
        return int(text)
    raise InvalidRequestError(f"`limit` must be a number from 1 to {MAX_LIMIT}.", param="limit")


def newest_first(request: Request, *, default: str) -> bool:
    """Whether `order` is `desc`. Raises InvalidRequestError."""
    order = request.query_params.get("order", default)
    if order not in ("asc", "desc"):
        raise InvalidRequestError("`order` must be `asc` or `desc`.", param="order")
    return order == "desc"


def page_object(rows: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page of rows that have an `id`. The next one begins behind the last of them."""
    return {
        "object": "list",
        "data": list(rows),
        "first_id": rows[0]["id"] if rows else None,
        "last_id": rows[-1]["id"] if rows else None,
        "has_more": has_more,
    }
