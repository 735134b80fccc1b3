"""Entries, markers and the tally: values and their bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest

from shared.entries import (
    BEGINNING,
    MAX_ENTRY_BYTES,
    Entry,
    EntryId,
    ErrorMarker,
    Kind,
    OkMarker,
    Tally,
    UnreadableEntryError,
    Usage,
    entry_from_fields,
    entry_from_message,
    entry_to_message,
    merge,
)


def test_ids_order_as_redis_orders_them() -> None:
    ids = [BEGINNING, EntryId(1, 0), EntryId(1, 1), EntryId(1, 2), EntryId(1, 10), EntryId(2, 0), EntryId(10, 0)]
    assert all(before < after for before, after in pairwise(ids))
    assert [EntryId.parse(str(entry_id)) for entry_id in ids] == ids


@pytest.mark.parametrize(
    ("before", "after", "follows"),
    [
        ("0-0", "1-0", True),
        ("1-0", "1-1", True),
        ("1-9", "1-10", True),
        ("1-0", "2-0", True),
        ("1-5", "3-0", True),
        ("1-0", "1-0", False),
        ("1-0", "1-2", False),
        ("1-2", "1-1", False),
        ("2-0", "1-1", False),
        ("1-0", "2-1", False),
        ("0-0", "1-1", False),
    ],
)
def test_what_may_come_right_after_an_entry(before: str, after: str, follows: bool) -> None:
    assert EntryId.parse(before).is_followed_by(EntryId.parse(after)) is follows


@pytest.mark.parametrize("raw", [b"", b"1", b"-", b"1-", b"-1", b"a-b", b"1-1-1", b"\xff-1"])
def test_what_is_no_id_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):
        EntryId.parse(raw)
    with pytest.raises(UnreadableEntryError):
        entry_from_fields(raw, [b"delta", b""])
    with pytest.raises(UnreadableEntryError):
        entry_from_message(raw + b" delta x")


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("payload", [b"", b" ", b"a b  c", b"\x00\n\xff", "🙂".encode()])
def test_an_entry_survives_both_ways(kind: Kind, payload: bytes) -> None:
    entry = Entry(EntryId(2, 17), kind, payload)
    assert entry_from_message(entry_to_message(entry)) == entry
    assert entry_from_fields(b"2-17", [kind.value.encode(), payload]) == entry
    assert entry_from_fields(b"2-17", {kind.value.encode(): payload}) == entry


@pytest.mark.parametrize("fields", [[b"gossip", b""], {b"delta": b"", b"ok": b""}, {}, [b"delta"], []])
def test_fields_that_are_no_entry_are_refused(fields: list[bytes] | dict[bytes, bytes]) -> None:
    with pytest.raises(UnreadableEntryError):
        entry_from_fields(b"1-1", fields)


@pytest.mark.parametrize("message", [b"", b"1-1", b"1-1 delta", b"1-1 gossip x", b"nonsense", b"1-1  delta x"])
def test_messages_that_are_no_entry_are_refused(message: bytes) -> None:
    with pytest.raises(UnreadableEntryError):
        entry_from_message(message)


@pytest.mark.parametrize("usage", [None, Usage(0, 0), Usage(3, 4)])
def test_an_ok_marker_survives(usage: Usage | None) -> None:
    marker = OkMarker(3, "digest", "length", usage)
    assert OkMarker.parse(marker.payload()) == marker


def test_an_error_marker_survives_any_text() -> None:
    marker = ErrorMarker("agent_error", 'half \ud83d, 🙂, "quoted" and \x00')
    assert ErrorMarker.parse(marker.payload()) == marker


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"x"',
        b"1",
        b"\xff",
        b'{"entries":"x","digest":"","finish_reason":"stop","usage":null}',
        b'{"entries":null,"digest":"","finish_reason":"stop","usage":null}',
        b'{"entries":1,"digest":"","finish_reason":"stop","usage":{"prompt_tokens":1}}',
        b'{"entries":1,"digest":"","finish_reason":"stop","usage":7}',
        b'{"entries":1,"digest":"","finish_reason":"stop"}',
    ],
)
def test_markers_that_cannot_be_read_are_refused(payload: bytes) -> None:
    with pytest.raises(UnreadableEntryError):
        OkMarker.parse(payload)
    with pytest.raises(UnreadableEntryError):
        ErrorMarker.parse(payload)


def tally_of(*payloads: bytes) -> Tally:
    tally = Tally()
    for payload in payloads:
        tally.add(Kind.DELTA, payload)
    return tally


def test_a_marker_confirms_only_the_tally_that_it_carries() -> None:
    tally = tally_of(b"a", b"bc")
    marker = OkMarker(tally.count, tally.digest, "stop", None)
    assert marker.confirms(tally_of(b"a", b"bc"))
    for other in (tally_of(), tally_of(b"a"), tally_of(b"a", b"bd"), tally_of(b"bc", b"a"), tally_of(b"a", b"bc", b"")):
        assert not marker.confirms(other)


def test_merging_joins_neighbours_of_one_kind() -> None:
    delta, reasoning, tool = Kind.DELTA, Kind.REASONING, Kind.TOOL
    said = [
        (reasoning, b"a"),
        (reasoning, b"b"),
        (delta, b"c"),
        (tool, b"1"),
        (tool, b"2"),
        (delta, b""),
        (delta, b"d"),
    ]
    assert merge(said) == [(reasoning, b"ab"), (delta, b"c"), (tool, b"1"), (tool, b"2"), (delta, b"d")]
    assert merge([]) == []


def test_merging_keeps_entries_below_their_limit_but_no_fragment_is_cut() -> None:
    large = b"x" * (MAX_ENTRY_BYTES + 1)
    half = b"y" * (MAX_ENTRY_BYTES // 2)
    merged = merge([(Kind.DELTA, payload) for payload in (half, half, b"z", large, b"a", b"b")])
    assert [payload for _, payload in merged] == [half + half, b"z", large, b"ab"]
