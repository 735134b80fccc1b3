"""Puts the files of a turn back into its messages, just before the agent runs: the reverse of api/attachments.py.

An agent sees each file as a client sends one: `image_url.url` and `file.file_data` are data URLs, `input_audio.data`
is base64. Uploaded files are fetched by their id; an uploaded image becomes an `image_url`, which models look at.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shared.connection import insist
from shared.files import FileStore, StoredFile
from shared.jobs import Attachment
from worker.agents.contract import AgentError

Messages = list[dict[str, Any]]


async def with_files(messages: Messages, files: FileStore, tenant: str, job_id: str) -> Messages:
    """The messages with all their files. Raises AgentError if one is gone; waits for Redis otherwise."""
    parts = list(_media_parts(messages))
    if not parts:
        return messages
    attachments: list[bytes] = []
    uploaded: dict[str, tuple[StoredFile, bytes]] = {}
    if any(_attachment(part) is not None for part in parts):
        attachments = await insist(lambda: files.attachments(job_id))
        if not attachments:
            raise AgentError("The files of the request are no longer stored.")
    for file_id in {file_id for part in parts if (file_id := _file_id(part)) is not None}:
        uploaded[file_id] = await _uploaded_file(files, tenant, file_id)
    return await asyncio.to_thread(_restore, messages, attachments, uploaded)  # encoding holds up other runs


async def _uploaded_file(files: FileStore, tenant: str, file_id: str) -> tuple[StoredFile, bytes]:
    file = await insist(lambda: files.read(tenant, file_id))
    if file is None:
        raise AgentError(f"The file {file_id} was deleted or has expired before the request had its turn.")
    return file


def _media_parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        if message["role"] == "user" and isinstance(message["content"], list):
            yield from (part for part in message["content"] if part["type"] != "text")


_FIELDS = {"image_url": "url", "input_audio": "data", "file": "file_data"}  # where a part of each type has its file


def _attachment(part: Mapping[str, Any]) -> Attachment | None:
    return Attachment.from_json(part[part["type"]].get(_FIELDS[part["type"]]))


def _file_id(part: Mapping[str, Any]) -> str | None:
    return part["file"].get("file_id") if part["type"] == "file" else None


def _restore(
    messages: Messages, attachments: Sequence[bytes], uploaded: Mapping[str, tuple[StoredFile, bytes]]
) -> Messages:
    """Copies of the messages with the files in them."""

    def restored(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        if file_id := _file_id(part):
            return _uploaded_part(*uploaded[file_id])
        attachment = _attachment(part)
        if attachment is None:
            return part
        kind, content = part["type"], attachments[attachment.number]
        encoded = _base64(content) if kind == "input_audio" else _data_url(attachment.media_type, content)
        return part | {kind: part[kind] | {_FIELDS[kind]: encoded}}

    return [
        message | {"content": [restored(part) for part in message["content"]]}
        if message["role"] == "user" and isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _uploaded_part(file: StoredFile, content: bytes) -> dict[str, Any]:
    url = _data_url(file.media_type, content)
    if file.media_type.startswith("image/"):
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "file", "file": {"filename": file.filename, "file_data": url}}


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{_base64(content)}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
