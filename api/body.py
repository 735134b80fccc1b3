"""Reads a request body, JSON or a form, within limits."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from api.errors import ClientGoneError, InvalidRequestError, PayloadTooLargeError
from api.media import audio_format, check_filename, identify
from shared.settings import Settings
from shared.text import parse_strangers_json

M = TypeVar("M", bound=BaseModel)

DEFAULT_PROMPT = "Please analyze the uploaded files."  # of an upload without a message, as with nanobot
MAX_FORM_FILES = 20
MAX_FORM_FIELDS = 20


async def read_chat_body(request: Request, settings: Settings) -> Any:
    """The request as parsed JSON; a form becomes the JSON that asks for the same.

    Raises PayloadTooLargeError before more than the limit has been read, and InvalidRequestError.
    """
    content_type, _ = parse_options_header(request.headers.get("content-type", ""))
    if content_type.lower() == b"multipart/form-data":
        async with open_form(request, settings.max_body_bytes, files_in="files") as form:
            return await _form_to_json(form, settings.max_file_bytes)
    return await read_json(request, settings.max_body_bytes)


async def read_json(request: Request, limit: int, *, default: Any = None) -> Any:
    """The body as parsed JSON; `default`, if there is one, for an empty body: SDKs send that as JSON, too.

    Raises PayloadTooLargeError before more than the limit has been read, and InvalidRequestError.
    """
    body = await _read_body(request, limit)
    if not body and default is not None:
        return default
    try:
        return parse_strangers_json(body)
    except ValueError as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}", code="invalid_json") from None


async def _read_body(request: Request, limit: int) -> bytes:
    """Raises PayloadTooLargeError, and ClientGoneError."""
    _refuse_declared(request, limit)
    parts: list[bytes] = []
    received = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part: bytes = message.get("body", b"")
        parts.append(part)
        received += len(part)
        if received > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


def validated(model: type[M], value: Any) -> M:
    """A small body, checked. Raises InvalidRequestError, naming the parameter."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(step) for step in first["loc"]) or None
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidRequestError(f"{param}: {message}" if param else message, param=param) from None


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The request body is larger than {limit} bytes.")


def _refuse_declared(request: Request, limit: int) -> None:
    if int(request.headers.get("content-length") or 0) > limit:
        raise _too_large(limit)


def _limit_body(request: Request, limit: int) -> None:
    """Refuses a body that is declared too large, and makes reading it raise as soon as it is."""
    _refuse_declared(request, limit)
    receive, received = request.receive, 0

    async def limited_receive() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        return message

    request._receive = limited_receive


@asynccontextmanager
async def open_form(request: Request, limit: int, *, files_in: str | None) -> AsyncIterator[FormData]:
    """The fields and files of a form, which are gone when the block ends. `limit` is that of the whole body, in bytes.

    `files_in`: the field that holds files; None: there are none, and it may be the kind of form that has none.

    Raises PayloadTooLargeError before more than the limit has been read, and InvalidRequestError.
    """
    _limit_body(request, limit)
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    # To read the other kind of form takes much longer.
    if files_in is not None and content_type.lower() != b"multipart/form-data":
        raise InvalidRequestError("A form with files must be multipart/form-data.", code="invalid_form", param=files_in)
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):  # some of Python's codecs are quadratic
        raise InvalidRequestError("A form must be encoded in UTF-8.", code="invalid_form")
    try:
        async with request.form(max_files=MAX_FORM_FILES, max_fields=MAX_FORM_FIELDS, max_part_size=limit) as form:
            yield form
    except ClientDisconnect as error:
        raise ClientGoneError from error
    except HTTPException as error:  # how Starlette reports a malformed form
        raise InvalidRequestError(f"The form cannot be read: {error.detail}", code="invalid_form") from error


async def read_file(upload: UploadFile, max_bytes: int, *, param: str) -> bytes:
    """The content of a form's file. Raises PayloadTooLargeError."""
    if upload.size is not None and upload.size > max_bytes:
        raise PayloadTooLargeError(
            f"The file {upload.filename!r} is larger than {max_bytes} bytes.", code="file_too_large", param=param
        )
    return await upload.read()


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
        content = await read_file(value, max_file_bytes, param="files")
        parts.append(await asyncio.to_thread(_file_part, value.filename, value.content_type, content))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}]}
    for name in ("session_id", "model"):
        if text := fields.get(name, "").strip():
            body[name] = text
    if stream := fields.get("stream", "").strip().lower():
        if stream not in ("true", "false"):
            raise InvalidRequestError("`stream` must be `true` or `false`.", param="stream")
        body["stream"] = stream == "true"
    return body


def _file_part(filename: str | None, content_type: str | None, content: bytes) -> dict[str, Any]:
    """The part of a message that carries this file. Raises InvalidRequestError."""
    if filename:
        check_filename(filename, param="files")
    media_type = identify(content, declared=content_type, filename=filename, param="files")
    data = base64.b64encode(content).decode()
    if media_type.startswith("audio/"):
        return {"type": "input_audio", "input_audio": {"data": data, "format": audio_format(media_type)}}
    url = f"data:{media_type};base64,{data}"
    if media_type.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "file", "file": {"filename": filename or None, "file_data": url}}
