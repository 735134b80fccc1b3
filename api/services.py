"""What the routes of one API process share. Made by `create_app`, found through the request."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from api.tail import Switchboard
from shared.files import FileStore
from shared.settings import Settings
from shared.store import JobStore
from shared.tasks import Errands
from shared.webhooks import WebhookStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    settings: Settings
    store: JobStore
    files: FileStore
    webhooks: WebhookStore
    switchboard: Switchboard
    errands: Errands
    started_s: int  # when this process started, seconds since the epoch


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services
