"""A compiled LangGraph graph whose state has `messages`. Importing this module imports LangChain's core.

The answer is what the graph adds to its messages as the AI's: said as it is written by a model that a node of this
graph asks, or when the step is over, if it comes from a subgraph or from code. What a model says inside of a tool, or
with LangGraph's own tag `nostream`, is no part of the answer, unless it ends up among the messages.

Rule 1: only an answer that its model ended is whole. An unknown finish reason is a failure, and so is none at all from
        a model that names its provider, of any message that is a part of the answer: no tool runs with the half of its
        arguments. Code and test models name none, and have ended when they return.
Rule 2: text once said is final. A model that breaks off after it has said something fails the turn, even if the graph
        would ask again: the client would read both.
Rule 3: a tool is announced before it runs: LangChain awaits a callback in between, and the callback awaits Redis.
Rule 4: a session's messages are its session state. The graph's own checkpointer is not used: it would keep what a
        failed turn has left.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final
from uuid import UUID, uuid4

from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ToolMessage,
    convert_to_messages,
    messages_from_dict,
    messages_to_dict,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, LLMResult
from langgraph.errors import GraphRecursionError
from langgraph.graph.state import CompiledStateGraph

from worker.agents.contract import AgentError, FinishReason, Outcome, Turn, Usage, Voice
from worker.agents.media import Message, divide_for_model, well_formed

# How providers say it, in lower case: in `finish_reason`, `stop_reason`, `stopReason` or `done_reason`.
FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "end_turn": "stop",  # Anthropic, Bedrock
    "stop_sequence": "stop",  # Anthropic, Bedrock
    "completed": "stop",  # OpenAI Responses
    "length": "length",
    "max_tokens": "length",  # Anthropic, Bedrock, Google
    "max_output_tokens": "length",  # OpenAI Responses
    "content_filter": "content_filter",
    "content_filtered": "content_filter",  # Bedrock
    "guardrail_intervened": "content_filter",  # Bedrock
    "refusal": "content_filter",  # Anthropic
    "safety": "content_filter",  # Google
}
REASON_FIELDS: Final = ("finish_reason", "stop_reason", "stopReason", "done_reason")
SUBGRAPH: Final = "|"  # in the checkpoint namespace of what runs in a subgraph
CUT_SHORT: Final = "The model behind the agent stopped in the middle of its answer."


class LangGraphAgent:
    """Runs a graph once for each turn."""

    def __init__(self, graph: CompiledStateGraph[Any, Any, Any, Any], *, name: str) -> None:
        self.name = name
        self._graph = graph.copy({"checkpointer": None})

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        conversation = divide_for_model(turn)
        earlier = langchain_messages(conversation.earlier) if turn.owns_history else remembered(turn.session_state)
        messages = [*earlier, *langchain_messages([conversation.question])]
        speech = _Speech(voice, known=messages)
        steps = self._graph.astream(
            {"messages": messages},
            {"callbacks": [speech], "configurable": {"thread_id": turn.session_key}},
            stream_mode=[
                "values",
                "messages",
            ],  # with `messages`, LangGraph has the models stream; we hear them ourselves
        )
        state: Any = {}
        try:
            async with aclosing(steps) as items:  # type: ignore[type-var]  # it is a generator
                async for mode, item in items:
                    if mode == "values":
                        state = item
                        await speech.add_unsaid(state.get("messages", ()))
        except GraphRecursionError as error:
            raise AgentError("The agent reached its limit of steps before it had an answer.") from error
        except Exception:
            speech.raise_if_broken()
            raise
        speech.raise_if_broken()
        if state.get("__interrupt__"):
            raise AgentError("The agent waits for an answer that it cannot be given here.")
        left = list(state.get("messages", ()))
        return Outcome(
            finish_reason=finish_reason(left),
            usage=speech.usage,
            session_state=None if turn.owns_history else state_of(left),
        )

    async def aclose(self) -> None:
        """A graph holds nothing that could be closed."""


class _Speech(AsyncCallbackHandler):
    """Says what one run does, as it happens. LangChain awaits each of these methods before the run goes on."""

    run_inline = True  # in order
    raise_error = True

    def __init__(self, voice: Voice, *, known: Sequence[BaseMessage]) -> None:
        self._voice = voice
        self._loop = asyncio.get_running_loop()
        self._known = {message.id for message in known}  # ids of the messages that have been said, or need not be
        self._models: dict[UUID, list[str]] = {}  # running models whose words are the answer: what they said
        self._said: list[str] = []  # texts of models that have not yet been found among the messages
        self._tools: dict[UUID, tuple[str, str]] = {}  # running tools: name and call id
        self._inside_tools: set[UUID] = set()  # runs that belong to a tool
        self._broken = False  # Rule 2
        self.usage: Usage | None = None

    async def _on_loop(self, saying: Coroutine[Any, Any, None]) -> None:
        """A node that is not async runs in a thread, and LangChain runs its callbacks in a loop of their own."""
        if asyncio.get_running_loop() is self._loop:
            await saying
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(saying, self._loop))

    def raise_if_broken(self) -> None:
        if self._broken:
            raise AgentError(CUT_SHORT)

    async def add_unsaid(self, messages: Sequence[BaseMessage]) -> None:
        """Says the AI's messages that no model of this graph has said. Takes the messages as they are after a step."""
        for message in messages:
            if message.id in self._known:
                continue
            self._known.add(message.id)
            text = str(message.text) if isinstance(message, AIMessage) else ""
            if text in self._said:
                self._said.remove(text)
            elif text:
                self.raise_if_broken()
                await self._voice.text(text)

    # -- models --------------------------------------------------------------------------------------------------------

    async def on_chat_model_start(
        self,
        *_: Any,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **__: Any,
    ) -> None:
        namespace = str((metadata or {}).get("langgraph_checkpoint_ns", ""))
        if SUBGRAPH not in namespace and parent_run_id not in self._inside_tools and "nostream" not in (tags or ()):
            self._models[run_id] = []

    async def on_llm_new_token(self, *_: Any, chunk: Any = None, run_id: UUID, **__: Any) -> None:
        said = self._models.get(run_id)
        if said is None or not isinstance(chunk, ChatGenerationChunk):
            return
        self.raise_if_broken()
        for block in chunk.message.content_blocks:
            if block["type"] == "text" and block["text"]:
                said.append(block["text"])
                await self._on_loop(self._voice.text(block["text"]))
            elif block["type"] == "reasoning":
                await self._on_loop(self._voice.reasoning(block.get("reasoning") or ""))

    async def on_llm_end(self, response: LLMResult, *, run_id: UUID, **_: Any) -> None:
        is_answer, said = run_id in self._models, self._models.pop(run_id, None)
        if said:
            self._said.append("".join(said))
        for generation in (generation for batch in response.generations for generation in batch):
            if isinstance(generation, ChatGeneration) and isinstance(generation.message, AIMessage):
                self._add_usage(generation.message)
                if is_answer and is_cut_short(generation.message):
                    self._refuse_cut(generation.message, said=bool(said))

    def _refuse_cut(self, message: AIMessage, *, said: bool) -> None:
        """Of a response with neither text nor tools nothing was lost; the graph may ask again."""
        self._broken = self._broken or said
        if said or message.tool_calls or message.invalid_tool_calls:  # LangChain completes the JSON of a tool call
            raise AgentError(CUT_SHORT)

    async def on_llm_error(self, *_: Any, run_id: UUID, **__: Any) -> None:
        if self._models.pop(run_id, None):
            self._broken = True

    def _add_usage(self, message: AIMessage) -> None:
        if (cost := message.usage_metadata) is not None:
            before = self.usage or Usage()
            self.usage = Usage(
                prompt_tokens=before.prompt_tokens + cost["input_tokens"],
                completion_tokens=before.completion_tokens + cost["output_tokens"],
            )

    # -- tools ---------------------------------------------------------------------------------------------------------

    async def on_chain_start(self, *_: Any, run_id: UUID, parent_run_id: UUID | None = None, **__: Any) -> None:
        if parent_run_id in self._inside_tools:
            self._inside_tools.add(run_id)

    async def on_tool_start(
        self, serialized: dict[str, Any], *_: Any, run_id: UUID, tool_call_id: str | None = None, **__: Any
    ) -> None:
        self._inside_tools.add(run_id)
        name, call_id = self._tools[run_id] = (str((serialized or {}).get("name", "")), tool_call_id or str(run_id))
        await self._on_loop(self._voice.tool(name, "started", call_id=call_id))

    async def on_tool_end(self, output: Any, *, run_id: UUID, **_: Any) -> None:
        failed = isinstance(output, ToolMessage) and output.status == "error"
        name, call_id = self._tools.pop(run_id)
        await self._on_loop(self._voice.tool(name, "failed" if failed else "completed", call_id=call_id))

    async def on_tool_error(self, *_: Any, run_id: UUID, **__: Any) -> None:
        name, call_id = self._tools.pop(run_id)
        await self._on_loop(self._voice.tool(name, "failed", call_id=call_id))


def finish_reason(messages: Sequence[BaseMessage]) -> FinishReason:
    """How the last message of a graph ended. Raises AgentError unless it is the end of an answer."""
    last = messages[-1] if messages else None
    if not isinstance(last, AIMessage):
        return "stop"  # the graph's own code had the last word
    if last.tool_calls:
        raise AgentError("The agent ended before it had run its tools.")
    if is_cut_short(last):
        raise AgentError(CUT_SHORT)
    if (reason := _reason(last)) is None:
        return "stop"
    if (known := FINISH_REASONS.get(str(reason).lower())) is None:
        raise AgentError("The model behind the agent ended its answer for an unknown reason.")
    return known


def is_cut_short(message: AIMessage) -> bool:
    """Whether a model of a provider said it, and did not say how it ended."""
    return bool(message.response_metadata.get("model_provider")) and _reason(message) is None


def _reason(message: AIMessage) -> Any:
    told = message.response_metadata
    return next((told[field] for field in REASON_FIELDS if told.get(field)), told.get("status"))


def langchain_messages(messages: Sequence[Message]) -> list[BaseMessage]:
    """OpenAI chat messages as LangChain's, each with an id."""
    converted = convert_to_messages([dict(message) for message in messages])
    for message in converted:
        message.id = message.id or str(uuid4())
    return converted


def state_of(messages: Sequence[BaseMessage]) -> bytes:
    """What `remembered` reads. Of a tool's artifact that is not JSON only its text is kept."""
    return json.dumps(messages_to_dict(messages), default=str).encode()


def remembered(session_state: bytes | None) -> list[BaseMessage]:
    """The messages that the session's last turn left. Raises AgentError if they are not LangChain's."""
    try:
        return messages_from_dict(well_formed(json.loads(session_state or b"[]")))
    except (ValueError, KeyError, TypeError) as error:
        raise AgentError("The session was begun by another agent. Go on with another session_id.") from error
