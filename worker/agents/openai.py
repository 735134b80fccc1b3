"""Any OpenAI-compatible model as an agent, through the official SDK.

Rule 1: only a finish reason ends an answer. The SDK takes a stream that just stops for a whole one; we do not.
Rule 2: only the finish reasons that we know are a success. Clients take an unknown one for `stop`.
Rule 3: what the upstream says about its failure is logged, never shown.

The SDK repeats a request that failed before its answer began (twice, by default), and never after.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from json import JSONDecodeError
from typing import Any, Final, cast, get_args

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, AsyncOpenAI, AsyncStream
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk

from worker.agents.contract import AgentError, FinishReason, Outcome, Turn, Usage, Voice

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
        params = {name: value for name, value in turn.params.items() if name in FORWARDED_PARAMS}
        # The SDK's overloads cannot describe arguments that are only known at run time.
        create = cast(Any, self._client.chat.completions.create)
        stream = await create(
            model=self._model,
            messages=list(turn.messages),
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
    async for chunk in stream:
        if chunk.usage is not None:
            usage = _usage(chunk.usage)
        if not chunk.choices:
            continue
        choice = chunk.choices[0]
        if choice.finish_reason is not None:
            finish_reason = choice.finish_reason
        delta = choice.delta
        extra = delta.model_extra
        # Not in OpenAI's own API, but in that of DeepSeek, vLLM, OpenRouter, …
        if extra and (reasoning := extra.get("reasoning_content") or extra.get("reasoning")):
            await voice.reasoning(reasoning)
        if delta.content:
            await voice.text(delta.content)
        if delta.refusal:
            await voice.text(delta.refusal)
        if delta.tool_calls:
            for call in delta.tool_calls:
                await voice.tool_call(call.model_dump(exclude_none=True, warnings=False))
    if finish_reason is None:
        raise AgentError("The model behind the agent stopped in the middle of its answer.")
    if finish_reason not in FINISH_REASONS:
        raise AgentError("The model behind the agent ended its answer for an unknown reason.")
    return Outcome(finish_reason=cast(FinishReason, finish_reason), usage=usage)


def _usage(usage: CompletionUsage) -> Usage:
    # The SDK does not validate: an upstream may have left a count out.
    return Usage(prompt_tokens=usage.prompt_tokens or 0, completion_tokens=usage.completion_tokens or 0)


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
