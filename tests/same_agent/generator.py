from __future__ import annotations

import json
from collections.abc import AsyncIterator

from tests.same_agent import look, next_step
from worker.agents.contract import Turn, Usage
from worker.agents.events import Done, Event, ToolCompleted, ToolStarted
from worker.agents.media import divide, text_of


async def agent(turn: Turn) -> AsyncIterator[Event]:
    earlier: list[str] = json.loads(turn.session_state or b"[]")
    conversation = divide(turn)
    earlier += [text_of(message) for message in conversation.earlier if message["role"] == "user"]
    said = [*earlier, text_of(conversation.question)]
    step = next_step(said, tool_has_run=False)
    if step.path is not None:
        yield ToolStarted("look", "call_1")
        await look(step.path)
        yield ToolCompleted("look", "call_1")
        step = next_step(said, tool_has_run=True)
    for fragment in step.text:
        yield fragment
    if step.breaks:
        raise ConnectionError("the model broke")
    yield Done(usage=Usage(prompt_tokens=1, completion_tokens=2), session_state=json.dumps(said).encode())
