"""The schemas of what clients get by OpenAI's APIs: completions, responses, files, models, errors. No I/O."""

from __future__ import annotations

from typing import Final

from api.openapi.shapes import (
    ANY_OBJECT,
    BOOLEAN,
    COUNT,
    INTEGER,
    NUMBER,
    SECONDS,
    STRING,
    Schema,
    array,
    const,
    deleted,
    map_of,
    nullable,
    obj,
    one_of,
    page_of,
    ref,
    said,
)

_FINISH_REASON: Final = one_of("stop", "length", "tool_calls", "content_filter")
_METADATA: Final = map_of(STRING)

_COMMON: Final[dict[str, Schema]] = {
    "Error": obj(
        {
            "error": obj(
                {
                    "message": STRING,
                    "type": one_of("invalid_request_error", "rate_limit_error", "server_error"),
                    "param": said(nullable(STRING), "The field or parameter that is wrong."),
                    "code": said(nullable(STRING), "What is wrong, for programs."),
                }
            )
        },
        description="Every 4xx and 5xx but that of `GET /ready`.",
    ),
    "Model": obj({"id": STRING, "object": const("model"), "created": SECONDS, "owned_by": STRING}),
    "ModelList": obj({"object": const("list"), "data": array(ref("Model"))}),
    "Health": obj({"status": const("ok")}),
    "Ready": obj({"status": const("ready"), "workers": {"type": "integer", "minimum": 1}}),
    "NotReady": obj({"status": const("unavailable"), "missing": array(one_of("redis", "worker"))}),
    "File": obj(
        {
            "id": STRING,
            "object": const("file"),
            "bytes": COUNT,
            "created_at": SECONDS,
            "filename": STRING,
            "purpose": STRING,
            "status": const("processed"),
            "expires_at": SECONDS,
        }
    ),
    "FilePage": page_of(ref("File"), "Files of the tenant."),
    "FileDeleted": deleted("file"),
}

_CHAT: Final[dict[str, Schema]] = {
    "Usage": obj(
        {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
        description="Zeros where the agent does not know.",
    ),
    "ChatCompletion": obj(
        {
            "id": said(STRING, "The id of the job, too."),
            "object": const("chat.completion"),
            "created": SECONDS,
            "model": STRING,
            "choices": array(
                obj(
                    {
                        "index": INTEGER,
                        "message": obj(
                            {
                                "role": const("assistant"),
                                "content": nullable(STRING),
                                "refusal": {"type": "null"},
                                "annotations": array(ANY_OBJECT),
                                "reasoning_content": said(STRING, "What the agent thought, if it says so."),
                                "tool_calls": array(ref("ToolCall")),
                            },
                            optional=("reasoning_content", "tool_calls"),
                        ),
                        "logprobs": {"type": "null"},
                        "finish_reason": _FINISH_REASON,
                    }
                )
            ),
            "usage": ref("Usage"),
            "service_tier": const("default"),
            "system_fingerprint": {"type": "null"},
            "metadata": _METADATA,
        },
        description="A whole answer: the agent has finished, and everything it said is here.",
    ),
    "ChatCompletionChunk": obj(
        {
            "id": said(STRING, "The id of the job, too; the same on every chunk."),
            "object": const("chat.completion.chunk"),
            "created": SECONDS,
            "model": STRING,
            "system_fingerprint": {"type": "null"},
            "choices": array(
                obj(
                    {
                        "index": INTEGER,
                        "delta": obj(
                            {
                                "role": const("assistant"),
                                "content": STRING,
                                "reasoning_content": STRING,
                                "tool_calls": array(ANY_OBJECT),
                            },
                            optional=("role", "content", "reasoning_content", "tool_calls"),
                        ),
                        "logprobs": {"type": "null"},
                        "finish_reason": nullable(_FINISH_REASON),
                    }
                )
            ),
            "usage": {"anyOf": [ref("Usage"), {"type": "null"}]},
            "tool_event": said(ANY_OBJECT, "Ours. What a tool of the agent does, with `include_tool_events`."),
            "sequence_number": said(COUNT, "Ours. What `starting_after` takes."),
        },
        optional=("usage", "tool_event", "sequence_number"),
        description="The data of one event of a stream. A finish reason, and `[DONE]` behind it, come only if the "
        "answer is whole. Every other ending is one last event whose data is an `Error`.",
    ),
    "ChatCompletionPage": page_of(ref("ChatCompletion"), "Stored chat completions."),
    "ChatCompletionDeleted": deleted("chat.completion.deleted"),
    "StoredMessage": obj(
        {
            "id": STRING,
            "role": STRING,
            "content": nullable(STRING),
            "content_parts": nullable(array(ANY_OBJECT)),
            "name": nullable(STRING),
            "tool_calls": array(ANY_OBJECT),
            "tool_call_id": STRING,
        },
        optional=("tool_calls", "tool_call_id"),
    ),
    "StoredMessagePage": page_of(ref("StoredMessage"), "The messages of a stored completion's request."),
}

_RESPONSES: Final[dict[str, Schema]] = {
    "ResponseUsage": obj(
        {
            "input_tokens": COUNT,
            "input_tokens_details": map_of(COUNT),
            "output_tokens": COUNT,
            "output_tokens_details": map_of(COUNT),
            "total_tokens": COUNT,
        },
        description="Zeros where the agent does not know.",
    ),
    "ResponseItem": {
        "type": "object",
        "description": "An item as OpenAI's Responses API has it: `message`, `reasoning`, `function_call`, "
        "`function_call_output`, or `mcp_call` for the agent's own tools.",
        "properties": {"id": STRING, "type": STRING},
        "required": ["id", "type"],
        "additionalProperties": True,
    },
    "Response": obj(
        {
            "id": said(STRING, "The id of the job, too."),
            "object": const("response"),
            "created_at": SECONDS,
            "completed_at": nullable(SECONDS),
            "status": one_of("queued", "in_progress", "completed", "incomplete", "failed", "cancelled"),
            "background": BOOLEAN,
            "store": BOOLEAN,
            "error": nullable(obj({"code": STRING, "message": STRING, "type": STRING, "param": nullable(STRING)})),
            "incomplete_details": nullable(obj({"reason": STRING})),
            "metadata": _METADATA,
            "model": STRING,
            "output": said(array(ref("ResponseItem")), "Empty until the end, then all that was said."),
            "service_tier": STRING,
            "usage": {"anyOf": [ref("ResponseUsage"), {"type": "null"}]},
            "instructions": nullable(STRING),
            "previous_response_id": nullable(STRING),
            "conversation": nullable(obj({"id": STRING})),
            "parallel_tool_calls": BOOLEAN,
            "tool_choice": {"type": ["string", "object"]},
            "tools": array(ANY_OBJECT),
            "max_output_tokens": nullable(INTEGER),
            "max_tool_calls": nullable(INTEGER),
            "reasoning": ANY_OBJECT,
            "temperature": NUMBER,
            "top_p": NUMBER,
            "text": ANY_OBJECT,
            "truncation": one_of("auto", "disabled"),
            "prompt_cache_key": nullable(STRING),
            "safety_identifier": nullable(STRING),
            "top_logprobs": INTEGER,
            "user": nullable(STRING),
        },
    ),
    "ResponseEvent": {
        "type": "object",
        "description": "The data of one event of a stream, whose `event:` line is its `type`; types and shapes are "
        "OpenAI's. `response.completed` comes only if the answer is whole.",
        "properties": {"type": STRING, "sequence_number": COUNT},
        "required": ["type", "sequence_number"],
        "additionalProperties": True,
    },
    "ResponseItemPage": page_of(ref("ResponseItem"), "What the request itself brought."),
    "ResponseDeleted": deleted("response"),
}

ANSWER_SCHEMAS: Final[dict[str, Schema]] = {**_COMMON, **_CHAT, **_RESPONSES}
