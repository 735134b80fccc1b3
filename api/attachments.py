"""The files of a chat request: taken out of its messages and checked. No I/O.

A message carries a file as base64, in a data URL or bare, or names one that was uploaded before. What it carries
becomes an attachment: the stored request keeps a reference, and the worker puts the file back before the agent runs.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from api.chat_request import AudioPart, ChatRequest, FilePart, ImagePart, TextPart, UserMessage
from api.errors import InvalidRequestError, PayloadTooLargeError
from api.media import audio_type, check_filename, identify
from shared.jobs import Attachment
from shared.text import text_bytes

MAX_FILES = 100  # in one request: a history of the client repeats the files of its earlier turns
MAX_DATA_URL_HEAD = 200  # characters before the comma: media type and parameters

MediaPart = ImagePart | AudioPart | FilePart


class Place(NamedTuple):
    """Where in the messages a file is."""

    message: int
    part: int

    @property
    def param(self) -> str:
        return f"messages[{self.message}].content[{self.part}]"


class UploadedFile(NamedTuple):
    """A part that names an uploaded file."""

    file_id: str
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Detached:
    """A request's messages without their files, and the files."""

    messages: list[dict[str, Any]]  # as they are stored
    attachments: list[bytes] = field(default_factory=list)  # by their numbers
    uploaded: list[UploadedFile] = field(default_factory=list)  # whether these exist is not known here


def media_parts(request: ChatRequest) -> dict[Place, MediaPart]:
    """The parts of a request that are files."""
    return {
        Place(message_index, part_index): part
        for message_index, message in enumerate(request.messages)
        if isinstance(message, UserMessage) and not isinstance(message.content, str)
        for part_index, part in enumerate(message.content)
        if not isinstance(part, TextPart)
    }


def detach(messages: list[dict[str, Any]], parts: dict[Place, MediaPart], *, max_file_bytes: int) -> Detached:
    """Takes the files out of copies of the messages. Raises InvalidRequestError, naming the parameter, and
    PayloadTooLargeError.
    """
    if len(parts) > MAX_FILES:
        raise InvalidRequestError(f"A request may hold {MAX_FILES} files, not {len(parts)}.", param="messages")
    detached = Detached(messages=list(messages))
    for place, part in parts.items():
        stored = _detach_part(part, place.param, detached, max_file_bytes)
        if stored is not None:
            message = detached.messages[place.message]
            content = list(message["content"])
            content[place.part] = _merged(content[place.part], stored)
            detached.messages[place.message] = message | {"content": content}
    return detached


def _merged(part: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """The part with a field of its body replaced; whatever else the client sent stays."""
    ((kind, changes),) = stored.items()
    return part | {kind: part[kind] | changes}


def _detach_part(part: MediaPart, param: str, detached: Detached, max_bytes: int) -> dict[str, Any] | None:
    """What the stored part has in the place of its file; None if it stays as it is."""
    match part:
        case ImagePart(image_url=image):
            param += ".image_url.url"
            if not image.url.lower().startswith("data:"):
                raise InvalidRequestError(
                    "Remote image URLs are not supported. Send the image as a base64 data URL or upload it as "
                    "multipart/form-data.",
                    param=param,
                )
            declared, content = _decode(image.url, param, max_bytes, data_url=True)
            media_type = identify(content, declared=declared, filename=None, param=param)
            if not media_type.startswith("image/"):
                raise InvalidRequestError(f"{param} is not an image.", code="unsupported_file", param=param)
            return {"image_url": {"url": _attach(detached, content, media_type)}}
        case AudioPart(input_audio=audio):
            declared = audio_type(audio.format)
            if declared is None:
                raise InvalidRequestError(
                    f"The audio format {audio.format[:20]!r} is not supported.",
                    code="unsupported_file",
                    param=f"{param}.input_audio.format",
                )
            param += ".input_audio.data"
            _, content = _decode(audio.data, param, max_bytes)
            media_type = identify(content, declared=declared, filename=None, param=param)
            return {"input_audio": {"data": _attach(detached, content, media_type)}}
        case FilePart(file=file):
            param += ".file"
            if (file.file_data is None) == (file.file_id is None):
                raise InvalidRequestError(
                    "A file needs either `file_data`, a base64 data URL, or `file_id`, the id of an uploaded file.",
                    code="unsupported_file",
                    param=param,
                )
            if file.file_id is not None:
                detached.uploaded.append(UploadedFile(file.file_id, f"{param}.file_id"))
                return None
            if file.filename:
                check_filename(file.filename, param=f"{param}.filename")
            param += ".file_data"
            encoded = file.file_data or ""
            is_url = encoded[:5].lower() == "data:"
            declared, content = _decode(encoded, param, max_bytes, data_url=is_url)
            media_type = identify(content, declared=declared, filename=file.filename, param=param)
            return {"file": {"file_data": _attach(detached, content, media_type)}}


def _attach(detached: Detached, content: bytes, media_type: str) -> dict[str, Any]:
    detached.attachments.append(content)
    return Attachment(len(detached.attachments) - 1, media_type).to_json()


def _decode(data: str, param: str, max_bytes: int, *, data_url: bool = False) -> tuple[str | None, bytes]:
    """The declared media type and the content."""
    declared = None
    if data_url:
        head, comma, data = data.partition(",")
        if not comma or len(head) > MAX_DATA_URL_HEAD or not head.lower().endswith(";base64"):
            raise InvalidRequestError(
                f"{param} must be a data URL of the form data:<media type>;base64,<data>.", param=param
            )
        declared = head[len("data:") :].partition(";")[0]
    if len(data) * 3 // 4 - data[-2:].count("=") > max_bytes:
        raise PayloadTooLargeError(f"{param} is larger than {max_bytes} bytes.", code="file_too_large", param=param)
    try:
        return declared, base64.b64decode(text_bytes(data), validate=True)
    except binascii.Error:
        raise InvalidRequestError(f"{param} is not valid base64.", param=param) from None
