"""Reads a request body, JSON or multipart, within limits."""

from __future__ import annotations

import base64
import mimetypes
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from api.errors import ClientGoneError, InvalidRequestError, PayloadTooLargeError
from shared.settings import Settings
from shared.text import parse_json

DEFAULT_PROMPT = "Please analyze the uploaded files."  # of an upload without a message, as with nanobot
MAX_FORM_FILES = 20
MAX_FORM_FIELDS = 20


async def read_chat_body(request: Request, settings: Settings) -> Any:
    """The request as parsed JSON; a form becomes the JSON that asks for the same.

    Raises PayloadTooLargeError before more than the limit has been read, and InvalidRequestError.
    """
    limit = settings.max_body_bytes
    if int(request.headers.get("content-length") or 0) > limit:
        raise _too_large(limit)
    _limit_body(request, limit)
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    if content_type.lower() == b"multipart/form-data":
        if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
            raise InvalidRequestError("A form must be encoded in UTF-8.", code="invalid_form")
        return await _read_form(request, settings)
    try:
        return parse_json(await request.body())
    except ClientDisconnect as error:
        raise ClientGoneError from error
    except ValueError:
        raise InvalidRequestError("The request body is not valid JSON.", code="invalid_json") from None


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The request body is larger than {limit} bytes.")


def _limit_body(request: Request, limit: int) -> None:
    """Makes reading the body raise as soon as it exceeds the limit, whatever its declared length."""
    receive, received = request.receive, 0

    async def limited_receive() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        return message

    request._receive = limited_receive


async def _read_form(request: Request, settings: Settings) -> dict[str, Any]:
    try:
        async with request.form(
            max_files=MAX_FORM_FILES, max_fields=MAX_FORM_FIELDS, max_part_size=settings.max_body_bytes
        ) as form:
            return await _form_to_json(form, settings.max_file_bytes)
    except ClientDisconnect as error:
        raise ClientGoneError from error
    except HTTPException as error:  # how Starlette reports a malformed form
        raise InvalidRequestError(f"The form cannot be read: {error.detail}", code="invalid_form") from error


async def _form_to_json(form: FormData, max_file_bytes: int) -> dict[str, Any]:
    """The fields of nanobot's form (`message`, `files`, `session_id`, `model`) and `stream`, as a chat request."""
    fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    parts: list[dict[str, Any]] = [{"type": "text", "text": fields.get("message") or DEFAULT_PROMPT}]
    for name in ("message", "session_id", "model", "stream"):
        if any(isinstance(value, UploadFile) for value in form.getlist(name)):
            raise InvalidRequestError(f"`{name}` must be a text field, not a file.", param=name)
    for value in form.getlist("files"):
        if not isinstance(value, UploadFile):
            raise InvalidRequestError("`files` must hold files.", param="files")
        if value.size is not None and value.size > max_file_bytes:
            raise PayloadTooLargeError(
                f"The file {value.filename!r} is larger than {max_file_bytes} bytes.",
                code="file_too_large",
                param="files",
            )
        parts.append(_file_part(value.filename or "upload.bin", value.content_type, await value.read()))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}]}
    for name in ("session_id", "model"):
        if text := fields.get(name, "").strip():
            body[name] = text
    if stream := fields.get("stream", "").strip().lower():
        if stream not in ("true", "false"):
            raise InvalidRequestError("`stream` must be `true` or `false`.", param="stream")
        body["stream"] = stream == "true"
    return body


def _file_part(filename: str, content_type: str | None, content: bytes) -> dict[str, Any]:
    media_type = content_type or mimetypes.guess_type(filename)[0] or "application/octet-stream"
    if ";" in media_type:
        media_type = media_type.partition(";")[0].strip()
    url = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    if media_type.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "file", "file": {"filename": filename, "file_data": url}}
