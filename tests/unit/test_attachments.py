"""The files of a chat request: taken out by the API, and put back by the worker."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from api.attachments import MAX_FILES, Detached, detach, media_parts
from api.chat_request import parse_chat_request
from api.errors import ApiError
from shared.connection import connect
from shared.files import FileStore, StoredFile
from shared.settings import Settings
from tests import media_samples as samples
from worker.agents.contract import AgentError
from worker.attachments import with_files

MAX_FILE_BYTES = 30


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


TEXT = encoded(b"content")
TOO_LARGE = encoded(b"x" * (MAX_FILE_BYTES + 1))


def detached(*parts: dict[str, Any], max_file_bytes: int = 100_000) -> Detached:
    body = {"messages": [{"role": "user", "content": list(parts)}]}
    return detach(body["messages"], media_parts(parse_chat_request(body)), max_file_bytes=max_file_bytes)


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | more}


def file(**fields: Any) -> dict[str, Any]:
    return {"type": "file", "file": fields}


def sound(data: str, audio_format: str) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": data, "format": audio_format}}


PNG = image(f"data:image/png;base64,{encoded(samples.png())}", detail="low")


@pytest.mark.parametrize(
    ("part", "status", "code", "param"),
    [
        (image("https://example.org/cat.png"), 400, "invalid_request", "image_url.url"),
        (image("file:///etc/passwd"), 400, "invalid_request", "image_url.url"),
        (image(f"data:image/png,{TEXT}"), 400, "invalid_request", "image_url.url"),
        (image("data:image/png;base64,"), 400, "empty_file", "image_url.url"),
        (image("data:image/png;base64,***"), 400, "invalid_request", "image_url.url"),
        (image("data:image/png;base64,QUJ"), 400, "invalid_request", "image_url.url"),
        (image("data:image/png;base64,\ud800"), 400, "invalid_request", "image_url.url"),
        (image(f"data:image/png;base64,{TOO_LARGE}"), 413, "file_too_large", "image_url.url"),
        (image(f"data:image/png;base64,{TEXT}"), 400, "unsupported_file", "image_url.url"),
        (image(f"data:text/plain;base64,{TEXT}"), 400, "unsupported_file", "image_url.url"),
        (image(f"data:image/svg+xml;base64,{encoded(b'<svg/>')}"), 400, "unsupported_file", "image_url.url"),
        (file(), 400, "unsupported_file", "file"),
        (file(filename="a.txt"), 400, "unsupported_file", "file"),
        (file(file_id="file-1", file_data=TEXT), 400, "unsupported_file", "file"),
        (file(file_data=""), 400, "empty_file", "file.file_data"),
        (file(file_data="é"), 400, "invalid_request", "file.file_data"),
        (file(file_data=f"data:text/plain,{TEXT}"), 400, "invalid_request", "file.file_data"),
        (file(file_data=TOO_LARGE), 413, "file_too_large", "file.file_data"),
        (file(filename="a.pdf", file_data=TEXT), 400, "unsupported_file", "file.file_data"),
        (file(filename="../a.txt", file_data=TEXT), 400, "invalid_filename", "file.filename"),
        (file(filename="a\x00b", file_data=TEXT), 400, "invalid_filename", "file.filename"),
        (sound("!", "wav"), 400, "invalid_request", "input_audio.data"),
        (sound(TEXT, "wav"), 400, "unsupported_file", "input_audio.data"),
        (sound(encoded(samples.WAV), "mp3"), 400, "unsupported_file", "input_audio.data"),
        (sound(encoded(samples.WAV), "midi"), 400, "unsupported_file", "input_audio.format"),
        (sound(TEXT, "m" * 10_000), 400, "unsupported_file", "input_audio.format"),
        (file(file_data=f"data:{'m' * 10_000};base64,{TEXT}"), 400, "invalid_request", "file.file_data"),
    ],
)
def test_a_bad_file_is_refused_and_named(part: dict[str, Any], status: int, code: str, param: str) -> None:
    with pytest.raises(ApiError) as raised:
        detached({"type": "text", "text": "look"}, part, max_file_bytes=MAX_FILE_BYTES if status == 413 else 1000)
    error = raised.value
    assert (error.status, error.code, error.param) == (status, code, f"messages[0].content[1].{param}")
    assert len(error.body()) < 1_000, "what the client sent is not sent back"


def test_a_file_may_be_as_large_as_the_limit() -> None:
    part = file(file_data=encoded(b"x" * MAX_FILE_BYTES))
    assert detached(part, max_file_bytes=MAX_FILE_BYTES).attachments == [b"x" * MAX_FILE_BYTES]


def test_a_request_holds_a_limited_number_of_files() -> None:
    part = file(file_data=TEXT)
    assert len(detached(*[part] * MAX_FILES).attachments) == MAX_FILES
    with pytest.raises(ApiError, match="may hold 100 files"):
        detached(*[part] * (MAX_FILES + 1))


def test_what_is_stored_holds_no_file() -> None:
    parts = [{"type": "text", "text": "look"}, PNG, file(filename="a.txt", file_data=TEXT), file(file_id="file-1")]
    result = detached(*parts)
    assert result.messages[0]["content"] == [
        parts[0],
        {"type": "image_url", "image_url": {"url": {"attachment": 0, "media_type": "image/png"}, "detail": "low"}},
        {"type": "file", "file": {"filename": "a.txt", "file_data": {"attachment": 1, "media_type": "text/plain"}}},
        parts[3],
    ]
    assert result.attachments == [samples.png(), b"content"]
    assert [(uploaded.file_id, uploaded.param) for uploaded in result.uploaded] == [
        ("file-1", "messages[0].content[3].file.file_id")
    ]
    assert parts[1] == PNG, "what the client sent is not changed"


# -- and back ----------------------------------------------------------------------------------------------------------


class Shelf(FileStore):
    """Files that need no Redis."""

    def __init__(self, attachments: list[bytes], uploaded: dict[str, tuple[str, str, bytes]]) -> None:
        settings = Settings()
        super().__init__(connect(settings), settings)
        self._attachments = attachments
        self._uploaded = uploaded

    async def attachments(self, job_id: str) -> list[bytes]:  # noqa: ARG002  # the store's signature
        return self._attachments

    async def read(self, tenant: str, file_id: str) -> tuple[StoredFile, bytes] | None:  # noqa: ARG002
        if file_id not in self._uploaded:
            return None
        filename, media_type, content = self._uploaded[file_id]
        stored = StoredFile(
            file_id=file_id,
            filename=filename,
            purpose="user_data",
            media_type=media_type,
            size=len(content),
            created_ms=0,
            expires_ms=1,
        )
        return stored, content


async def restored(result: Detached, uploaded: dict[str, tuple[str, str, bytes]] | None = None) -> list[dict[str, Any]]:
    return await with_files(result.messages, Shelf(result.attachments, uploaded or {}), "default", "job")


async def test_an_agent_sees_the_files_as_the_client_sent_them() -> None:
    url = f"data:text/plain;base64,{TEXT}"
    parts = [{"type": "text", "text": "look"}, PNG, file(filename="a.txt", file_data=url)]
    parts.append(sound(encoded(samples.WAV), "wav"))
    messages = await restored(detached(*parts))
    assert messages == [{"role": "user", "content": parts}]


async def test_bare_base64_becomes_a_data_url() -> None:
    messages = await restored(detached(file(filename="a.json", file_data=TEXT)))
    assert messages[0]["content"][0]["file"]["file_data"] == f"data:application/json;base64,{TEXT}"


async def test_an_agent_sees_an_uploaded_file_as_if_it_had_come_with_the_message() -> None:
    uploaded = {"file-1": ("a.txt", "text/plain", b"content"), "file-2": ("a.png", "image/png", samples.png())}
    messages = await restored(detached(file(file_id="file-1"), file(file_id="file-2")), uploaded)
    assert messages[0]["content"] == [
        file(filename="a.txt", file_data=f"data:text/plain;base64,{TEXT}"),
        image(f"data:image/png;base64,{encoded(samples.png())}"),
    ]


async def test_a_file_that_is_gone_is_no_empty_file() -> None:
    result = detached(file(file_id="file-1"))
    with pytest.raises(AgentError, match="file-1 was deleted or has expired"):
        await restored(result)
    with pytest.raises(AgentError, match="no longer stored"):
        await with_files(detached(PNG).messages, Shelf([], {}), "default", "job")


async def test_messages_without_files_are_left_alone() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "y"}]},
    ]
    assert await with_files(messages, Shelf([], {}), "default", "job") is messages
