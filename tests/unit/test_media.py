"""Which files may come in, and what they are."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import media
from api.errors import ApiError
from api.media import audio_format, audio_type, check_filename, identify
from tests import media_samples as samples

OPEN = "application/vnd.openxmlformats-officedocument"
WORD = f"{OPEN}.wordprocessingml.document"


def refusal(content: bytes, declared: str | None = None, filename: str | None = None) -> str | None:
    with pytest.raises(ApiError) as raised:
        identify(content, declared=declared, filename=filename, param="file")
    assert (raised.value.status, raised.value.param) == (400, "file")
    return raised.value.code


@pytest.mark.parametrize(
    ("content", "declared", "filename", "media_type"),
    [
        (samples.png(), "image/png", "a.png", "image/png"),
        (samples.png(), None, None, "image/png"),
        (samples.png(), "application/octet-stream", "photo", "image/png"),
        (samples.jpeg(), "image/jpg", None, "image/jpeg"),
        (samples.jpeg(4000, 3000), None, "A.JPG", "image/jpeg"),
        (samples.GIF, None, None, "image/gif"),
        (samples.WEBP_LOSSY, None, None, "image/webp"),
        (samples.WEBP_EXTENDED, "image/webp", None, "image/webp"),
        (samples.PDF, "application/pdf", "a.pdf", "application/pdf"),
        (b"\xef\xbb\xbf\n" + samples.PDF, None, "a.pdf", "application/pdf"),
        (samples.docx(), WORD, "a.docx", WORD),
        (samples.xlsx(), None, "a.xlsx", f"{OPEN}.spreadsheetml.sheet"),
        (samples.pptx(), None, None, f"{OPEN}.presentationml.presentation"),
        (samples.old_office("WordDocument"), "application/msword", "a.doc", "application/msword"),
        (samples.old_office("Workbook"), None, "a.xls", "application/vnd.ms-excel"),
        (samples.old_office("WordDocument", "Workbook"), None, "a.xls", "application/vnd.ms-excel"),
        (samples.old_office("PowerPoint Document"), None, None, "application/vnd.ms-powerpoint"),
        (samples.WAV, "audio/x-wav", None, "audio/wav"),
        (samples.MP3, "audio/mp3", "a.mp3", "audio/mpeg"),
        (b"ID3\x04\x00\x00" + bytes(20), None, None, "audio/mpeg"),
        (b"fLaC\x00" + bytes(20), None, None, "audio/flac"),
        (b"OggS\x00" + bytes(20), None, "a.opus", "audio/ogg"),
        (b"\x00\x00\x00\x20ftypM4A \x00", None, "a.m4a", "audio/mp4"),
        (b"hello", None, None, "text/plain"),
        (b"hello", "text/plain; charset=utf-8", "a.rs", "text/plain"),
        (b"a,b\n", "application/vnd.ms-excel", "a.csv", "text/csv"),
        (b"let a = 1", "video/mp2t", "a.ts", "text/plain"),
        (b"{}", "application/json", None, "application/json"),
        (b"{}", "application/vnd.api+json", None, "application/vnd.api+json"),
        (b"<svg/>", "image/svg+xml", "a.svg", "application/xml"),
        (b"# hi", None, "README.md", "text/markdown"),
        ("é".encode("latin-1"), "text/csv", None, "text/csv"),
        ("é 🙂".encode("utf-16"), "text/plain", None, "text/plain"),
        (b"OggS and ID3 are letters, too", "text/plain", None, "text/plain"),
        (b"\x1b[31mred\x1b[0m", None, "a.log", "text/plain"),
    ],
)
def test_the_content_decides_what_a_file_is(
    content: bytes, declared: str | None, filename: str | None, media_type: str
) -> None:
    assert identify(content, declared=declared, filename=filename, param="file") == media_type


@pytest.mark.parametrize(
    ("content", "declared", "filename"),
    [
        (b"hello", "image/png", None),
        (b"hello", None, "a.png"),
        (b"hello", "application/pdf", None),
        (b"hello", "application/zip", None),
        (b"hello", "video/mp4", "a.txt"),
        (samples.png(), "image/jpeg", None),
        (samples.png(), "text/plain", None),
        (samples.png(), "image/png", "a.pdf"),
        (samples.PDF, "text/plain", "a.txt"),
        (samples.docx(), None, "a.xlsx"),
        (samples.docx(), "application/msword", None),
        (samples.archive("a.txt"), None, "a.docx"),
        (samples.archive("a.txt"), "application/zip", "a.zip"),
        (samples.archive("[Content_Types].xml", "a/b"), None, "a.docx"),
        (samples.old_office("EncryptedPackage"), None, "a.docx"),
        (samples.old_office("WordDocument"), None, "a.ppt"),
        (b"RIFF\x00\x00\x00\x00AVI ", None, None),
        (b"\x7fELF\x02\x01", None, None),
        (b"MZ\x90\x00", "application/octet-stream", "setup.exe"),
        (b"a\x00b", "text/plain", None),
        (b"\xff\xfea", "text/plain", None),
        (b"\xff", None, "a.mp3"),
    ],
)
def test_a_file_that_is_not_what_it_is_called_is_refused(
    content: bytes, declared: str | None, filename: str | None
) -> None:
    assert refusal(content, declared, filename) == "unsupported_file"


def test_an_empty_file_is_refused() -> None:
    assert refusal(b"") == "empty_file"


@pytest.mark.parametrize(
    "content",
    [
        samples.png(100_000, 100_000),
        samples.jpeg(65_535, 65_535),
        b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x00",
        samples.WEBP_EXTENDED[:24] + b"\xff\xff\xff\xff\xff\xff",
        samples.zip_bomb(),
        samples.announced_bomb(),
    ],
    ids=["png", "jpeg", "gif", "webp", "deflated", "announced"],
)
def test_a_bomb_is_refused_unread(content: bytes) -> None:
    assert refusal(content) == "decompression_bomb"


def test_a_large_document_that_is_no_bomb_is_taken() -> None:
    lines = b"".join(b"<row>%d</row>" % number for number in range(1_000_000))
    assert len(lines) > media.EXPANSION_FLOOR_BYTES
    assert identify(samples.docx(content=lines), declared=None, filename="a.docx", param="file") == WORD


@pytest.mark.parametrize(
    "content",
    [
        samples.png()[:20],
        samples.png(0, 1),
        samples.jpeg(0, 0),
        b"\x89PNG\r\n\x1a\n" + bytes(30),
        samples.jpeg()[:8],
        b"\xff\xd8" + b"\xff\xfe\x00\x00" * 3_000,
        b"\xff\xd8" + b"\xff" * 5_000 + b"\x00",
        b"GIF89a\x01",
        b"RIFF\x00\x00\x00\x00WEBPVP8 ",
        b"RIFF\x00\x00\x00\x00WEBPnone" + bytes(30),
    ],
    ids=["cut png", "empty png", "empty jpeg", "no header", "cut jpeg", "endless", "padding", "gif", "webp", "chunk"],
)
def test_an_image_whose_size_cannot_be_told_is_refused(content: bytes) -> None:
    assert refusal(content) == "invalid_image"


@pytest.mark.parametrize(
    "content",
    [
        samples.docx()[:-30],
        samples.docx() + b"more",
        b"PK\x03\x04" + samples.docx(),
        samples.docx()[:-22] + b"PK\x06\x07" + bytes(16) + samples.docx()[-22:],
        b"PK\x03\x04" + bytes(100),
        samples.docx().replace(b"PK\x01\x02", b"PK\x01\x03", 1),
        samples.docx()[:-12] + b"\x01\x00" + samples.docx()[-10:],
    ],
    ids=["cut", "behind", "before", "64 bit", "no directory", "no member", "hidden member"],
)
def test_an_archive_that_readers_could_read_differently_is_refused(content: bytes) -> None:
    assert refusal(content, None, "a.docx") == "invalid_archive"


@given(
    st.sampled_from(
        [b"", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF0000WEBPVP8L", b"%PDF-"]
    ),
    st.binary(max_size=200),
    st.sampled_from([b"", b"PK\x05\x06" + bytes(18)]),
)
def test_no_content_is_an_error_of_ours(head: bytes, body: bytes, tail: bytes) -> None:
    with suppress(ApiError):
        identify(head + body + tail, declared=None, filename=None, param="file")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "../a", "a/b", "a\\b", "C:\\a", "a\x00.png", "a\nb", "a\x7f", "\ud800", "ü" * 128],
    ids=ascii,
)
def test_a_filename_that_is_more_than_a_name_is_refused(name: str) -> None:
    with pytest.raises(ApiError) as raised:
        check_filename(name, param="file")
    assert (raised.value.status, raised.value.code, raised.value.param) == (400, "invalid_filename", "file")
    assert raised.value.body()


@pytest.mark.parametrize(
    "name", ["a", "a.txt", ".env", "...", "a b (1).pdf", "é 🙂.md", "-rf", "~", "%2e%2e", "ü" * 127]
)
def test_a_plain_filename_is_taken(name: str) -> None:
    check_filename(name, param="file")


def test_sounds_have_formats() -> None:
    assert [audio_type(name) for name in ("wav", "MP3", "opus", "pdf", "midi", "")] == [
        *("audio/wav", "audio/mpeg", "audio/ogg"),
        *(None, None, None),
    ]
    assert audio_format("audio/mpeg") == "mp3"
