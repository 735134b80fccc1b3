"""When the entries of an attempt were said, in few bytes: kept beside its stream, for whoever replays it. No I/O.

The first byte is the version. Behind it, deflated: for each entry, in order, how many ms after the one before it was
said (the first one: after the attempt began), as an unsigned LEB128 number.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

VERSION = 1
MAX_ENTRIES = 200_000  # of which instants are kept; what is said later has no timing
MAX_BYTES = 5 * MAX_ENTRIES + 1  # that a reader inflates
_LEVEL = 1


class UnreadableTimingError(Exception):
    """The bytes are not a timing, or of another version."""


def encode(offsets_ms: Iterable[int]) -> bytes:
    """Instants in ms since the attempt began, in order. A clock that goes back counts as one that stands."""
    numbers = bytearray()
    before = 0
    for offset_ms in offsets_ms:
        gap = max(0, offset_ms - before)
        before += gap
        while gap > 0x7F:
            numbers.append(gap & 0x7F | 0x80)
            gap >>= 7
        numbers.append(gap)
    return bytes([VERSION]) + zlib.compress(bytes(numbers), _LEVEL)


def decode(timing: bytes) -> list[int]:
    """The inverse of `encode`. Raises UnreadableTimingError."""
    if timing[:1] != bytes([VERSION]):
        raise UnreadableTimingError("the timing is of another version")
    inflate = zlib.decompressobj()
    try:
        numbers = inflate.decompress(timing[1:], MAX_BYTES)
    except zlib.error as error:
        raise UnreadableTimingError("the timing is damaged") from error
    if not inflate.eof:
        raise UnreadableTimingError("the timing is cut, or too long")
    offsets: list[int] = []
    for gap in _gaps(numbers):
        offsets.append((offsets[-1] if offsets else 0) + gap)
    return offsets


def _gaps(numbers: bytes) -> Iterator[int]:
    gap = shift = 0
    for byte in numbers:
        gap |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
            if shift > 28:
                raise UnreadableTimingError("a gap is too long")
        else:
            yield gap
            gap = shift = 0
    if shift:
        raise UnreadableTimingError("the last gap is cut")
