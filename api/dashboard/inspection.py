"""The inspection API, asked from inside of the process.

The pages show what the routes of `/v1` answer, and act through them: so there is one set of rules, one audit trail, and
nothing that a page could do and a program could not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from shared.text import json_bytes, parse_json


async def ask(
    request: Request,
    endpoint: Callable[[Request], Awaitable[Response]],
    *,
    query: Mapping[str, str] | None = None,
    path: Mapping[str, str] | None = None,
    body: Any = None,
) -> Any:
    """What a route answers to this operator, parsed. Raises ApiError as the route does.

    `query`, `path` (parameters) and `body` are the route's own; the page's are not passed on.
    """
    content = b"" if body is None else json_bytes(body)
    scope = {
        **request.scope,
        "query_string": urlencode(query or {}).encode(),
        "path_params": dict(path or {}),
        "headers": [(b"content-length", b"%d" % len(content))],
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": content, "more_body": False}

    response = await endpoint(Request(scope, receive))
    return parse_json(bytes(response.body))
