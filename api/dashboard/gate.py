"""What happens to every request for the dashboard: who asks, what the browser may do with the answer, and errors as
pages.

Pure ASGI, as api/middleware.py is.
"""

from __future__ import annotations

from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.dashboard.access import COOKIE, Sessions, comes_from_our_page, needs_login
from api.dashboard.rendering import page
from api.errors import ApiError, AuthenticationError, ForbiddenError, NotFoundError
from shared.settings import Settings

OPEN_TO_ALL = ("/dashboard/login", "/dashboard/static/")
HEADERS = {
    # Everything comes from here, and nothing that a job says can become a script, a style or a request.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # not `no-referrer`: with it the Origin of our own forms is `null`
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class DashboardGate:
    """Lets operators in, and sends others to the login page."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._sessions = Sessions(settings)
        self._needs_login = needs_login(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                is_static = scope["path"].startswith("/dashboard/static/")
                headers.setdefault("cache-control", "no-cache" if is_static else "no-store")
            await send(message)

        request = Request(scope, receive)
        try:
            refusal = self._refusal(request)
            await (refusal or self.app)(scope, receive, send_with_headers)
        except (ApiError, HTTPException) as error:
            if started:
                raise
            await _error_page(request, error)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """What is sent instead of the page. Raises ForbiddenError or AuthenticationError."""
        if request.method not in ("GET", "HEAD") and not comes_from_our_page(request.headers):
            raise ForbiddenError("This must be sent by a page of the dashboard.")
        if self._needs_login:
            # Also for the login page itself, which shows who is there; never a tenant's or a local operator.
            request.scope["operator"] = self._sessions.operator(request.cookies.get(COOKIE))
        if request.scope["operator"] is not None or request.url.path.startswith(OPEN_TO_ALL):
            return None
        if request.method == "GET" and request.headers.get("sec-fetch-dest", "document") == "document":
            asked = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"/dashboard/login?next={quote(asked)}", 303)
        raise AuthenticationError("The session is over. Log in again.")


def _error_page(request: Request, error: ApiError | HTTPException) -> Response:
    if isinstance(error, HTTPException):  # Starlette's own: an unknown path, or method
        error = NotFoundError("There is no such page.") if error.status_code == 404 else _as_api_error(error)
    headers = {name: value for name, value in error.headers.items() if name != "www-authenticate"}
    return page(request, "error.html", status=error.status, headers=headers, message=error.message, title="Sorry")


def _as_api_error(error: HTTPException) -> ApiError:
    return ApiError(str(error.detail), status=error.status_code, headers=error.headers)
