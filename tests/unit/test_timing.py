"""When entries were said, in few bytes."""

from __future__ import annotations

import zlib
from contextlib import suppress
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.timing import UnreadableTimingError, decode, encode

gaps = st.lists(st.integers(0, 10**8), max_size=200)


@given(gaps)
def test_what_was_encoded_is_decoded(gaps: list[int]) -> None:
    offsets = list(accumulate(gaps))
    assert decode(encode(offsets)) == offsets


def test_a_clock_that_goes_back_stands_still() -> None:
    assert decode(encode([5, 3, 9])) == [5, 5, 9]


def test_a_paced_answer_takes_little() -> None:
    assert len(encode(range(0, 20_000, 20))) < 100


@pytest.mark.parametrize(
    "timing",
    [
        b"",
        b"\x02" + zlib.compress(b"\x01"),
        b"\x01nonsense",
        b"\x01" + zlib.compress(b"\x01" * 100)[:-5],
        b"\x01" + zlib.compress(b"\x80"),
        b"\x01" + zlib.compress(b"\xff" * 6 + b"\x01"),
        b"\x01" + zlib.compress(bytes(10**7)),
    ],
    ids=["empty", "another version", "no deflate", "cut", "a cut number", "a huge number", "a bomb"],
)
def test_what_is_no_timing_is_refused(timing: bytes) -> None:
    with pytest.raises(UnreadableTimingError):
        decode(timing)


@given(st.binary(max_size=50))
def test_any_bytes_are_decoded_or_refused(junk: bytes) -> None:
    with suppress(UnreadableTimingError):
        decode(b"\x01" + zlib.compress(junk))
