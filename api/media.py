"""Which files may come in: their names, their types, and what they would grow to. No I/O.

Rule 1: the content decides what a file is. What the client says of it must agree, or the file is refused.
Rule 2: nothing is unpacked here. A file whose own header announces too much is refused unread.
Rule 3: what cannot be told is refused: no agent could read it either.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from api.errors import InvalidRequestError

MAX_PIXELS: Final = 100_000_000  # Pillow warns of a bomb at 89 million
MAX_JPEG_SEGMENTS: Final = 2_000  # before the one with the dimensions; colour profiles and thumbnails take some hundred
# Of all members of an Office file together. Agents parse them on their worker's event loop: more would stall it.
MAX_EXPANDED_BYTES: Final = 50 * 1024 * 1024
MAX_EXPANSION: Final = 100  # times its compressed size; Apache POI draws the line there, too
EXPANSION_FLOOR_BYTES: Final = 5 * 1024 * 1024  # below this, no ratio is suspicious
MAX_ARCHIVE_MEMBERS: Final = 10_000
MAX_FILENAME_BYTES: Final = 255
MAX_TYPE_CHARS: Final = 127  # of a media type (RFC 6838); the rest is not repeated in a refusal

PDF: Final = "application/pdf"
_WORD, _EXCEL, _POWERPOINT = "application/msword", "application/vnd.ms-excel", "application/vnd.ms-powerpoint"
_OPEN = "application/vnd.openxmlformats-officedocument"
_DOCX = f"{_OPEN}.wordprocessingml.document"
_XLSX = f"{_OPEN}.spreadsheetml.sheet"
_PPTX = f"{_OPEN}.presentationml.presentation"

_BY_EXTENSION: Final = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "webp": "image/webp",
    "pdf": PDF,
    "doc": _WORD,
    "xls": _EXCEL,
    "ppt": _POWERPOINT,
    "docx": _DOCX,
    "xlsx": _XLSX,
    "pptx": _PPTX,
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "m4a": "audio/mp4",
    "txt": "text/plain",
    "log": "text/plain",
    "md": "text/markdown",
    "csv": "text/csv",
    "tsv": "text/tab-separated-values",
    "html": "text/html",
    "htm": "text/html",
    "xml": "application/xml",
    "json": "application/json",
    "jsonl": "application/jsonl",
    "yaml": "application/yaml",
    "yml": "application/yaml",
    "ts": "text/plain",
}
_OFFICE: Final = (_WORD, _EXCEL, _POWERPOINT, _DOCX, _XLSX, _PPTX)
_BINARY: Final = frozenset(
    media_type
    for media_type in _BY_EXTENSION.values()
    if media_type.startswith(("image/", "audio/")) or media_type in (PDF, *_OFFICE)
)
_ALIASES: Final = {
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/x-png": "image/png",
    "image/svg+xml": "application/xml",  # a text, and no image that a model could look at
    "application/x-pdf": PDF,
    "audio/x-wav": "audio/wav",
    "audio/wave": "audio/wav",
    "audio/vnd.wave": "audio/wav",
    "audio/mp3": "audio/mpeg",
    "audio/x-flac": "audio/flac",
    "audio/opus": "audio/ogg",
    "application/ogg": "audio/ogg",
    "audio/m4a": "audio/mp4",
    "audio/x-m4a": "audio/mp4",
}
_TEXT: Final = re.compile(
    r"text/.+|application/.+\+(json|xml|yaml)|application/(x-)?"
    r"(json|jsonl|jsonlines|ndjson|xml|yaml|toml|csv|rtf|javascript|ecmascript|typescript|sql|graphql|sh|python(-code)?)"
)
_SAYS_NOTHING: Final = frozenset({"", "application/octet-stream", "binary/octet-stream"})
# What browsers and `mimetypes` say of these, though it is wrong.
_MISNOMERS: Final = frozenset({(_EXCEL, "csv"), ("video/mp2t", "ts")})

_TEXT_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")  # UTF-16: the one text in which control bytes are normal
_CONTROL_BYTES: Final = bytes(set(range(0x20)) - set(b"\t\n\v\f\r\x1b")) + b"\x7f"
_NOT_IN_A_FILENAME = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_filename(filename: str, *, param: str) -> None:
    """Refuses a name that is more than a name: a path, or one that no file system takes. Raises InvalidRequestError."""
    if filename in (".", "..") or _NOT_IN_A_FILENAME.search(filename):
        raise InvalidRequestError(
            "The filename must be a plain name, without a path and control characters.",
            code="invalid_filename",
            param=param,
        )
    if not 0 < len(filename.encode()) <= MAX_FILENAME_BYTES:
        raise InvalidRequestError(
            f"The filename must have 1 to {MAX_FILENAME_BYTES} bytes.", code="invalid_filename", param=param
        )


def audio_type(audio_format: str) -> str | None:
    """The media type of an `input_audio.format`; None if it is not one of ours."""
    media_type = _BY_EXTENSION.get(audio_format.lower(), "")
    return media_type if media_type.startswith("audio/") else None


def audio_format(media_type: str) -> str:
    """The inverse of `audio_type`: the first format of the type."""
    return next(extension for extension, known in _BY_EXTENSION.items() if known == media_type)


def identify(content: bytes, *, declared: str | None, filename: str | None, param: str) -> str:
    """The media type of a file. Raises InvalidRequestError, naming `param`.

    `declared` is what the client calls it, and `filename` may have an extension; either may be missing or say nothing.
    """
    if not content:
        raise InvalidRequestError("The file is empty.", code="empty_file", param=param)
    extension = _extension(filename)
    said = (declared or "").partition(";")[0].strip().lower()[:MAX_TYPE_CHARS]
    said = _ALIASES.get(said, said)
    claims = [] if said in _SAYS_NOTHING or (said, extension) in _MISNOMERS else [said]
    if extension in _BY_EXTENSION:
        claims.append(_BY_EXTENSION[extension])
    for claim in claims:
        if claim not in _BINARY and not _TEXT.fullmatch(claim):
            raise _unsupported(f"Files of the type {claim!r} are not supported.", param)
    found = _sniff(content, param)
    if not found:
        raise _unsupported("The content of the file is of no supported type.", param)
    for claim in claims:
        if (claim if claim in _BINARY else "text") not in found:
            raise _unsupported(f"The file is called {claim!r}, but its content is not.", param)
    media_type = claims[0] if claims else found[0]
    if media_type.startswith("image/"):
        _check_dimensions(content, media_type, param)
    return "text/plain" if media_type == "text" else media_type


def _extension(filename: str | None) -> str:
    _, dot, extension = (filename or "").rpartition(".")
    return extension.lower() if dot else ""


def _unsupported(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="unsupported_file", param=param)


def _bomb(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="decompression_bomb", param=param)


def _sniff(content: bytes, param: str) -> list[str]:
    """What the content may be: types of `_BINARY`, or "text". More than one only for old Office files."""
    if content[:32].lstrip(b"\xef\xbb\xbf\t\r\n ").startswith(b"%PDF-"):
        return [PDF]
    if _is_text(content):  # before the others: a text may begin with the letters that mark a sound
        return ["text"]
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return ["image/png"]
    if content.startswith(b"\xff\xd8\xff"):
        return ["image/jpeg"]
    if content.startswith((b"GIF87a", b"GIF89a")):
        return ["image/gif"]
    if content.startswith(b"RIFF"):
        return {b"WEBP": ["image/webp"], b"WAVE": ["audio/wav"]}.get(content[8:12], [])
    if content.startswith(b"PK\x03\x04"):
        return _open_office_types(content, param)
    if content.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return [media_type for stream, media_type in _OLE_STREAMS if stream in content]
    if content.startswith(b"ID3") or (content[0] == 0xFF and content[1:2] and content[1] & 0xE6 == 0xE2):
        return ["audio/mpeg"]
    if content.startswith(b"fLaC"):
        return ["audio/flac"]
    if content.startswith(b"OggS"):
        return ["audio/ogg"]
    if content[4:8] == b"ftyp" and content[8:11] in (b"M4A", b"M4B", b"mp4", b"iso"):
        return ["audio/mp4"]
    return []


# Names of the main stream of an old Office file, as its directory holds them. An embedded object has its own.
_OLE_STREAMS: Final = (
    ("WordDocument".encode("utf-16-le"), _WORD),
    ("Workbook".encode("utf-16-le"), _EXCEL),
    ("PowerPoint Document".encode("utf-16-le"), _POWERPOINT),
)


def _is_text(content: bytes) -> bool:
    """Text in any encoding that keeps ASCII, or UTF-16 with a byte order mark."""
    if content.startswith(_TEXT_BOMS):
        try:
            content.decode("utf-16")
        except UnicodeDecodeError:
            return False
        return True
    return len(content.translate(None, _CONTROL_BYTES)) == len(content)


# -- images ------------------------------------------------------------------------------------------------------------


def _check_dimensions(content: bytes, media_type: str, param: str) -> None:
    try:
        width, height = _DIMENSIONS[media_type](content)
    except (struct.error, ValueError):
        raise InvalidRequestError("The image cannot be read.", code="invalid_image", param=param) from None
    if width == 0 or height == 0:
        raise InvalidRequestError("The image is empty.", code="invalid_image", param=param)
    if width * height > MAX_PIXELS:
        raise _bomb(f"The image has {width} x {height} pixels, which is more than {MAX_PIXELS}.", param)


class _Size(NamedTuple):
    width: int  # pixels
    height: int


# Each reads the dimensions that a header declares, and raises struct.error or ValueError if it has none.


def _png_size(content: bytes) -> _Size:
    if content[12:16] != b"IHDR":
        raise ValueError("no header")
    return _Size(*struct.unpack_from(">II", content, 16))


def _gif_size(content: bytes) -> _Size:
    return _Size(*struct.unpack_from("<HH", content, 6))


def _webp_size(content: bytes) -> _Size:
    match content[12:16]:
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", content, 26)
            return _Size(width & 0x3FFF, height & 0x3FFF)
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", content, 21)
            return _Size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        case b"VP8X" if len(content) >= 30:
            return _Size(int.from_bytes(content[24:27], "little") + 1, int.from_bytes(content[27:30], "little") + 1)
    raise ValueError("no header")


def _jpeg_size(content: bytes) -> _Size:
    """From the start-of-frame segment, which every JPEG has before its pixels."""
    at = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        lead, marker, length = struct.unpack_from(">BBH", content, at)
        if lead != 0xFF:
            raise ValueError("no marker where one must be")
        if marker == 0xFF:  # padding
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", content, at + 5)
            return _Size(width, height)
        elif marker in (0xD9, 0xDA):
            break
        else:
            at += 2 + length
    raise ValueError("no frame")


_DIMENSIONS: Final = {
    "image/png": _png_size,
    "image/gif": _gif_size,
    "image/webp": _webp_size,
    "image/jpeg": _jpeg_size,
}


# -- Office files ------------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    name: bytes
    compressed: int  # bytes
    expanded: int  # bytes, as the archive says


def _open_office_types(content: bytes, param: str) -> list[str]:
    """The type of an Office Open XML file, by its folders; none for another archive. Refuses a bomb."""
    compressed = expanded = 0
    names: set[bytes] = set()
    try:
        for member in _members(content):
            compressed += member.compressed
            expanded += member.expanded
            names.add(member.name.partition(b"/")[0])
    except (struct.error, ValueError):
        raise InvalidRequestError("The archive cannot be read.", code="invalid_archive", param=param) from None
    if expanded > MAX_EXPANDED_BYTES or (
        expanded > EXPANSION_FLOOR_BYTES and expanded > MAX_EXPANSION * max(compressed, 1)
    ):
        raise _bomb(f"The file would expand from {compressed} to {expanded} bytes.", param)
    if b"[Content_Types].xml" not in names:
        return []
    folders = ((b"word", _DOCX), (b"xl", _XLSX), (b"ppt", _PPTX))
    return [media_type for folder, media_type in folders if folder in names]


def _members(content: bytes) -> Iterator[_Member]:
    """The central directory of a zip archive. Raises struct.error or ValueError if there is any doubt where it is.

    Readers differ in what they make of an archive with something before or behind it, or with a second, 64-bit
    directory. Such an archive could show us one directory and the agent another.
    """
    end = content.rfind(b"PK\x05\x06")
    if end < 0 or content[end - 20 : end - 16] == b"PK\x06\x07":
        raise ValueError("no directory, or a 64-bit one")
    count, size, offset, comment = struct.unpack_from("<HIIH", content, end + 10)
    if offset + size != end or end + 22 + comment != len(content) or count > MAX_ARCHIVE_MEMBERS:
        raise ValueError("the directory is not where it should be")
    at = offset
    for _ in range(count):
        signature, compressed, expanded, *lengths = struct.unpack_from("<4s16xIIHHH", content, at)
        name_at = at + 46
        at = name_at + sum(lengths)
        if signature != b"PK\x01\x02" or at > end:
            raise ValueError("not a member")
        yield _Member(content[name_at : name_at + lengths[0]], compressed, expanded)
    if at != end:
        raise ValueError("the directory holds more than it says")
