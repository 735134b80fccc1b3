"""Any OpenAI-compatible model as an agent, through the official SDK.

Rule 1: only a finish reason ends an answer. The SDK takes a stream that just stops for a whole one; we do not.
Rule 2: only the finish reasons that we know are a success. Clients take an unknown one for `stop`.
Rule 3: what the upstream says about its failure is logged, never shown.

The SDK repeats a request that failed before its answer began (twice, by default), and never after. It makes an object
of every chunk, which costs ten times as much as all else that a token costs a worker: so the answer is read as bytes.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from json import JSONDecodeError
from typing import Any, Final, cast, get_args

import orjson
from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from worker.agents.contract import AgentError, FinishReason, Outcome, Turn, Usage, Voice
from worker.agents.media import well_formed

# Request fields that change the answer and nothing about how it is delivered. The rest (`n`, `stream`, `store`, …) are
# ours to answer for, or not supported.
FORWARDED_PARAMS: Final = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "max_completion_tokens",
        "max_tokens",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt_cache_key",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "temperature",
        "tool_choice",
        "tools",
        "top_p",
        "user",
        "verbosity",
        "web_search_options",
    }
)
FINISH_REASONS: Final = frozenset(get_args(FinishReason))
DRAIN_S: Final = 0.1  # what the end of a body gets after [DONE]: a connection that was read to its end is used again


class OpenAIAgent:
    """Passes the conversation to an upstream model and its answer on as it comes."""

    name = "openai"

    def __init__(self, client: AsyncOpenAI, *, model: str) -> None:
        self._client = client
        self._model = model

    @classmethod
    def from_environment(cls, *, model: str, environ: Mapping[str, str] = os.environ) -> OpenAIAgent:
        """Read `OPENAI_API_KEY` and `OPENAI_BASE_URL`. Raises `openai.OpenAIError` if neither is set."""
        key, base_url = environ.get("OPENAI_API_KEY"), environ.get("OPENAI_BASE_URL")
        # Servers on one's own machine want no key, the SDK does.
        return cls(AsyncOpenAI(api_key=key or ("none" if base_url else None), base_url=base_url), model=model)

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        try:
            async with await self._ask(turn) as stream:
                return await _relay(stream, voice)
        except (APIError, JSONDecodeError) as error:
            raise AgentError(_public_message(error)) from error

    async def _ask(self, turn: Turn) -> AsyncStream[ChatCompletionChunk]:
        params = {name: well_formed(value) for name, value in turn.params.items() if name in FORWARDED_PARAMS}
        # The SDK's overloads cannot describe arguments that are only known at run time.
        create = cast(Any, self._client.chat.completions.create)
        stream = await create(
            model=self._model,
            messages=well_formed(list(turn.messages)),
            stream=True,
            stream_options={"include_usage": True},
            **params,
        )
        return cast("AsyncStream[ChatCompletionChunk]", stream)

    async def aclose(self) -> None:
        await self._client.close()


async def _relay(stream: AsyncStream[ChatCompletionChunk], voice: Voice) -> Outcome:
    """Say what the stream says, and how it ended. Raises `AgentError` if it did not end."""
    finish_reason: str | None = None
    usage: Usage | None = None
    async for chunk in _chunks(stream):
        if chunk.get("usage"):
            usage = _usage(chunk["usage"])
        if not chunk.get("choices"):
            continue
        choice = chunk["choices"][0]
        if choice.get("finish_reason"):  # some end with an empty one behind it
            finish_reason = choice["finish_reason"]
        delta = choice.get("delta") or {}
        # Not in OpenAI's own API, but in that of DeepSeek, vLLM, OpenRouter, …
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            await voice.reasoning(reasoning)
        if delta.get("content"):
            await voice.text(delta["content"])
        if delta.get("refusal"):
            await voice.text(delta["refusal"])
        for call in delta.get("tool_calls") or ():
            await voice.tool_call(_without_nulls(call))
    if finish_reason is None:
        raise AgentError("The model behind the agent stopped in the middle of its answer.")
    if finish_reason not in FINISH_REASONS:
        raise AgentError("The model behind the agent ended its answer for an unknown reason.")
    return Outcome(finish_reason=cast(FinishReason, finish_reason), usage=usage)


async def _chunks(stream: AsyncStream[ChatCompletionChunk]) -> AsyncIterator[dict[str, Any]]:
    """The chunks up to `[DONE]`, or to the end of the body. Raises APIError or JSONDecodeError, as the SDK does."""
    events = EventData()
    received = _received(stream)
    async for piece in received:
        for data in events.feed(piece):
            if data.startswith(b"[DONE]"):
                with suppress(TimeoutError, APIError):
                    async with asyncio.timeout(DRAIN_S):
                        async for _ in received:
                            pass
                return
            chunk = _parsed(data)
            if error := chunk.get("error"):
                raise APIError(f"in the stream: {error}", request=stream.response.request, body=error)
            yield chunk


async def _received(stream: AsyncStream[ChatCompletionChunk]) -> AsyncIterator[bytes]:
    try:
        async for piece in stream.response.aiter_bytes():
            yield piece
    except Exception as error:  # those of the HTTP client that this version of the SDK brings along
        request = stream.response.request
        if any(base.__name__ == "TimeoutException" for base in type(error).__mro__):
            raise APITimeoutError(request=request) from error
        raise APIConnectionError(request=request) from error


class EventData:
    """The `data` of server-sent events, as the bytes of a body come in. Their other fields do not matter here."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of a line that has not ended
        self._data: list[bytes] = []  # the lines of an event that has not ended

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that are complete now."""
        if b"\n" not in piece:
            self._pieces.append(piece)
            return []
        lines = (b"".join(self._pieces) + piece).splitlines(keepends=True)
        self._pieces = [] if lines[-1].endswith(b"\n") else [lines.pop()]
        complete: list[bytes] = []
        for raw_line in lines:
            line = raw_line.rstrip(b"\r\n")
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line and self._data:
                complete.append(b"\n".join(self._data))
                self._data.clear()
        return complete


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        chunk = json.loads(data)  # which reads lone surrogates, too
    if not isinstance(chunk, dict):
        raise JSONDecodeError("not an object", repr(chunk), 0)
    return chunk


def _without_nulls(value: Any) -> Any:
    """Without the fields of objects that are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return value


def _usage(usage: Mapping[str, int | None]) -> Usage:
    # An upstream may have left a count out.
    return Usage(prompt_tokens=usage.get("prompt_tokens") or 0, completion_tokens=usage.get("completion_tokens") or 0)


def _public_message(error: APIError | JSONDecodeError) -> str:
    match error:
        case APIStatusError():
            return f"The model behind the agent failed (HTTP {error.status_code})."
        case APITimeoutError():
            return "The model behind the agent did not answer in time."
        case APIConnectionError():
            return "The connection to the model behind the agent failed."
        case JSONDecodeError():
            return "The model behind the agent sent an answer that cannot be read."
        case _:
            return "The model behind the agent reported an error."
