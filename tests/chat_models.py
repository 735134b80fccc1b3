"""A LangChain chat model that gives scripted answers, for tests of LangGraph graphs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import Field

Step = str | AIMessageChunk | Exception | Callable[[], Awaitable[Any]]  # said, said, raised, awaited


class ScriptedChatModel(BaseChatModel):
    """Takes one list of steps for each request; `asked` keeps what it was asked."""

    answers: list[list[Any]]  # lists of Step
    asked: list[list[BaseMessage]] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    async def _astream(self, messages: list[BaseMessage], *_: Any, **__: Any) -> AsyncIterator[ChatGenerationChunk]:
        self.asked.append(messages)
        for step in self.answers.pop(0):
            match step:
                case str():
                    yield ChatGenerationChunk(message=AIMessageChunk(content=step))
                case AIMessageChunk():
                    yield ChatGenerationChunk(message=step)
                case Exception():
                    raise step
                case _:
                    await step()

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        """Without streaming, as a node that is not async asks: the texts of the answer."""
        self.asked.append(messages)
        text = "".join(self.answers.pop(0))
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=text))])


def call_of(name: str, arguments: str = "{}", call_id: str = "call_1") -> AIMessageChunk:
    """A chunk in which the model asks for a tool."""
    return AIMessageChunk(
        content="",
        tool_call_chunks=[{"name": name, "args": arguments, "id": call_id, "index": 0, "type": "tool_call_chunk"}],
    )
