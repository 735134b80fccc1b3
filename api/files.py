"""/v1/files: files that are uploaded once and named by their id in any number of requests.

A file belongs to the tenant whose key it came with. It expires: `ENDMARK_FILE_TTL_S` after its creation, or earlier if
the upload asked for it; `expires_at` always says when.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import quote

import structlog
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response

from api.body import open_form, read_file
from api.errors import FilesUnavailableError, InvalidRequestError, NotFoundError, PayloadTooLargeError
from api.media import check_filename, identify
from api.services import services_of
from shared.connection import FAILURES, passes
from shared.files import MAX_TENANT_FILES, FileStoreFullError, StoredFile, is_file_id
from shared.text import json_bytes

log = structlog.get_logger(__name__)

PURPOSES: Final = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")  # kept, and heeded by nobody
MAX_EXPIRES_AFTER_S: Final = 30 * 24 * 3600  # OpenAI's own
FORM_BYTES: Final = 64 * 1024  # what a form may hold beside its file


async def create(request: Request) -> Response:
    services, tenant = services_of(request), _tenant(request)
    max_bytes = services.settings.max_file_bytes
    async with open_form(request, max_bytes + FORM_BYTES, files_in="file") as form:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise InvalidRequestError("`file` must be a file.", param="file")
        purpose = form.get("purpose")
        if purpose not in PURPOSES:
            raise InvalidRequestError(f"`purpose` must be one of {', '.join(PURPOSES)}.", param="purpose")
        ttl_s = min(_expires_after_s(form), services.settings.file_ttl_s)
        filename = upload.filename or ""
        check_filename(filename, param="file")
        content = await read_file(upload, max_bytes, param="file")
        media_type = await asyncio.to_thread(
            identify, content, declared=upload.content_type, filename=filename, param="file"
        )
    with _reachable():
        try:
            file = await services.files.put(
                tenant, content, filename=filename, purpose=str(purpose), media_type=media_type, ttl_s=ttl_s
            )
        except FileStoreFullError as error:
            raise _no_room(error) from error
    log.info("file_stored", file=file.file_id, tenant=tenant, bytes=file.size)
    return _json(_file_object(file))


async def list_page(request: Request) -> Response:
    services, query = services_of(request), request.query_params
    limit = _number(query.get("limit", str(MAX_TENANT_FILES)), 1, MAX_TENANT_FILES, param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError("`order` must be `asc` or `desc`.", param="order")
    after = query.get("after")
    if after is not None and not is_file_id(after):
        raise InvalidRequestError("`after` must be the id of a file.", param="after")
    with _reachable():
        page = await services.files.page(
            _tenant(request), after=after, limit=limit, newest_first=order == "desc", purpose=query.get("purpose")
        )
    return _json(
        {
            "object": "list",
            "data": [_file_object(file) for file in page.files],
            "first_id": page.files[0].file_id if page.files else None,
            "last_id": page.files[-1].file_id if page.files else None,
            "has_more": page.has_more,
        }
    )


async def retrieve(request: Request) -> Response:
    with _reachable():
        [file] = await services_of(request).files.find(_tenant(request), [_file_id(request)])
    if file is None:
        raise _not_found(request)
    return _json(_file_object(file))


async def content(request: Request) -> Response:
    with _reachable():
        found = await services_of(request).files.read(_tenant(request), _file_id(request))
    if found is None:
        raise _not_found(request)
    file, data = found
    # Never as what it is: a browser would run an uploaded page with the rights of this address.
    headers = {
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return Response(data, headers=headers, media_type="application/octet-stream")


async def delete(request: Request) -> Response:
    file_id = _file_id(request)
    with _reachable():
        deleted = await services_of(request).files.delete(_tenant(request), file_id)
    if not deleted:
        raise _not_found(request)
    log.info("file_deleted", file=file_id, tenant=_tenant(request))
    return _json({"id": file_id, "object": "file", "deleted": True})


def _tenant(request: Request) -> str:
    tenant: str = request.scope["tenant"]
    return tenant


def _file_id(request: Request) -> str:
    file_id: str = request.path_params["file_id"]
    return file_id


def _file_object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.size,
        "created_at": file.created_ms // 1000,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "expires_at": file.expires_ms // 1000,
    }


def _json(value: dict[str, Any]) -> Response:
    return Response(json_bytes(value), media_type="application/json")


def _expires_after_s(form: FormData) -> int:
    """How long the file is to be kept; as long as OpenAI would at most, if the form does not say."""
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return MAX_EXPIRES_AFTER_S
    if anchor != "created_at":
        raise InvalidRequestError("`expires_after[anchor]` must be `created_at`.", param="expires_after.anchor")
    return _number(seconds, 1, MAX_EXPIRES_AFTER_S, param="expires_after.seconds")


def _number(text: object, least: int, most: int, *, param: str) -> int:
    # Not `isdecimal` alone: it takes the digits of every script.
    if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most:
        return int(text)
    raise InvalidRequestError(f"`{param}` must be a number from {least} to {most}.", param=param)


def _not_found(request: Request) -> NotFoundError:
    return NotFoundError(f"No such file: {_file_id(request)[:50]!r}", code="file_not_found", param="file_id")


def _no_room(error: FileStoreFullError) -> PayloadTooLargeError | FilesUnavailableError:
    """A tenant that has stored too much is not told to try again: only deleting or waiting for hours helps."""
    if error.of_tenant:
        return PayloadTooLargeError(
            f"Your files would be {error}. Delete some, or wait for them to expire.",
            code="file_storage_full",
            param="file",
        )
    return FilesUnavailableError("The file cannot be stored now.")


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        if not passes(error):
            raise
        log.warning("files_unreachable", reason=str(error))
        raise FilesUnavailableError from error
