"""What happens to every request: an id, a key, and an answer in the OpenAI shape even to what we did not expect.

Pure ASGI: Starlette's BaseHTTPMiddleware hides `http.disconnect` from the routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from functools import lru_cache
from urllib.parse import urlsplit

import structlog
from pydantic import SecretStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError, AuthenticationError, ClientGoneError, ForbiddenError, PayloadTooLargeError
from shared.settings import DEFAULT_TENANT, Settings, TenantKey, is_loopback

log = structlog.get_logger(__name__)

OPEN_PATHS = (
    *("/health", "/ready"),  # for load balancers, which have no key
    *("/openapi.json", "/docs"),  # for browsers, which have none either; they tell nothing of the deployment
)
DASHBOARD = "/dashboard"  # has sessions of its own, see api/dashboard/access.py
LOCAL_OPERATOR = "local"  # who operates a deployment without keys
LINGER_BYTES, LINGER_S = 256 * 1024 * 1024, 30  # how much, and how long, a refused upload may go on
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._~:/+=-]{1,128}")


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that name, which is in lower case, as ASGI has them all."""
    for given, value in scope["headers"]:
        if given == name:
            text: str = value.decode("latin-1")
            return text
    return None


class RequestIdMiddleware:
    """Names every request: in `scope["request_id"]`, in `x-request-id`, and on every log line."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = header(scope, b"x-request-id") or ""
        request_id = asked if _SANE_REQUEST_ID.fullmatch(asked) else f"req_{secrets.token_hex(16)}"
        scope["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        tokens = structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            structlog.contextvars.reset_contextvars(**tokens)


class ErrorMiddleware:
    """Turns every exception that reaches it into an error response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = body_ended = False

        async def notice_end() -> Message:
            nonlocal body_ended
            message = await receive()
            body_ended = not message.get("more_body", False)
            return message

        async def notice_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, notice_end, notice_start)
        except ClientGoneError:
            return  # there is nobody to answer
        except ApiError as error:
            if started:
                raise
            cut = isinstance(error, PayloadTooLargeError) and not body_ended
            await (UploadRefusal(error) if cut else error.response())(scope, receive, send)
        except Exception:
            if started or scope["type"] != "http":
                raise
            log.exception("request_failed", method=scope["method"], path=scope["path"])
            await ApiError("The server failed to handle the request.").response()(scope, receive, send)


class UploadRefusal:
    """Refuses at once, then lets the client finish sending: many read the answer only after their last byte."""

    def __init__(self, error: ApiError) -> None:
        self._response = error.response()

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self._response.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self._response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(self._response.body), "more_body": True})
        discarded = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while discarded < LINGER_BYTES:
                    message = await receive()
                    discarded += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        break
        except TimeoutError:
            log.info("upload_refused_and_cut", discarded_bytes=discarded)
        await send({"type": "http.response.body", "body": b""})


class AuthMiddleware:
    """Asks for a bearer key, and tells whose it is.

    `scope["tenant"]` is whose jobs and files the request is about. `scope["operator"]` is None, or for an admin key a
    name that the audit trail may hold.

    Without configured keys only programs of this machine are served, as operators: no others, no web pages. A web page
    of anywhere may send requests to a loopback address, and may read the answers if it makes its own host name point
    there; it cannot choose `Host` and `Origin`.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._keys = [*settings.tenant_keys, *(TenantKey(_secret(key), DEFAULT_TENANT) for key in settings.admin_keys)]
        self._operators = operators_of(settings)
        self._serves_without_key = not settings.api_keys
        self._origins = frozenset(settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            has_sessions = bool(self._keys) and (scope["path"] + "/").startswith(f"{DASHBOARD}/")
            known = None if has_sessions else self._known_key(header(scope, b"authorization"))
            if has_sessions:
                scope["tenant"], scope["operator"] = DEFAULT_TENANT, None
            elif known is not None:
                scope["tenant"], scope["operator"] = known.tenant, self._operators.get(known.key)
            else:
                self._check_locality(scope)
                scope["tenant"], scope["operator"] = DEFAULT_TENANT, None if self._operators else LOCAL_OPERATOR
        await self.app(scope, receive, send)

    def _known_key(self, authorization: str | None) -> TenantKey | None:
        """None if the request may do without one. Raises AuthenticationError."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            if self._serves_without_key:
                return None
            raise AuthenticationError("Missing API key. Send it as `Authorization: Bearer <key>`.")
        given = key.strip().encode("latin-1")  # the bytes that were sent: ASGI servers decode headers so
        # Every key is compared, in constant time, so that neither the match nor its place can be timed.
        matches = [hmac.compare_digest(given, known) for known, _ in self._keys]
        if any(matches):
            return self._keys[matches.index(True)]
        if self._serves_without_key:
            return None
        raise AuthenticationError("Incorrect API key.")

    def _check_locality(self, scope: Scope) -> None:
        address = (scope.get("server") or [""])[0]
        origin = header(scope, b"origin")
        by_socket_file = not address or address.startswith("/")
        if not by_socket_file and not _is_local(address, header(scope, b"host") or ""):
            raise ForbiddenError("Without ENDMARK_API_KEYS only this machine is served, by a loopback address.")
        if origin is None:  # some requests of a page carry none
            is_of_a_strange_page = header(scope, b"sec-fetch-site") == "cross-site" and "*" not in self._origins
        else:
            is_of_a_strange_page = not _is_local_page(origin) and not self._origins & {origin, "*"}
        if is_of_a_strange_page:
            raise ForbiddenError("Without ENDMARK_API_KEYS web pages are served only from ENDMARK_CORS_ORIGINS.")


def operators_of(settings: Settings) -> dict[bytes, str]:
    """Each admin key, and the name that the audit trail has for it."""
    return {_secret(key): f"key-{_fingerprint(_secret(key))}" for key in settings.admin_keys}


def _secret(key: SecretStr) -> bytes:
    return key.get_secret_value().encode()


def _fingerprint(key: bytes) -> str:
    return hashlib.blake2b(key, digest_size=4).hexdigest()


_HOST = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_ORIGIN = re.compile(rf"https?://{_HOST.pattern}")


# What is remembered of strangers is bounded by the size of the headers that a server takes.


@lru_cache(maxsize=32)
def _is_local(address: str, host: str) -> bool:
    """Whether a request came to a loopback address, by a name that is one, too."""
    return is_loopback(address) and _HOST.fullmatch(host) is not None and _is_loopback_url(f"//{host}")


@lru_cache(maxsize=32)
def _is_local_page(origin: str) -> bool:
    return _ORIGIN.fullmatch(origin) is not None and _is_loopback_url(origin)


def _is_loopback_url(url: str) -> bool:
    """Whether a URL's host is a loopback address or `localhost`. A URL that cannot be read is not."""
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False
