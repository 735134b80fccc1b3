"""An agent of your own: an async generator of what it says and does.

    ENDMARK_AGENT=examples.generator_agent:agent make run

It keeps a session's shopping list in the session state, so every turn may run on another worker.
"""

import asyncio
import json
from collections.abc import AsyncIterator

from worker.agents.contract import Turn, Usage
from worker.agents.events import Done, Event, Reasoning, ToolCompleted, ToolStarted
from worker.agents.media import divide, text_of


async def agent(turn: Turn) -> AsyncIterator[Event]:
    """Answers one turn. Its end is the end of the answer; raise to fail the turn."""
    shopping: list[str] = json.loads(turn.session_state or b"[]")
    yield Reasoning("One more thing for the list.")
    yield ToolStarted("add")  # in Redis before the next line runs
    shopping.append(text_of(divide(turn).question))
    yield ToolCompleted("add")
    for word in ["On", "your", "list:", *shopping]:
        yield word + " "  # a plain string is text
        await asyncio.sleep(0.02)  # where a model would think
    yield Done(usage=Usage(completion_tokens=len(shopping)), session_state=json.dumps(shopping).encode())
