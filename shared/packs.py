"""Packs: many entries of a stream as one row of it. Values and their bytes; no Redis, no clock.

A row costs Redis some 15 bytes beside its payload, which is more than a token. So the stream of a job that has ended
holds packs.

Rule 1: a pack changes no entry. Who unpacks it has the same ids, kinds and payloads as who was there in time.
Rule 2: a pack has the id of its last entry. Its entries are of one attempt, and their sequence has no gap, so the other
        ids follow from it; and Redis finds it behind every cursor that has not seen all of it.
Rule 3: a pack is small: reading one costs a reader little memory. What is large already stays a row of its own.
Rule 4: openings and markers are never packed: the first and the last row of a stream are what they always were.

docs/protocol.md is the specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from shared.entries import Entry, EntryId, Kind, UnreadableEntryError, entry_from_fields

PACK = "pack"  # the field name of a row that is a pack; no entry's kind
PACK_ENTRIES = 256  # the most that one pack holds
PACK_BYTES = 16 * 1024  # the most that the payloads in one pack hold together

_PACK_FIELD = PACK.encode()
_VERSION = 1
_CODES = {Kind.DELTA: 1, Kind.REASONING: 2, Kind.TOOL_CALL: 3, Kind.TOOL: 4}
_KINDS = {code: kind for kind, code in _CODES.items()}
_NUMBER_BYTES = 4  # the longest number: four times seven bits


class Row(NamedTuple):
    """What one XADD appends: an entry as it is, or a pack."""

    id: EntryId
    name: str  # the only field: the kind of an entry, or PACK
    payload: bytes


class Packer:
    """Makes rows of the entries of a stream, in their order, as they come."""

    def __init__(self) -> None:
        self._rows: list[Row] = []  # complete, and not taken yet
        self._kinds: list[Kind] = []  # of what the next pack holds so far
        self._payloads: list[bytes] = []
        self._bytes = 0
        self._attempt = self._next = 0  # the only id that may join it

    def add(self, entry: Entry) -> None:
        """The next entry of the stream."""
        self.add_all(entry.id, [(entry.kind, entry.payload)])

    def add_all(self, first: EntryId, entries: Sequence[tuple[Kind, bytes]]) -> None:
        """The next entries of the stream, of one attempt and without a gap; `first` is the id of the first of them."""
        attempt, sequence = first
        if (attempt, sequence) != (self._attempt, self._next):
            self._close()
        for kind, payload in entries:
            size = len(payload)
            if kind not in _CODES or self._bytes + size > PACK_BYTES or len(self._payloads) == PACK_ENTRIES:
                self._close()
            if kind in _CODES:
                self._kinds.append(kind)
                self._payloads.append(payload)
                self._bytes += size
                self._attempt, self._next = attempt, sequence + 1
            else:
                self._rows.append(Row(EntryId(attempt, sequence), kind.value, payload))
            sequence += 1

    def rows(self) -> list[Row]:
        """Those that have become complete since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def all_rows(self) -> list[Row]:
        """The same, and the last one as it is."""
        self._close()
        return self.rows()

    def _close(self) -> None:
        """What is open becomes a row."""
        kinds, payloads = self._kinds, self._payloads
        if payloads:
            is_pack = len(payloads) > 1
            name, payload = (PACK, _pack(kinds, payloads)) if is_pack else (kinds[0].value, payloads[0])
            self._rows.append(Row(EntryId(self._attempt, self._next - 1), name, payload))
            self._kinds, self._payloads = [], []
        self._bytes = self._attempt = self._next = 0


def _pack(kinds: Sequence[Kind], payloads: Sequence[bytes]) -> bytes:
    """The payload of a pack: how long each entry is, by runs of one kind, and then what all of them hold."""
    runs = [(kind, sum(1 for _ in run)) for kind, run in groupby(kinds)]
    table = bytearray([_VERSION])
    _write(table, len(runs))
    at = 0
    for kind, count in runs:
        lengths = [len(payload) for payload in payloads[at : at + count]]
        at += count
        table.append(_CODES[kind])
        _write(table, count)
        if max(lengths) <= 0x7F:
            table += bytes(lengths)
        else:
            for length in lengths:
                _write(table, length)
    return b"".join((table, *payloads))


def unpack(last: EntryId, payload: bytes) -> list[Entry]:
    """The entries of a pack, whose id is `last`. Raises UnreadableEntryError."""
    try:
        return _unpack(last, payload)
    except (ValueError, KeyError, IndexError) as error:
        raise UnreadableEntryError(f"pack {last} is not readable: {error}") from error


def entries_from_row(raw_id: bytes, fields: list[bytes] | dict[bytes, bytes]) -> list[Entry]:
    """What a row holds, as XRANGE returns it: a pack's entries, or the one that it is. Raises UnreadableEntryError."""
    try:
        ((name, payload),) = fields.items() if isinstance(fields, dict) else [fields]
        if name == _PACK_FIELD:
            return unpack(EntryId.parse(raw_id), payload)
    except ValueError as error:
        raise UnreadableEntryError(f"entry {raw_id!r} is not readable") from error
    return [entry_from_fields(raw_id, fields)]


def _unpack(last: EntryId, payload: bytes) -> list[Entry]:
    if payload[0] != _VERSION:
        raise ValueError(f"version {payload[0]}")
    runs, at = _read(payload, 1)
    table: list[tuple[Kind, int]] = []
    for _ in range(runs):
        kind = _KINDS[payload[at]]
        count, at = _read(payload, at + 1)
        if not 0 < count <= PACK_ENTRIES - len(table):
            raise ValueError(f"{count} entries in a run")
        for _ in range(count):
            length, at = _read(payload, at)
            table.append((kind, length))
    if not table or last.sequence < len(table):
        raise ValueError(f"{len(table)} entries up to {last}")
    if at + sum(length for _, length in table) != len(payload):
        raise ValueError("it is not as long as it says")
    entries: list[Entry] = []
    for sequence, (kind, length) in enumerate(table, start=last.sequence - len(table) + 1):
        entries.append(Entry(EntryId(last.attempt, sequence), kind, payload[at : at + length]))
        at += length
    return entries


def _write(data: bytearray, number: int) -> None:
    """Appends a number: seven bits to a byte, the lowest first; the high bit says that more follow."""
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)


def _read(data: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and the place behind it. Raises IndexError, or ValueError if it is too long."""
    number = data[at]
    if number < 0x80:
        return number, at + 1
    number &= 0x7F
    for shift in range(1, _NUMBER_BYTES):
        byte = data[at + shift]
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return number, at + shift + 1
    raise ValueError("a number is too long")
