"""An agent with nanobot's contract that answers with what it was called with, as JSON."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path

OnStream = Callable[[str], Awaitable[None]]


class ProcessDirectAgent:
    """Streams its answer in two segments: the end of the first one is not the end of the answer."""

    def __init__(self) -> None:
        self.connected = 0

    async def _connect_mcp(self) -> None:
        self.connected += 1

    async def process_direct(
        self,
        content: str,
        media: list[str] | None = None,
        session_key: str = "",
        channel: str = "",
        chat_id: str = "",
        on_stream: OnStream | None = None,
        on_stream_end: Callable[..., Awaitable[None]] | None = None,
    ) -> str:
        called = {
            "content": content,
            "media": {Path(path).name: Path(path).read_bytes().decode("latin-1") for path in media or []},
            "paths": media,
            "session_key": session_key,
            "channel": channel,
            "chat_id": chat_id,
            "connected": self.connected,
        }
        answer = json.dumps(called)
        if on_stream is None or on_stream_end is None:
            return "the callbacks were not passed"
        await on_stream(answer[:10])
        await on_stream_end(resuming=True)
        await on_stream(answer[10:])
        await on_stream_end(resuming=False)
        return answer


def make() -> ProcessDirectAgent:
    return ProcessDirectAgent()
