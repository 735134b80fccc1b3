"""What the routes of one API process share. Made by `create_app`, found through the request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse as StarletteJSONResponse

from api.departures import Departures
from api.errors import QueueUnreachableError
from api.tail import Switchboard
from shared.connection import FAILURES, passes
from shared.files import FileStore
from shared.index import JobIndex
from shared.settings import Settings
from shared.store import JobStore
from shared.tasks import Errands
from shared.text import json_bytes
from shared.webhooks import WebhookStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    settings: Settings
    store: JobStore
    index: JobIndex
    files: FileStore
    webhooks: WebhookStore
    switchboard: Switchboard
    errands: Errands
    departures: Departures
    started_s: int  # when this process started, seconds since the epoch


class JSONResponse(StarletteJSONResponse):
    """Starlette's refuses lone surrogates, which clients and agents may have said."""

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


@contextmanager
def reachable() -> Iterator[None]:
    """Raises QueueUnreachableError where Redis does not answer; nothing of it may start a job."""
    try:
        yield
    except FAILURES as error:
        if not passes(error):
            raise
        raise QueueUnreachableError(may_have_started=False) from error


async def reached(call: Callable[[], Awaitable[T]]) -> T:
    """The same around one call; returns what Redis answers."""
    with reachable():
        return await call()
