"""The question of a turn: which message it is, its text, and its files.

An OpenAI user message is a string or a list of parts. Files travel inside it as base64, most often as data URLs; agents
want paths. `files_on_disk` writes them to a private directory for as long as the agent runs.
"""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from worker.agents.contract import AgentError, Turn

Message = Mapping[str, Any]
T = TypeVar("T")

CONTINUE = "Please continue the conversation above."
MAX_FILENAME_BYTES = 150  # leaves room for a numeric prefix below the usual limit of 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The messages of a turn, divided at its question."""

    question: Message  # the user message to answer
    earlier: Sequence[Message]  # everything else, in order; nothing if the session owns the history


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedFile:
    """A file as the request carried it; nothing is decoded yet."""

    filename: str | None  # as the client named it: not to be trusted
    media_type: str | None
    encoded: str  # a data URL or bare base64


def divide(turn: Turn) -> Conversation:
    """Find the question of a turn, and what the client has sent before it.

    Where the session owns the history, the question is the last message of the user, whatever surrounds it. Where the
    client does, it is the last message if it is the user's; a list that ends otherwise (with a tool's result, say) asks
    for a continuation of all of it.
    """
    messages = turn.messages
    if not turn.owns_history:
        return Conversation(question=last_user_message(messages), earlier=())
    if messages and messages[-1].get("role") == "user":
        return Conversation(question=messages[-1], earlier=messages[:-1])
    return Conversation(question={"role": "user", "content": CONTINUE}, earlier=messages)


def divide_for_model(turn: Turn) -> Conversation:
    """As `divide`, without what no model can be told; see `well_formed`."""
    return divide(replace(turn, messages=well_formed(turn.messages)))


def well_formed(value: T) -> T:
    """JSON as a model may get it: halves of surrogate pairs are joined, those without the other half become U+FFFD.

    A client may send them, such as one that cuts a text in the middle of an emoji, and UTF-8 cannot say them.
    """
    mended: Any = value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            mended = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    elif isinstance(value, Mapping):
        mended = {well_formed(name): well_formed(part) for name, part in value.items()}
    elif isinstance(value, list | tuple):
        mended = [well_formed(part) for part in value]
    return mended  # type: ignore[no-any-return]  # of the same kind


def last_user_message(messages: Sequence[Message]) -> Message:
    """The last message of the user; an empty one if there is none."""
    return next((message for message in reversed(messages) if message.get("role") == "user"), {"role": "user"})


def parts_of(message: Message) -> list[Mapping[str, Any]]:
    """The content of a message as parts, whichever form it came in."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content or [])


def text_of(message: Message) -> str:
    """The text of a message, its text parts joined with a space as nanobot does."""
    return " ".join(str(part.get("text") or "") for part in parts_of(message) if part.get("type") == "text")


def files_of(message: Message) -> list[EncodedFile]:
    """The images, files and sounds of a message, in order.

    Raises `AgentError` for one whose bytes are elsewhere: a remote URL, or the id of an uploaded file.
    """
    return [file for part in parts_of(message) if (file := file_of(part)) is not None]


def file_of(part: Mapping[str, Any]) -> EncodedFile | None:
    """The file of one part; None if the part is not a file."""
    match part.get("type"):
        case "image_url":
            image = part.get("image_url")
            url = image if isinstance(image, str) else (image or {}).get("url")
            return _embedded_file("image", None, url)
        case "file":
            file = part.get("file") or {}
            return _embedded_file("file", file.get("filename"), file.get("file_data"))
        case "input_audio":
            audio = part.get("input_audio") or {}
            extension = audio.get("format") or "wav"
            return _embedded_file("audio", f"audio.{extension}", audio.get("data"))
        case _:
            return None


def _embedded_file(kind: str, filename: str | None, encoded: str | None) -> EncodedFile:
    if not encoded:
        raise AgentError(f"The {kind} in the message has no data; send it as base64.")
    if re.match(r"(?i)(https?|file|ftp):", encoded):
        raise AgentError(f"The {kind} in the message is a remote URL; send it as base64.")
    declared = re.match(r"(?i)data:([\w.+-]+/[\w.+-]+)", encoded)
    return EncodedFile(filename=filename, media_type=declared and declared[1].lower(), encoded=encoded)


@asynccontextmanager
async def files_on_disk(files: Sequence[EncodedFile], *, parent: Path | None = None) -> AsyncIterator[list[str]]:
    """Write files to a directory that only this user can read; yield their paths, in order.

    The directory is removed when the block ends, however it ends. `parent` is where it is made (None: the system's
    place for temporary files). Raises `AgentError` if a file cannot be decoded.
    """
    if not files:
        yield []
        return
    directory = Path(tempfile.mkdtemp(prefix="endmark-", dir=parent))  # mode 0700
    writing = asyncio.create_task(asyncio.to_thread(_write_files, directory, files))

    async def remove() -> None:
        # A thread cannot be cancelled: removing before it has finished would leave behind what it writes next.
        await asyncio.gather(writing, return_exceptions=True)
        with suppress(FileNotFoundError):  # the agent may have removed it
            await asyncio.to_thread(shutil.rmtree, directory)

    try:
        yield await asyncio.shield(writing)
    finally:
        await asyncio.shield(asyncio.create_task(remove()))


def _write_files(directory: Path, files: Sequence[EncodedFile]) -> list[str]:
    taken: set[str] = set()
    paths = []
    for number, file in enumerate(files, start=1):
        name = own_name = safe_filename(file)
        numbers = count(number)
        while name.casefold() in taken:
            name = f"{next(numbers)}-{own_name}"
        taken.add(name.casefold())
        path = directory / name
        path.write_bytes(decode(file))
        paths.append(str(path))
    return paths


def decode(file: EncodedFile) -> bytes:
    """The bytes of a file. Raises `AgentError` if its encoding is broken."""
    head, comma, body = file.encoded.partition(",")
    is_data_url = bool(comma) and head[:5].lower() == "data:"
    if is_data_url and not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join((body if is_data_url else file.encoded).split()), validate=True)
    except ValueError as error:
        raise AgentError("A file in the message is not valid base64.") from error


def safe_filename(file: EncodedFile) -> str:
    """The client's name for a file without path, control characters and leading dots; a made-up one if none is left."""
    basename = re.split(r"[/\\]", file.filename or "")[-1]
    name = re.sub(r"[\x00-\x1f\x7f]", "", basename).strip().lstrip(".")
    if not name:
        kind = (file.media_type or "file").partition("/")[0]
        stem = kind if kind in ("image", "audio", "video") else "file"
        name = stem + (mimetypes.guess_extension(file.media_type or "") or "")
    stem, dot, extension = name.rpartition(".")
    if not dot or len(extension) > 16:
        stem, dot, extension = name, "", ""
    room = MAX_FILENAME_BYTES - len((dot + extension).encode())
    return stem.encode()[:room].decode(errors="ignore") + dot + extension
