"""What tells about the API itself: its OpenAPI document, and the same as a page.

Both are made once, before the first request. They tell of the software and nothing of the deployment, so that they
need no key: a browser has none to send.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api.docs_page.page import docs_page
from api.openapi.document import openapi_document
from shared.text import json_bytes

OPENAPI_PATH, DOCS_PATH = "/openapi.json", "/docs"


def reference_routes() -> list[Route]:
    document = openapi_document()
    page = docs_page(document)
    document_bytes, page_bytes = json_bytes(document), page.html.encode()
    page_headers = {
        "content-security-policy": page.content_security_policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def openapi_json(_: Request) -> Response:
        return Response(document_bytes, media_type="application/json")

    async def docs(_: Request) -> Response:
        return Response(page_bytes, media_type="text/html", headers=page_headers)

    return [Route(OPENAPI_PATH, openapi_json), Route(DOCS_PATH, docs)]
