from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel

from tests.same_agent import look, next_step


async def _stream(messages: list[ModelMessage], _: AgentInfo) -> AsyncIterator[Any]:
    parts = [part for message in messages for part in message.parts]
    said = [str(part.content) for part in parts if isinstance(part, UserPromptPart)]
    step = next_step(said, tool_has_run=parts[-1].part_kind == "tool-return")
    if step.path is not None:
        yield {0: DeltaToolCall(name="look", json_args=json.dumps({"path": step.path}), tool_call_id="call_1")}
    for fragment in step.text:
        yield fragment
    if step.breaks:
        raise ConnectionError("the model broke")


agent = Agent(FunctionModel(stream_function=_stream), tools=[look])
