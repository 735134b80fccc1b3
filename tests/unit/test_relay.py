"""What a client may believe."""

from __future__ import annotations

import pytest

from api.relay import INCOMPLETE, Relay
from shared.entries import Entry, EntryId, ErrorMarker, Kind, OkMarker, Tally, Usage

OPEN = Entry(EntryId(1, 0), Kind.OPEN, b"worker")


def said(*payloads: bytes, kind: Kind = Kind.DELTA, attempt: int = 1) -> list[Entry]:
    return [Entry(EntryId(attempt, number), kind, payload) for number, payload in enumerate(payloads, start=1)]


def ok(entries: list[Entry], *, attempt: int = 1) -> Entry:
    tally = Tally()
    for entry in entries:
        tally.add(entry.kind, entry.payload)
    marker = OkMarker(tally.count, tally.digest, "stop", Usage(1, 2))
    return Entry(EntryId(attempt, tally.count + 1), Kind.OK, marker.payload())


def error(code: str = "agent_error") -> Entry:
    return Entry(EntryId(1, 9), Kind.ERROR, ErrorMarker(code, "message").payload())


def has_ended(relay: Relay) -> bool:
    return relay.ending is not None


def test_a_whole_answer_ends_well() -> None:
    relay, entries = Relay(), said(b"a", b"b")
    assert relay.accept([OPEN]) == [OPEN]
    assert relay.accept(entries[:1]) == entries[:1]
    assert not has_ended(relay)
    assert relay.accept([entries[1], ok(entries)]) == entries[1:]
    assert isinstance(relay.ending, OkMarker)
    assert (relay.ending.finish_reason, relay.ending.usage) == ("stop", Usage(1, 2))


def test_an_empty_answer_is_whole() -> None:
    relay = Relay()
    assert relay.accept([OPEN, ok([])]) == [OPEN]
    assert isinstance(relay.ending, OkMarker)


def test_everything_that_was_said_counts_even_what_this_wire_does_not_show() -> None:
    relay = Relay()
    entries = said(b"{}", kind=Kind.TOOL)
    assert relay.accept([OPEN, *entries, ok(entries)]) == [OPEN, *entries]
    assert isinstance(relay.ending, OkMarker)


def test_an_error_marker_ends_an_answer_as_it_says() -> None:
    relay, entries = Relay(), said(b"a")
    assert relay.accept([OPEN, *entries, error("worker_lost")]) == [OPEN, *entries]
    assert relay.ending == ErrorMarker("worker_lost", "message")


def test_nothing_is_passed_on_after_a_marker() -> None:
    entries = said(b"a")
    for marker in (ok(entries), error()):
        relay = Relay()
        assert relay.accept([OPEN, *entries, marker, *said(b"b"), ok(said(b"b"))]) == [OPEN, *entries]
        ending = relay.ending
        assert relay.accept(said(b"c")) == []
        assert relay.accept([error("other")]) == []
        assert relay.ending is ending


def test_a_second_attempt_before_anything_was_passed_on_is_as_good_as_the_first() -> None:
    relay, entries = Relay(), said(b"a", attempt=2)
    again = OPEN._replace(id=EntryId(2, 0))
    assert relay.accept([OPEN, again, *entries, ok(entries, attempt=2)]) == [OPEN, again, *entries]
    assert isinstance(relay.ending, OkMarker)


def test_a_second_attempt_after_something_was_passed_on_makes_the_answer_incomplete() -> None:
    relay, entries = Relay(), said(b"a")
    assert relay.accept([OPEN, *entries, OPEN._replace(id=EntryId(2, 0)), *said(b"a", attempt=2)]) == [OPEN, *entries]
    assert relay.ending == INCOMPLETE


@pytest.mark.parametrize("kind", [Kind.OK, Kind.ERROR])
def test_a_marker_that_cannot_be_read_is_no_end_of_a_whole_answer(kind: Kind) -> None:
    relay = Relay()
    relay.accept([OPEN, Entry(EntryId(1, 1), kind, b"nonsense")])
    assert relay.ending == INCOMPLETE


def test_an_entry_that_changed_its_kind_is_not_what_the_agent_said() -> None:
    """Reasoning shown as the answer is a wrong answer."""
    thought = said(b"a secret thought", kind=Kind.REASONING)
    relay = Relay()
    relay.accept([OPEN, *said(b"a secret thought"), ok(thought)])
    assert relay.ending == INCOMPLETE
