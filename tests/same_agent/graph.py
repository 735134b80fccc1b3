from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from tests.same_agent import look, next_step


class _ChatModel(BaseChatModel):
    @property
    def _llm_type(self) -> str:
        return "test"

    def _generate(self, *_: Any, **__: Any) -> ChatResult:
        raise NotImplementedError

    async def _astream(self, messages: list[BaseMessage], *_: Any, **__: Any) -> AsyncIterator[ChatGenerationChunk]:
        said = [str(message.text) for message in messages if message.type == "human"]
        step = next_step(said, tool_has_run=messages[-1].type == "tool")
        if step.path is not None:
            call = {"name": "look", "args": json.dumps({"path": step.path}), "id": "call_1", "index": 0}
            yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[call]))
        for fragment in step.text:
            yield ChatGenerationChunk(message=AIMessageChunk(content=fragment))
        if step.breaks:
            raise ConnectionError("the model broke")


async def _answer(state: MessagesState) -> dict[str, Any]:
    return {"messages": [await _ChatModel().ainvoke(state["messages"])]}


agent = (
    StateGraph(MessagesState)
    .add_node("answer", _answer)
    .add_node("tools", ToolNode([tool(look)]))
    .add_edge(START, "answer")
    .add_conditional_edges("answer", tools_condition)
    .add_edge("tools", "answer")
    .compile()
)
