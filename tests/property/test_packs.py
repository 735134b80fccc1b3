"""shared/packs.py: whoever unpacks has exactly what was said, and whatever else is in Redis is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.entries import Entry, EntryId, Kind, UnreadableEntryError
from shared.packs import PACK, PACK_BYTES, PACK_ENTRIES, Packer, Row, entries_from_row, unpack

SPOKEN = (Kind.DELTA, Kind.REASONING, Kind.TOOL_CALL, Kind.TOOL)
LAST = EntryId(3, 1000)

payloads = (
    st.binary(max_size=8)
    | st.builds(lambda size: b"x" * size, st.sampled_from([127, 128, 300, PACK_BYTES - 1, PACK_BYTES, PACK_BYTES + 1]))
    | st.sampled_from([b"", b" token"])
)
spoken = st.lists(st.tuples(st.sampled_from(SPOKEN), payloads, st.integers(1, 300)), max_size=8).map(
    lambda runs: [(kind, payload) for kind, payload, times in runs for _ in range(times if len(payload) < 9 else 1)]
)


def numbered(said: list[tuple[Kind, bytes]], *, attempt: int = 1, first: int = 1) -> list[Entry]:
    return [Entry(EntryId(attempt, number), kind, payload) for number, (kind, payload) in enumerate(said, start=first)]


def in_rows(entries: list[Entry], page: int = 100) -> list[Row]:
    packer = Packer()
    rows: list[Row] = []
    for number, entry in enumerate(entries, start=1):
        packer.add(entry)
        if number % page == 0:
            rows += packer.rows()
    return rows + packer.all_rows()


def pack(said: list[tuple[Kind, bytes]]) -> bytes:
    """The payload of the one pack that these entries become."""
    (row,) = in_rows(numbered(said))
    return row.payload


def stored(row: Row) -> tuple[bytes, list[bytes]]:
    return str(row.id).encode(), [row.name.encode(), row.payload]


@given(said=spoken, page=st.integers(1, 700), attempts=st.integers(1, 3))
def test_a_packed_stream_holds_exactly_the_same_entries(
    said: list[tuple[Kind, bytes]], page: int, attempts: int
) -> None:
    entries = [Entry(EntryId(number, 0), Kind.OPEN, b"worker") for number in range(1, attempts + 1)]
    entries += numbered(said, attempt=attempts)
    entries.append(Entry(EntryId(attempts, len(said) + 1), Kind.OK, b"{}"))
    rows = in_rows(entries, page)
    assert [entry for row in rows for entry in entries_from_row(*stored(row))] == entries
    assert all(before.id < after.id for before, after in pairwise(rows))
    for row in rows:
        held = entries_from_row(*stored(row))
        assert row.id == held[-1].id
        assert (row.name == PACK) == (len(held) > 1)
        assert len(held) <= PACK_ENTRIES
        assert len(held) == 1 or sum(len(entry.payload) for entry in held) <= PACK_BYTES
    for row in (*rows[:attempts], rows[-1]):
        assert row.name in (Kind.OPEN, Kind.OK), "openings and markers are rows of their own"


@given(said=spoken.filter(lambda said: len(said) > 2), data=st.data())
def test_a_gap_in_a_stream_is_still_there_when_it_is_packed(
    said: list[tuple[Kind, bytes]], data: st.DataObject
) -> None:
    entries = numbered(said)
    del entries[data.draw(st.integers(1, len(entries) - 2))]
    rows = in_rows(entries)
    assert [entry for row in rows for entry in entries_from_row(*stored(row))] == entries


def test_tokens_cost_little_more_than_their_bytes() -> None:
    rows = in_rows(numbered([(Kind.DELTA, b" token")] * 1000))
    assert len(rows) == 4
    assert sum(len(row.payload) for row in rows) <= 7100


@given(payload=st.binary(max_size=40))
def test_any_bytes_are_entries_that_follow_one_another_or_unreadable(payload: bytes) -> None:
    try:
        entries = unpack(LAST, payload)
    except UnreadableEntryError:
        return
    assert entries
    assert [entry.id.sequence for entry in entries] == list(range(1000 - len(entries) + 1, 1001))
    assert all(entry.kind in SPOKEN for entry in entries)


@given(said=st.lists(st.tuples(st.sampled_from(SPOKEN), st.binary(max_size=3)), min_size=2, max_size=5), data=st.data())
def test_a_pack_that_was_cut_or_grew_is_unreadable(said: list[tuple[Kind, bytes]], data: st.DataObject) -> None:
    whole = pack(said)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (whole[:cut], whole + b"x"):
        with pytest.raises(UnreadableEntryError):
            unpack(LAST, damaged)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x02\x01\x01\x01\x00", id="of another version"),
        pytest.param(b"\x01", id="without runs"),
        pytest.param(b"\x01\x00", id="of no run"),
        pytest.param(b"\x01\x01\x01\x00", id="of an empty run"),
        pytest.param(b"\x01\x01\x00\x01\x00", id="of no kind"),
        pytest.param(b"\x01\x01\x05\x01\x00", id="of an unknown kind"),
        pytest.param(b"\x01\x01\x01\x01\x02x", id="of a length beyond its end"),
        pytest.param(b"\x01\x01\x01\x01\x01xy", id="of a length before its end"),
        pytest.param(b"\x01\x01\x01\x01\xff\xff\xff\x7f", id="of a huge length"),
        pytest.param(b"\x01\x01\x01\x01\x80\x80\x80\x80\x00", id="of a number that is too long"),
        pytest.param(b"\x01\xff\xff\xff\x7f\x01\x01\x00", id="of a huge number of runs"),
        pytest.param(b"\x01\x01\x01\xff\xff\xff\x7f\x00", id="of a huge number of entries"),
        pytest.param(b"\x01\x01\x01\x81\x02" + bytes(257), id="of one entry too many"),
        pytest.param(b"\x01\x02\x01\x80\x02" + bytes(256) + b"\x01\x01\x00", id="of one entry too many in two runs"),
    ],
)
def test_a_pack_like_this_is_unreadable(payload: bytes) -> None:
    with pytest.raises(UnreadableEntryError):
        unpack(LAST, payload)


def test_a_pack_may_not_begin_before_the_first_entry() -> None:
    payload = pack([(Kind.DELTA, b"a"), (Kind.DELTA, b"b")])
    assert len(unpack(EntryId(1, 2), payload)) == 2
    with pytest.raises(UnreadableEntryError):
        unpack(EntryId(1, 1), payload)


@pytest.mark.parametrize("raw_id", [b"", b"1", b"a-b", b"\xff-1"])
def test_a_pack_with_what_is_no_id_is_unreadable(raw_id: bytes) -> None:
    with pytest.raises(UnreadableEntryError):
        entries_from_row(raw_id, [PACK.encode(), pack([(Kind.DELTA, b"a"), (Kind.DELTA, b"b")])])


@pytest.mark.parametrize("fields", [[b"gossip", b""], {b"pack": b"", b"ok": b""}, {}, [b"pack"], []])
def test_a_row_that_is_neither_entry_nor_pack_is_unreadable(fields: list[bytes] | dict[bytes, bytes]) -> None:
    with pytest.raises(UnreadableEntryError):
        entries_from_row(b"1-1", fields)


def test_the_example_of_the_protocol() -> None:
    said = [(Kind.REASONING, b"hm"), (Kind.DELTA, b"Hel"), (Kind.DELTA, b"lo")]
    assert pack(said) == bytes.fromhex("01 02 02 01 02 01 02 03 02") + b"hmHello"
