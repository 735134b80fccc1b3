"""Requests that come twice: the client says so, or its SDK sends the request again by itself. No I/O.

Rule 1: an `Idempotency-Key` names one request of a tenant for as long as its job is kept. The same key with the same
        body gets the same job, whatever became of it; with another body it is refused.
Rule 2: the SDKs count their tries in `x-stainless-retry-count`. A try behind the first joins the job of the one
        before, if that has not failed: the same body, the same route, the same tenant.
Rule 3: once a client has its answer, the same body is a new request.
"""

from __future__ import annotations

import asyncio
import re
from hashlib import blake2b

from starlette.requests import Request

from api.errors import InvalidRequestError
from shared.jobs import Join, Once
from shared.text import json_bytes

BACK_ON_THE_WAY_S = 0.4  # from the end of a client's pause until its next try is here

_COUNT = re.compile(r"[0-9]{1,4}")
_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_LARGE_BYTES = 256 * 1024  # a body from which on digesting it would hold up the streams of others


def is_from_sdk(request: Request) -> bool:
    """Whether the client sends a request again by itself, if it gets no answer."""
    return "x-stainless-retry-count" in request.headers


def comes_back_within_s(request: Request) -> float:
    """How long a client that has got nothing is given to send its request again; 0 if it does not do so by itself.

    The OpenAI SDKs wait 0.5 s, then twice as long each time, up to 8 s, and up to a quarter less of it.
    """
    if not is_from_sdk(request):
        return 0.0
    tries = request.headers["x-stainless-retry-count"].strip()
    before = min(int(tries), 4) if _COUNT.fullmatch(tries) else 0
    return 0.5 * (1 << before) + BACK_ON_THE_WAY_S


def patience_ms(request: Request) -> int | None:
    """How long the client waits for the first byte, as far as it says so."""
    try:
        seconds = float(request.headers.get("x-stainless-read-timeout", ""))
    except ValueError:
        return None
    return round(seconds * 1000) if 0 < seconds < 1e6 else None


async def once(request: Request, body: object) -> Once | None:
    """What tells that this request is the same as one before; None if nothing does. Raises InvalidRequestError."""
    key = request.headers.get("idempotency-key")
    if key is None and not is_from_sdk(request):
        return None
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequestError(
            "Idempotency-Key must be 1 to 255 printable ASCII characters.", code="invalid_idempotency_key"
        )
    large = int(request.headers.get("content-length") or _LARGE_BYTES) >= _LARGE_BYTES
    digest = await asyncio.to_thread(_digest, body) if large else _digest(body)
    digest = _hash(f"{request.scope['path']} {digest}".encode())
    if key is not None:
        return Once(name=f"key:{_hash(key.encode())}", body_digest=digest, join=Join.ALWAYS)
    is_first = request.headers["x-stainless-retry-count"].strip() in ("", "0")
    join = Join.NEVER if is_first else Join.UNLESS_FAILED
    return Once(name=f"retry:{digest}", body_digest=digest, join=join)


def _digest(body: object) -> str:
    return _hash(json_bytes(body))


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
