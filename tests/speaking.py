"""Running one turn of an agent in a test: a turn with defaults, and a voice that records."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from worker.agents.contract import Outcome, ToolStatus, Turn


def a_turn(question: Any = "Hello", **changes: Any) -> Turn:
    """A turn whose only message is `question` (a string or parts), unless `messages` says otherwise."""
    defaults: dict[str, Any] = {
        "job_id": "chatcmpl-1",
        "attempt": 1,
        "messages": [{"role": "user", "content": question}],
        "session_key": "api:default",
        "owns_history": False,
        "model": "endmark",
    }
    return Turn(**(defaults | changes))


async def cancel_until_done(turn: asyncio.Task[Outcome]) -> None:
    """Cancels the turn as a worker does, which does it again to one that goes on."""
    while not turn.done():
        turn.cancel()
        await asyncio.wait({turn}, timeout=1)
    assert turn.cancelled()


class RecordingVoice:
    """Keeps everything said, in order, as `(kind, what)`."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []
        self.tool_details: list[tuple[str | None, str | None]] = []  # call id and detail of each tool event
        self.changed = asyncio.Event()  # set whenever something was said; a test may clear it

    def _keep(self, kind: str, what: Any) -> None:
        self.said.append((kind, what))
        self.changed.set()

    async def text(self, fragment: str) -> None:
        self._keep("text", fragment)

    async def reasoning(self, fragment: str) -> None:
        self._keep("reasoning", fragment)

    async def tool_call(self, delta: Mapping[str, Any]) -> None:
        self._keep("tool_call", dict(delta))

    async def tool(
        self, name: str, status: ToolStatus, *, call_id: str | None = None, detail: str | None = None
    ) -> None:
        self._keep("tool", (name, status))
        self.tool_details.append((call_id, detail))

    def all_of(self, kind: str) -> list[Any]:
        return [what for said_kind, what in self.said if said_kind == kind]

    @property
    def whole_text(self) -> str:
        return "".join(self.all_of("text"))
