"""A pydantic-ai agent, run once for each turn. Importing this module imports pydantic-ai.

Rule 1: only an answer that its model ended is whole. pydantic-ai takes an OpenAI stream that just stops for one that
        ended; we look for the reason that the provider gave.
Rule 2: text is said as the model writes it. An agent that rejects an answer of which something was said, and has the
        model try again, has failed: the client would read both.
Rule 3: a tool is announced before it runs. pydantic-ai's run goes on only when its event handler asks for more.
Rule 4: a session's messages are its session state, in pydantic-ai's own JSON.
"""

from __future__ import annotations

import json
import mimetypes
import os
from collections.abc import AsyncIterable, Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError
from pydantic_ai import DeferredToolRequests, RunContext
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError, UsageLimitExceeded
from pydantic_ai.messages import (
    AgentStreamEvent,
    BinaryContent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelRequestPart,
    ModelResponse,
    ModelResponsePart,
    NativeToolCallPart,
    NativeToolReturnPart,
    OutputToolResultEvent,
    PartDeltaEvent,
    PartStartEvent,
    RetryFeedbackPart,
    SystemPromptPart,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    ToolCallPart,
    ToolReturnPart,
    UserContent,
    UserPromptPart,
)
from pydantic_core import to_json

from worker.agents.contract import AgentError, FinishReason, Outcome, Turn, Usage, Voice
from worker.agents.media import EncodedFile, Message, decode, divide_for_model, file_of, parts_of, text_of

FINISH_REASONS: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
}
os.environ.setdefault("PYDANTIC_AI_NO_BANNER", "1")  # it would be printed into the worker's log
CUT_SHORT: Final = "The model behind the agent stopped in the middle of its answer."


class PydanticAIAgent:
    """Runs a `pydantic_ai.Agent` without dependencies (`deps` is None)."""

    def __init__(self, wrapped: AbstractAgent[Any, Any], *, name: str) -> None:
        self.name = name
        self._wrapped = wrapped

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        conversation = divide_for_model(turn)
        if turn.owns_history:
            history = await self._with_own_prompt(history_of(conversation.earlier))
        else:
            history = remembered(turn.session_state)
        speech = _Speech(voice)
        try:
            result = await self._wrapped.run(
                content_of(conversation.question),
                message_history=history or None,
                event_stream_handler=speech.relay,
                infer_name=False,
            )
        except Exception as error:
            await speech.fail_unfinished_tools()
            if (message := _public_message(error)) is not None:
                raise AgentError(message) from error
            raise
        if isinstance(result.output, DeferredToolRequests):
            raise AgentError("The agent waits for a tool that somebody else has to run or approve.")
        if speech.output_by_tool:
            await voice.text(result.output if isinstance(result.output, str) else to_json(result.output).decode())
        return Outcome(
            finish_reason=finish_reason(result.response, speech.model, output_by_tool=speech.output_by_tool),
            usage=Usage(prompt_tokens=result.usage.input_tokens, completion_tokens=result.usage.output_tokens),
            session_state=None if turn.owns_history else state_of(result.all_messages()),
        )

    async def _with_own_prompt(self, history: list[ModelMessage]) -> list[ModelMessage]:
        """pydantic-ai takes a history to begin with the agent's system prompt; that of a client does not."""
        own = await self._wrapped.system_prompt_parts(message_history=history) if history else []
        return [ModelRequest(parts=own), *history] if own else history

    async def aclose(self) -> None:
        """pydantic-ai opens what its tools need for each run."""


class _Speech:
    """Says what one run does, as it happens."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._unfinished: dict[str, str] = {}  # call id: name of a tool that was announced
        self._said_of_response = False  # whether text of the model's latest response was said
        self.output_by_tool = False  # whether the answer is what an output tool was called with
        self.model: object = None  # that gave the latest response

    async def relay(self, context: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        """pydantic-ai calls this for each response of the model, and for each round of tools after it."""
        self.model = context.model
        self._refuse_second_try(context.messages)
        if context.messages and isinstance(asks_for_tools := context.messages[-1], ModelResponse):
            raise_if_cut_short(asks_for_tools, context.model)  # no tool runs with the half of its arguments
        async for event in events:
            match event:
                case PartStartEvent(part=part):
                    await self._begin(part)
                case PartDeltaEvent(delta=TextPartDelta(content_delta=fragment)):
                    await self._text(fragment)
                case PartDeltaEvent(delta=ThinkingPartDelta(content_delta=str(fragment))):
                    await self._voice.reasoning(fragment)
                case FunctionToolCallEvent(part=call, args_valid=bool()):  # None: it is not going to run
                    await self._start(call.tool_name, call.tool_call_id)
                case FunctionToolResultEvent(part=answer):
                    await self._end(answer)
                case OutputToolResultEvent(part=answer) if answer.outcome == "success":
                    self.output_by_tool = True

    def _refuse_second_try(self, messages: Sequence[ModelMessage]) -> None:
        """Rule 2."""
        latest = messages[-1] if messages else None
        if not isinstance(latest, ModelRequest):
            return
        if self._said_of_response and any(isinstance(part, RetryFeedbackPart) for part in latest.parts):
            raise AgentError("The agent rejected its answer after a part of it was said.")
        self._said_of_response = False

    async def _begin(self, part: ModelResponsePart) -> None:
        match part:
            case TextPart(content=content):
                await self._text(content)
            case ThinkingPart(content=content):
                await self._voice.reasoning(content)
            case NativeToolCallPart():  # the provider runs it
                await self._start(part.tool_name, part.tool_call_id)
            case NativeToolReturnPart():
                await self._end(part)

    async def _text(self, fragment: str) -> None:
        self._said_of_response = self._said_of_response or bool(fragment)
        await self._voice.text(fragment)

    async def _start(self, name: str, call_id: str) -> None:
        self._unfinished[call_id] = name
        await self._voice.tool(name, "started", call_id=call_id)

    async def _end(self, answer: ToolReturnPart | NativeToolReturnPart) -> None:
        if self._unfinished.pop(answer.tool_call_id, None) is not None:
            succeeded = answer.outcome == "success"
            await self._voice.tool(
                answer.tool_name, "completed" if succeeded else "failed", call_id=answer.tool_call_id
            )

    async def fail_unfinished_tools(self) -> None:
        """A tool that raises fails the run, without an event."""
        for call_id, name in self._unfinished.items():
            await self._voice.tool(name, "failed", call_id=call_id)


def finish_reason(response: ModelResponse, model: object, *, output_by_tool: bool = False) -> FinishReason:
    """How the last response of a run ended. Raises AgentError unless its model has ended it."""
    raise_if_cut_short(response, model)
    reason = response.finish_reason
    if reason is None and response.provider_url is None:  # no connection could have been cut: a test model, say
        return "stop"
    if reason is None:
        raise AgentError(CUT_SHORT)
    if reason == "tool_call" and output_by_tool:
        return "stop"
    if reason not in FINISH_REASONS:
        raise AgentError("The model behind the agent ended its answer for an unknown reason.")
    return FINISH_REASONS[reason]


def raise_if_cut_short(response: ModelResponse, model: object) -> None:
    """Raises AgentError if the stream of the response just stopped, as far as that can be told of any of a run."""
    guessed = response.finish_reason in ("stop", None) and "finish_reason" not in (response.provider_details or {})
    if response.state != "complete" or (guessed and is_from_openai_chat(response, model)):  # where none was given
        raise AgentError(CUT_SHORT)


def is_from_openai_chat(response: ModelResponse, model: object) -> bool:
    """Whether the model, or that of those which it wraps whose response it is, speaks OpenAI's chat completions.

    Its class may not be installed.
    """
    if any(base.__name__ == "OpenAIChatModel" for base in type(model).__mro__):
        return bool(getattr(model, "system", None) == response.provider_name)
    inner = [*getattr(model, "models", ()), getattr(model, "wrapped", None)]
    return any(is_from_openai_chat(response, other) for other in inner if other is not None)


def _public_message(error: Exception) -> str | None:
    match error:
        case ModelHTTPError():
            return f"The model behind the agent failed (HTTP {error.status_code})."
        case ModelAPIError():
            return "The connection to the model behind the agent failed."
        case UsageLimitExceeded():
            return "The agent reached its limit of usage before it had an answer."
        case _:
            return None


# -- messages ----------------------------------------------------------------------------------------------------------


def state_of(messages: list[ModelMessage]) -> bytes:
    """What `remembered` reads. Half of a surrogate pair, which pydantic-ai cannot read, becomes a question mark."""
    plain = ModelMessagesTypeAdapter.dump_python(messages, mode="json")
    return json.dumps(plain, ensure_ascii=False).encode(errors="replace")


def remembered(session_state: bytes | None) -> list[ModelMessage]:
    """The messages that the session's last turn left. Raises AgentError if they are not pydantic-ai's."""
    try:
        return ModelMessagesTypeAdapter.validate_json(session_state or b"[]")
    except ValidationError as error:
        raise AgentError("The session was begun by another agent. Go on with another session_id.") from error


def history_of(messages: Sequence[Message]) -> list[ModelMessage]:
    """OpenAI chat messages as pydantic-ai's."""
    tool_names = {
        call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()
    }
    return [_model_message(message, tool_names) for message in messages]


def _model_message(message: Message, tool_names: Mapping[str, str]) -> ModelMessage:
    part: ModelRequestPart
    match message.get("role"):
        case "assistant":
            text = text_of(message)
            calls = [
                ToolCallPart(call["function"]["name"], call["function"].get("arguments"), call["id"])
                for call in message.get("tool_calls") or ()
            ]
            return ModelResponse(parts=[*([TextPart(text)] if text else []), *calls])
        case "tool":
            call_id = str(message.get("tool_call_id"))
            part = ToolReturnPart(tool_names.get(call_id, "unknown"), text_of(message), call_id)
        case "system" | "developer":
            part = SystemPromptPart(text_of(message))
        case _:
            part = UserPromptPart(content_of(message))
    return ModelRequest(parts=[part])


def content_of(message: Message) -> str | list[UserContent]:
    """What the user says: a string, or text and files in their order. Raises AgentError if a file is elsewhere."""
    content: list[UserContent] = []
    for part in parts_of(message):
        if (file := file_of(part)) is not None:
            content.append(BinaryContent(decode(file), media_type=_media_type(file)))
        elif part.get("type") == "text":
            content.append(str(part.get("text") or ""))
    return content if any(isinstance(part, BinaryContent) for part in content) else text_of(message)


def _media_type(file: EncodedFile) -> str:
    return file.media_type or mimetypes.guess_type(file.filename or "")[0] or "application/octet-stream"
