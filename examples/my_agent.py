"""An agent of your own: any object with `process_direct`.

    ENDMARK_AGENT=examples.my_agent:agent make run

It remembers what each session said, in a dict of its worker process: with several workers, keep it somewhere shared.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any


class MemoryAgent:
    def __init__(self) -> None:
        self._said: defaultdict[str, list[str]] = defaultdict(list)

    async def process_direct(
        self, *, content: str, session_key: str, on_stream: Callable[[str], Awaitable[None]], **_: Any
    ) -> str:
        """Answers one turn. To return is to have finished; raise to fail the turn."""
        said = self._said[session_key]
        said.append(content)
        answer = f"You have said {len(said)} things, first {said[0]!r}, last {content!r}."
        for word in answer.split(" "):
            await on_stream(word + " ")
            await asyncio.sleep(0.02)  # where a model would think
        return answer  # delivered only if nothing was streamed


agent = MemoryAgent()
