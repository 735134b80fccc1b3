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
from typing import NamedTuple

from shared.entries import BEGINNING, Entry, EntryId, Kind, UnreadableEntryError, entry_from_fields

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


class _Run(NamedTuple):
    """Neighbours of one kind in what becomes a pack."""

    kind: Kind
    lengths: list[int]
    payloads: list[bytes]


class Packer:
    """Makes rows of the entries of a stream, in their order, as they come."""

    def __init__(self) -> None:
        self._rows: list[Row] = []  # complete, and not taken yet
        self._open: list[_Run] = []  # what the next pack holds so far
        self._open_entries = self._open_bytes = 0
        self._next = BEGINNING  # the only id that may join what is open

    def add(self, entry: Entry) -> None:
        """The next entry of the stream."""
        entry_id, kind, payload = entry
        size = len(payload)
        joins = (
            entry_id == self._next
            and kind in _CODES
            and self._open_entries < PACK_ENTRIES
            and self._open_bytes + size <= PACK_BYTES
        )
        if not joins:
            self._close()
            if kind not in _CODES:
                self._rows.append(Row(entry_id, kind.value, payload))
                return
        if not self._open or self._open[-1].kind is not kind:
            self._open.append(_Run(kind, [], []))
        run = self._open[-1]
        run.lengths.append(size)
        run.payloads.append(payload)
        self._open_entries += 1
        self._open_bytes += size
        self._next = EntryId(entry_id.attempt, entry_id.sequence + 1)

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
        if self._open:
            first = self._open[0]
            last = EntryId(self._next.attempt, self._next.sequence - 1)
            is_pack = self._open_entries > 1
            name, payload = (PACK, _pack(self._open)) if is_pack else (first.kind.value, first.payloads[0])
            self._rows.append(Row(last, name, payload))
        self._open = []
        self._open_entries = self._open_bytes = 0
        self._next = BEGINNING


def _pack(runs: Sequence[_Run]) -> bytes:
    """The payload of a pack."""
    table = bytearray([_VERSION])
    _write(table, len(runs))
    for run in runs:
        table.append(_CODES[run.kind])
        _write(table, len(run.lengths))
        if max(run.lengths) <= 0x7F:
            table += bytes(run.lengths)
        else:
            for length in run.lengths:
                _write(table, length)
    return b"".join((table, *(payload for run in runs for payload in run.payloads)))


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
