"""What the pages do: log in and out, and act on jobs, queue and workers, through the routes of `/v1`.

Every action is a POST of a form (gate.py sees to its origin), and answers with the way to the next page.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlencode

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from api import jobs, operations
from api.body import open_form
from api.dashboard.access import COOKIE, SESSION_S, Sessions, Tries, local_path, needs_login
from api.dashboard.filters import Filters
from api.dashboard.inspection import ask
from api.dashboard.rendering import now_ms, page
from api.errors import InvalidRequestError, NotFoundError
from api.services import services_of

log = structlog.get_logger(__name__)

MAX_FORM_BYTES = 64 * 1024
MAX_BULK = 1000
_SECONDS = re.compile(r"[0-9]{1,9}")


class Login:
    """The login page, and what it leads to. One for each API process."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._tries = Tries()

    async def show(self, request: Request) -> Response:
        """`GET /dashboard/login?next`."""
        target = local_path(request.query_params.get("next", ""))
        if not needs_login(services_of(request).settings):
            return RedirectResponse(target, 303)
        # A link on another site brings no strict cookie along. The page that it leads to asks again by itself.
        again = target if request.headers.get("sec-fetch-site") == "cross-site" else None
        return page(request, "login.html", title="Log in", target=target, again=again, is_wrong=False)

    async def begin(self, request: Request) -> Response:
        """`POST /dashboard/login`. Raises TooManyTriesError."""
        form = await _form(request)  # first: who sends it slowly is not to take the place of others
        async with self._tries.one(request.client.host if request.client else ""):
            target = local_path(form.get("next", ""))
            cookie = self._sessions.begin(form.get("key", "").strip())
            if cookie is None:
                log.warning("dashboard_login_refused", client=request.client and request.client.host)
                await self._tries.was_wrong()
                return page(request, "login.html", status=403, title="Log in", target=target, again=None, is_wrong=True)
        log.info("dashboard_login", operator=self._sessions.operator(cookie))
        response = RedirectResponse(target, 303)
        response.set_cookie(
            COOKIE,
            cookie,
            max_age=SESSION_S,
            path="/dashboard",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return response

    async def end(self, _request: Request) -> Response:
        """`POST /dashboard/logout`."""
        response = RedirectResponse("/dashboard/login", 303)
        response.delete_cookie(COOKIE, path="/dashboard", httponly=True, samesite="strict")
        return response


async def act_on_job(request: Request) -> Response:
    """`POST /dashboard/jobs/{id}/{cancel|retry|delete}`."""
    job_id: str = request.path_params["id"]
    match request.path_params["action"]:
        case "cancel":
            await ask(request, jobs.cancel, path={"id": job_id})
            return _to(f"/dashboard/jobs/{job_id}", "cancelled")
        case "retry":
            again = await ask(request, jobs.retry, path={"id": job_id})
            return _to(f"/dashboard/jobs/{again['id']}", "retried")
        case "delete":
            await ask(request, jobs.delete, path={"id": job_id})
            return _to("/dashboard/jobs", "deleted")
        case action:
            raise NotFoundError(f"A job cannot be told to {action[:20]!r}.")


async def review_bulk(request: Request) -> Response:
    """`GET /dashboard/bulk`: what an action on all jobs of a list would do; nothing is done yet."""
    filters = Filters.parse(request.query_params.multi_items())
    action, endpoint = _bulk_action(request.query_params.get("action", ""))
    newest = await ask(request, jobs.list_jobs, query=filters.query(now_ms()) | {"limit": "1"})
    if newest["data"] and "until" not in filters.fields:  # those that are seen here, and none that come later
        filters = filters.with_(until=str(newest["data"][0]["accepted_ms"]))
    since = filters.query(now_ms()).get("since")  # an age moves on, an instant does not
    filters = filters.with_(since=since)
    body = {"filters": filters.chosen(now_ms()), "dry_run": True, "limit": MAX_BULK}
    result = await ask(request, endpoint, body=body)
    return page(
        request, "bulk.html", title=f"{action.capitalize()} jobs", action=action, filters=filters, result=result
    )


async def act_on_many(request: Request) -> Response:
    """`POST /dashboard/bulk`."""
    form = await _form(request)
    filters = Filters.parse(form.items())
    action, endpoint = _bulk_action(form.get("action", ""))
    body = {"filters": filters.chosen(now_ms()), "dry_run": False, "limit": MAX_BULK}
    result = await ask(request, endpoint, body=body)
    return page(
        request, "bulk.html", title=f"{action.capitalize()} jobs", action=action, filters=filters, result=result
    )


async def pause(request: Request) -> Response:
    """`POST /dashboard/queue/pause`."""
    for_s = (await _form(request)).get("for_s", "")
    if not _SECONDS.fullmatch(for_s):
        raise InvalidRequestError("A pause needs a number of seconds.", param="for_s")
    await ask(request, operations.pause, body={"for_s": int(for_s)})
    return _to("/dashboard/queue", "paused")


async def resume(request: Request) -> Response:
    """`POST /dashboard/queue/resume`."""
    await ask(request, operations.resume)
    return _to("/dashboard/queue", "resumed")


async def drain(request: Request) -> Response:
    """`POST /dashboard/workers/{id}/drain`."""
    await ask(request, operations.drain, path=request.path_params)
    return _to("/dashboard/workers", "drained")


def _bulk_action(name: str) -> tuple[str, Any]:
    endpoints = {"cancel": jobs.bulk_cancel, "retry": jobs.bulk_retry}
    if name not in endpoints:
        raise InvalidRequestError("action must be cancel or retry.", param="action")
    return name, endpoints[name]


async def _form(request: Request) -> dict[str, str]:
    async with open_form(request, MAX_FORM_BYTES, files_in=None) as form:
        return {name: value for name, value in form.multi_items() if isinstance(value, str)}


def _to(path: str, done: str) -> Response:
    """After a POST the browser asks for a page, so that to load it again does not act again."""
    return RedirectResponse(f"{path}?{urlencode({'done': done})}", 303)
