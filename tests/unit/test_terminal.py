"""What strangers write is shown on a terminal, and nothing else."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cli.terminal import plain


@pytest.mark.parametrize(
    "hostile",
    ["\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\x1b]52;c;aGk=\x07", "\u202egnp.exe", "\ud83d", "\x08\x08", "a\rb"],
)
def test_what_a_terminal_obeys_does_not_reach_it(hostile: str) -> None:
    shown = plain(f"before {hostile} after").plain
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert not any(character in shown for character in "\x1b\x9b\x07\x08\r\u202e\ud83d")


def test_text_stays_as_it_is() -> None:
    assert plain("Grüße, 🙂\n\tnächste Zeile").plain == "Grüße, 🙂\n\tnächste Zeile"


def test_what_looks_like_markup_is_text() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(plain("[/x] [link=http://evil]k[/link]"))
    assert out.getvalue().strip() == "[/x] [link=http://evil]k[/link]"
