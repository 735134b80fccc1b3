"""One agent, three times: a generator, a pydantic-ai agent and a LangGraph graph, for tests of the running service.

What the user has said last is what it does:

    tool            uses its tool, then answers
    fail            says something, then its model breaks
    hang <path>     uses its tool, which notes in a file that it runs, never ends, and notes that it was cancelled
    (else)          answers with everything that the user has said, separated by commas
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    """What the model does next."""

    text: tuple[str, ...] = ()
    path: str | None = None  # the argument of a call of the tool; None: no call
    breaks: bool = False


def next_step(said: Sequence[str], *, tool_has_run: bool) -> Step:
    match said[-1].split(" ", 1):
        case ["tool"] if not tool_has_run:
            return Step(path="")
        case ["hang", path]:
            return Step(path=path)
        case ["fail"]:
            return Step(text=("half",), breaks=True)
        case _:
            return Step(text=tuple(", ".join(said)))


async def look(path: str) -> str:
    """Looks around."""
    if path:
        note = Path(path)
        note.write_text("running")
        try:
            await asyncio.Event().wait()
        finally:
            note.write_text("cancelled")
    return "a cat"
