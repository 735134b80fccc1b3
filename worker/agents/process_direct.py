"""Any object with nanobot's `process_direct` as an agent.

    await agent.process_direct(content=, media=, session_key=, channel="api", chat_id="default",
                               on_stream=, on_stream_end=)  ->  str | object with `.content` | None

    _connect_mcp()               optional; awaited once, before the first turn
    close_mcp(), aclose()        optional; called when the worker stops

Rule 1: only the return of `process_direct` ends a turn. `on_stream_end` ends a segment; a tool may run after it.
Rule 2: the agent keeps the history of a session, and gets the last message of the user. When the request brings its own
        history instead, an agent whose `process_direct` has a parameter `messages` gets it there; others get it written
        out before the question.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Sequence
from typing import Any

from worker.agents.contract import Outcome, Turn, Voice
from worker.agents.media import Message, divide, files_of, files_on_disk, parts_of, text_of


class ProcessDirectAgent:
    """Speaks nanobot's contract to a wrapped agent and ours to the worker."""

    def __init__(self, wrapped: Any, *, name: str | None = None) -> None:
        self.name = name or type(wrapped).__name__
        self._wrapped = wrapped
        self._takes_messages = "messages" in inspect.signature(wrapped.process_direct).parameters
        self._connecting = asyncio.Lock()
        self._connected = False

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        await self._connect_once()
        conversation = divide(turn)
        content = text_of(conversation.question)
        extra: dict[str, Any] = {}
        if conversation.earlier:
            if self._takes_messages:
                extra["messages"] = [dict(message) for message in turn.messages]
            else:
                content = f"{transcript(conversation.earlier)}\n\nThe user now says:\n{content}"

        async def on_stream(token: str) -> None:
            await voice.text(token)

        async def on_stream_end(*_args: object, **_kwargs: object) -> None:
            """A segment ended; see Rule 1."""

        async with files_on_disk(files_of(conversation.question)) as paths:
            answer = await self._wrapped.process_direct(
                content=content,
                media=paths or None,
                session_key=turn.session_key,
                channel="api",
                chat_id="default",
                on_stream=on_stream,
                on_stream_end=on_stream_end,
                **extra,
            )
        return Outcome(text=answer_text(answer))

    async def _connect_once(self) -> None:
        """Connect the agent's MCP servers; concurrent turns wait, and a failure leaves it to the next turn."""
        async with self._connecting:
            if not self._connected:
                await _call_if_present(self._wrapped, "_connect_mcp")
                self._connected = True

    async def aclose(self) -> None:
        try:
            await _call_if_present(self._wrapped, "close_mcp")
        finally:
            await _call_if_present(self._wrapped, "aclose")


async def _call_if_present(owner: object, method: str) -> None:
    """Call a method that an agent may lack and that may be sync or async."""
    function = getattr(owner, method, None)
    if function is not None:
        result = function()
        if inspect.isawaitable(result):
            await result


def answer_text(answer: Any) -> str | None:
    """What `process_direct` returned, as text: a string, an object with `.content`, or nothing."""
    content = getattr(answer, "content", answer)
    return None if content is None else str(content)


def transcript(messages: Sequence[Message]) -> str:
    """The earlier messages as plain text, each under its role; files are named, not included."""
    return "\n\n".join(["The conversation so far:", *(_written_out(message) for message in messages)])


def _written_out(message: Message) -> str:
    lines = [f"[{' '.join(filter(None, [message.get('role', 'user'), message.get('name')]))}]"]
    for part in parts_of(message):
        match part.get("type"):
            case "text" | "refusal":
                lines.append(str(part.get("text") or part.get("refusal") or ""))
            case "file":
                lines.append(f"(a file: {(part.get('file') or {}).get('filename') or 'unnamed'})")
            case kind:
                lines.append(f"({'an image' if kind == 'image_url' else 'a sound' if kind == 'input_audio' else kind})")
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        lines.append(
            f"(called {function.get('name')} with {json.dumps(function.get('arguments'), ensure_ascii=False)})"
        )
    return "\n".join(lines)
