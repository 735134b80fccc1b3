"""Text of somebody else's, on a terminal."""

from __future__ import annotations

import re

from rich.text import Text

# What a terminal obeys instead of showing it: control characters, overriding directions, and halves of characters.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: object, style: str = "") -> Text:
    """What somebody else has written, to be shown and nothing else: neither to the terminal nor to rich a command."""
    return Text(_OBEYED.sub("\ufffd", str(text)), style=style)
