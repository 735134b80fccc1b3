"""Text and JSON that survive every hop."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.text import bytes_text, json_bytes, parse_json, parse_strangers_json, text_bytes

TEXTS = [
    "",
    "plain",
    "é, 漢字, العربية, 🙂",
    "\x00\x1f\x7f",
    "\u2028\u0085\r\n",
    "\ud83d",
    "\ude42\ud83d",
    "a\udfffb 🙂",
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_text_survives_as_bytes(text: str) -> None:
    assert bytes_text(text_bytes(text)) == text


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_text_survives_as_json(text: str) -> None:
    written = json_bytes({text: [text]})
    assert parse_json(written) == {text: [text]}
    assert json.loads(written) == {text: [text]}
    written.decode("utf-8")  # strictly


def test_ordinary_text_is_plain_utf_8() -> None:
    assert text_bytes("é🙂") == "é🙂".encode()
    assert json_bytes("é🙂") == '"é🙂"'.encode()


def test_halves_of_a_pair_that_meet_become_one_character_for_a_json_reader() -> None:
    joined = bytes_text(text_bytes("\ud83d") + text_bytes("\ude42"))
    assert json.loads(json_bytes(joined)) == "🙂"


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UnicodeDecodeError):
        bytes_text(b"\xff")


@pytest.mark.parametrize(
    "document", [b"", b"{", b"nul", b"NaN", b"[Infinity]", b"-Infinity", b'"\xff"', b"{'a':1}", b"[1,]", b"1" * 5000]
)
def test_what_is_not_json_is_refused(document: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(document)


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True]}, 2**70, -(2**70), {"1": 2}], ids=repr)
def test_values_that_json_has_survive(value: Any) -> None:
    assert parse_json(json_bytes(value)) == value


@pytest.mark.parametrize(
    "document",
    [b"[" + b"1," * 600_000 + b"1]", b"[" + b"[1,1]," * 190_000 + b"[1]]", b'["\\",", ' + b"1," * 2_100_000 + b"1]"],
    ids=["one list", "many lists", "a list beyond all measure"],
)
def test_very_many_values_are_refused(document: bytes) -> None:
    """To look at each of them would hold up everybody else."""
    with pytest.raises(ValueError, match="too many values"):
        parse_strangers_json(document)


def test_a_long_text_is_one_value() -> None:
    text = '1,"2",\\ 3,' * 1_000_000
    assert parse_strangers_json(json_bytes({"text": text})) == {"text": text}


@pytest.mark.parametrize("depth", [100, 199, 300, 990, 1000, 1010, 1024, 1100, 100_000])
def test_what_is_nested_too_deeply_is_refused_when_it_is_read(depth: int) -> None:
    """Not later: a request that was read is stored as JSON again, and must not fail then."""
    document = b"[" * depth + b"]" * depth
    try:
        value = parse_strangers_json(document)
    except ValueError:
        assert depth > 200, "what people send is not nested as deeply as this"
    else:
        stored = json_bytes({"request": {"params": {"around": {"it": value}}}})
        assert parse_json(stored)["request"]["params"]["around"]["it"] == value, "with what is put around it"
