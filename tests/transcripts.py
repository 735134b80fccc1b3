"""Conversations as clients really send them: whole histories, each in the dialect of its library.

The last message is a user's, to which a test may append a script for the model. `EXPECTED` names what of each the model
has to see, in order.
"""

from __future__ import annotations

from typing import Any

PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNgYAAAAAIAAeIhvDMAAAAASUVORK5CYII="
)


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# openai-python: the answers are dumped models, with every field that the server has left out as null.
OPENAI_SDK: list[dict[str, Any]] = [
    {"role": "developer", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is the weather in Paris?", "name": "ann"},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [_call("call_a", "weather", '{"city":"Paris"}'), _call("call_b", "time", '{"city":"Paris"}')],
    },
    {"role": "tool", "tool_call_id": "call_a", "content": "rain, 12 degrees"},
    {"role": "tool", "tool_call_id": "call_b", "content": [{"type": "text", "text": "ten past nine"}]},
    {
        "role": "assistant",
        "content": "It rains in Paris.",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    },
    {"role": "user", "content": "And tomorrow?", "name": "ann"},
]

# Open WebUI: a system prompt of the model, pictures in the question, an answer that was stopped before it began, and a
# question asked twice for that reason.
OPEN_WEBUI: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a helpful assistant. The user is Ann."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is on this picture?"},
            {"type": "image_url", "image_url": {"url": PNG}},
        ],
    },
    {"role": "assistant", "content": "A single pixel."},
    {"role": "user", "content": "Which colour has it?"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Which colour has it, please?"},
]

# LangChain: parts for everything, an empty content beside tool calls, a name on the tool's result, and a second system
# message in the middle, which its summarising memory puts there.
LANGCHAIN: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "You are a calculator."}]},
    {"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]},
    {"role": "assistant", "content": "", "tool_calls": [_call("toolu_1", "add", '{"a": 2, "b": 2}')]},
    {"role": "tool", "name": "add", "tool_call_id": "toolu_1", "content": "4"},
    {"role": "assistant", "content": [{"type": "text", "text": "It is four."}]},
    {"role": "system", "content": "Summary so far: the user likes sums."},
    {"role": "user", "content": [{"type": "text", "text": "Now double it."}]},
]

TRANSCRIPTS = {"openai-sdk": OPENAI_SDK, "open-webui": OPEN_WEBUI, "langchain": LANGCHAIN}

EXPECTED = {
    "openai-sdk": [
        "Answer in one sentence.",
        "What is the weather in Paris?",
        "call_a",
        "call_b",
        "rain, 12 degrees",
        "ten past nine",
        "It rains in Paris.",
        "And tomorrow?",
    ],
    "open-webui": [
        "The user is Ann.",
        "What is on this picture?",
        PNG,
        "A single pixel.",
        "Which colour has it?",
        "Which colour has it, please?",
    ],
    "langchain": [
        "You are a calculator.",
        "the user likes sums",
        "What is 2 + 2?",
        "toolu_1",
        "It is four.",
        "Now double it.",
    ],
}
