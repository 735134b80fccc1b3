"""The whole document, put together. No I/O but for reading our own version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

from api.openapi import completion_routes, job_routes
from api.openapi.answers import ANSWER_SCHEMAS
from api.openapi.job_answers import JOB_SCHEMAS
from api.openapi.operation import JSON, Operation
from api.openapi.requests import request_schemas
from api.openapi.shapes import ref

OPERATIONS: Final[tuple[Operation, ...]] = (*completion_routes.OPERATIONS, *job_routes.OPERATIONS)

_DESCRIPTION: Final = """\
OpenAI-compatible completions of an agent, from a queue.

A client sees `finish_reason` and `[DONE]`, or `response.completed`, if and only if the agent finished and everything \
it said has arrived, in order, once. Every other ending is an error.

Every 4xx and 5xx is an `Error`, but that of `GET /ready`. Every answer has `x-request-id`: the client's own, or a new \
one. 429 and 503 may have `retry-after`; with `x-should-retry: false` the same request may run the agent twice. An \
unknown route is a 404, a method that a route does not take a 405. Every `GET` takes `HEAD`, too."""

_TAGS: Final = {
    completion_routes.CHAT: "OpenAI's Chat Completions API.",
    completion_routes.RESPONSES: "OpenAI's Responses API.",
    completion_routes.UPLOADS: "Files to name by their id in requests. They expire.",
    completion_routes.MODELS: "A deployment serves one agent under one model id.",
    job_routes.JOBS: "Any job, whichever API it was asked for by.",
    job_routes.OPERATING: "For operators.",
    job_routes.HEALTH: "For load balancers, which have no key.",
}


def openapi_document() -> dict[str, Any]:
    """The document, as JSON that may be changed. It is the same in every deployment of a version."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = operation.to_json()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Endmark",
            "version": version("endmark"),
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "webhooks": {"jobEnded": {"post": _JOB_ENDED}},
        "components": {
            "schemas": dict(sorted((request_schemas() | ANSWER_SCHEMAS | JOB_SCHEMAS).items())),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "One of `ENDMARK_API_KEYS`."},
                "adminKey": {"type": "http", "scheme": "bearer", "description": "One of `ENDMARK_ADMIN_KEYS`."},
            },
        },
    }


_JOB_ENDED: Final[dict[str, Any]] = {
    "operationId": "jobEnded",
    "summary": "A job has ended",
    "description": "Sent to the deployment's endpoint, or to the one that the request named, at least once and signed.",
    "parameters": [
        {"name": name, "in": "header", "required": True, "schema": {"type": "string"}}
        for name in ("webhook-id", "webhook-timestamp", "webhook-signature")
    ],
    "requestBody": {"required": True, "content": {JSON: {"schema": ref("WebhookEvent")}}},
    "responses": {"2XX": {"description": "Received. Any other answer is followed by another attempt."}},
    "security": [],
}
