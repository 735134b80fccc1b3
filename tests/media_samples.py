"""Small files of every supported type, and files that are not what they seem."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n%%EOF\n"
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00" + bytes(20)
MP3 = b"\xff\xfb\x90\x00" + bytes(60)
GIF = b"GIF89a" + struct.pack("<HH", 3, 2) + b"\x80\x00\x00" + bytes(9)
WEBP_LOSSY = (
    b"RIFF\x1a\x00\x00\x00WEBPVP8 \x0e\x00\x00\x00\x10\x00\x00\x9d\x01\x2a" + struct.pack("<HH", 3, 2) + bytes(4)
)
WEBP_EXTENDED = b"RIFF\x1a\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00" + bytes(4) + b"\x02\x00\x00\x01\x00\x00" + bytes(4)


def png(width: int = 1, height: int = 1) -> bytes:
    """One that declares these dimensions; a real one if it is 1 x 1."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def jpeg(width: int = 1, height: int = 1) -> bytes:
    """The head of one, with a comment before the frame."""
    comment = b"\xff\xfe\x00\x06test"
    frame = b"\xff\xc0\x00\x0b\x08" + struct.pack(">HH", height, width) + b"\x01\x01\x11\x00"
    return b"\xff\xd8" + comment + b"\xff" + frame + b"\xff\xd9"


def archive(*names: str, content: bytes = b"<xml/>") -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name in names:
                file.writestr(name, content)
        return buffer.getvalue()


def docx(**options: bytes) -> bytes:
    return archive("[Content_Types].xml", "word/document.xml", **options)


def xlsx() -> bytes:
    return archive("[Content_Types].xml", "xl/workbook.xml")


def pptx() -> bytes:
    return archive("[Content_Types].xml", "ppt/presentation.xml")


def old_office(*streams: str) -> bytes:
    return b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500) + b"".join(name.encode("utf-16-le") for name in streams)


def zip_bomb() -> bytes:
    """A Word file of a few kilobytes whose document would be 20 MiB."""
    return docx(content=bytes(20 * 1024 * 1024))


def announced_bomb() -> bytes:
    """A Word file that announces 4 GiB and holds next to nothing."""
    content = bytearray(docx())
    entry = content.rfind(b"PK\x01\x02")
    struct.pack_into("<I", content, entry + 24, 0xFFFFFFFE)
    return bytes(content)
