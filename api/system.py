"""The routes that tell about the deployment: models, health, readiness."""

from __future__ import annotations

from typing import Any

import structlog
from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.errors import NotFoundError
from api.services import Services, services_of
from shared.settings import Settings

log = structlog.get_logger(__name__)


def _model(services: Services) -> dict[str, Any]:
    return {
        "id": services.settings.model_name,
        "object": "model",
        "created": services.started_s,
        "owned_by": "endmark",
    }


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(services_of(request))]})


async def retrieve_model(request: Request) -> Response:
    services = services_of(request)
    check_model(services.settings, request.path_params["model"])
    return JSONResponse(_model(services))


def check_model(settings: Settings, name: str | None) -> None:
    """Raises NotFoundError for a model that is not ours. No name asks for ours."""
    if name and name != settings.model_name:
        raise NotFoundError(
            f"The model {name!r} does not exist. This deployment serves {settings.model_name!r}.",
            code="model_not_found",
            param="model",
        )


async def health(_: Request) -> Response:
    """The process lives and its event loop turns."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether a request that is accepted now can be answered: Redis answers, and a worker is alive."""
    try:
        workers = await services_of(request).store.live_workers()
    except (RedisError, OSError) as error:
        log.warning("not_ready", missing="redis", reason=str(error))
        return JSONResponse({"status": "unavailable", "missing": ["redis"]}, 503)
    if workers == 0:
        return JSONResponse({"status": "unavailable", "missing": ["worker"]}, 503)
    return JSONResponse({"status": "ready", "workers": workers})
