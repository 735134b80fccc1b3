"""Who may open the dashboard, and how a browser stays known.

Rule 1: the pages are for operators. Whoever gives an admin key gets a signed cookie; a deployment without any keys
        serves its own machine without one, as it does everywhere (api/middleware.py).
Rule 2: the cookie is good for `/dashboard` only. `/v1` takes keys, and knows nothing of it.
Rule 3: what changes anything is a POST that a page of ours has sent: the browser says so, and the cookie is strict.
Rule 4: a session is signed with the key that began it: every replica knows it, and it ends with that key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from itsdangerous import BadSignature, TimestampSigner
from starlette.datastructures import Headers

from api.errors import ApiError
from api.middleware import operators_of
from shared.settings import Settings

COOKIE = "endmark_session"
SESSION_S = 12 * 3600  # after which a session ends, whatever was done in it
WRONG_KEY_S = 1.0  # how long the answer to a wrong key takes
MAX_TRIES = 5  # keys of one address that are being looked at


class TooManyTriesError(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "too_many_tries"


def is_offered(settings: Settings) -> bool:
    """Whether there is a dashboard: somebody can be an operator."""
    return bool(settings.admin_keys) or not settings.api_keys


def needs_login(settings: Settings) -> bool:
    """Otherwise the deployment has no keys at all, and only its own machine is served."""
    return bool(settings.admin_keys)


class Sessions:
    """What a browser keeps, and whom it proves. Without any state: replicas that have the same keys agree."""

    def __init__(self, settings: Settings) -> None:
        self._key_of = {operator: key for key, operator in operators_of(settings).items()}

    def begin(self, given: str) -> str | None:
        """A cookie for whoever knows an admin key; None for anybody else."""
        # Every key is compared, in constant time, so that neither the match nor its place can be timed.
        matches = [
            operator
            for operator, key in self._key_of.items()
            if hmac.compare_digest(given.encode("utf-8", "surrogatepass"), key)
        ]
        return _signer(self._key_of[matches[0]]).sign(matches[0]).decode() if matches else None

    def operator(self, cookie: str | None) -> str | None:
        """Whose session it is; None if it is nobody's, not any more, or not genuine."""
        named = (cookie or "").partition(".")[0]
        key = self._key_of.get(named)
        if cookie is None or key is None:
            return None
        try:
            return _signer(key).unsign(cookie, max_age=SESSION_S).decode()
        except BadSignature:  # or expired
            return None


def _signer(key: bytes) -> TimestampSigner:
    return TimestampSigner(key, salt="endmark dashboard session", key_derivation="hmac", digest_method=hashlib.sha256)


class Tries:
    """Makes guessing slow: a wrong key costs a moment, and one address has few of them at a time."""

    def __init__(self) -> None:
        self._waiting: Counter[str] = Counter()

    @asynccontextmanager
    async def one(self, address: str) -> AsyncIterator[None]:
        """Holds the place of one try. Raises TooManyTriesError."""
        if self._waiting[address] >= MAX_TRIES:
            raise TooManyTriesError("Too many keys were tried. Wait a moment.", headers={"retry-after": "2"})
        self._waiting[address] += 1
        try:
            yield
        finally:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address]

    async def was_wrong(self) -> None:
        await asyncio.sleep(WRONG_KEY_S)


def comes_from_our_page(headers: Headers) -> bool:
    """Whether a page of this very origin has sent the request.

    Browsers tell it in `Sec-Fetch-Site`, if they trust the connection (https, or this machine); otherwise `Origin`,
    which they send with every POST, has to name the host that was asked.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    try:
        return urlsplit(headers.get("origin", "")).netloc == headers.get("host", "") != ""
    except ValueError:
        return False


def local_path(asked: str) -> str:
    """Where to go after the login: a page of ours, whatever the query says."""
    is_ours = asked.startswith("/dashboard/") and not set(asked) & set("\\\r\n\t") and "//" not in asked
    return asked if is_ours else "/dashboard/"
