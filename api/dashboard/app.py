"""Wires the dashboard together: what `api.app` mounts, if it is offered."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from api.dashboard import actions, pages
from api.dashboard.access import Sessions, is_offered
from api.dashboard.gate import DashboardGate
from api.dashboard.rendering import HERE
from shared.settings import Settings


def dashboard_routes(settings: Settings) -> list[BaseRoute]:
    """None if nobody could be let in: then the paths do not exist."""
    if not is_offered(settings):
        return []
    login = actions.Login(Sessions(settings))
    routes: list[BaseRoute] = [
        Route("/", pages.overview),
        Route("/login", login.show),
        Route("/login", login.begin, methods=["POST"]),
        Route("/logout", login.end, methods=["POST"]),
        Route("/jobs", pages.job_list),
        Route("/jobs/{id}", pages.job),
        Route("/jobs/{id}/events", pages.events),
        Route("/jobs/{id}/entries", pages.entries),
        Route("/jobs/{id}/{action}", actions.act_on_job, methods=["POST"]),
        Route("/bulk", actions.review_bulk),
        Route("/bulk", actions.act_on_many, methods=["POST"]),
        Route("/queue", pages.queue),
        Route("/queue/pause", actions.pause, methods=["POST"]),
        Route("/queue/resume", actions.resume, methods=["POST"]),
        Route("/workers", pages.workers),
        Route("/workers/{id}/drain", actions.drain, methods=["POST"]),
        Route("/audit", pages.audit),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    gate = Middleware(DashboardGate, settings=settings)
    return [Route("/dashboard", _home), Mount("/dashboard", routes=routes, middleware=[gate])]


async def _home(_request: Request) -> Response:
    return RedirectResponse("/dashboard/", 303)
