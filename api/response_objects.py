"""Responses and their items as OpenAI's clients know them. No I/O, no clock.

Rule 1: what a response repeats of its request is kept in its job record (`echo`), so that every replica shows the
        same object at any time.
Rule 2: the id of an item is made from the id of its response and its place, so that it can be found without an index.

The shapes are those of docs/protocol.md, measured against the SDKs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shared.entries import Usage
from shared.jobs import JobRecord, Submission

JOB_PREFIX = "resp_"
_JOB_ID = re.compile(r"resp_[0-9a-f]{32}")
_ITEM_ID = re.compile(r"(?:msg|rs|mcp|fc)_([0-9a-f]{32})_[0-9]{1,6}")


class Echo(NamedTuple):
    """What is kept of a request, to show its response and to build later ones upon it."""

    fields: dict[str, Any]  # of the response object: instructions, tools, temperature, ...
    before: int  # how many of the job's messages precede its input: instructions, and what earlier responses hold

    def to_json(self) -> dict[str, Any]:
        return self._asdict()

    @property
    def has_instructions(self) -> bool:
        """Whether the first of the job's messages is the instructions, which belong to this turn alone."""
        return self.fields["instructions"] is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """What a response says before anything is known of its answer; it never changes."""

    job_id: str
    created_s: int  # since the epoch
    model: str
    background: bool
    store: bool
    metadata: dict[str, str]
    fields: dict[str, Any]  # see Echo

    @classmethod
    def of_submission(cls, job: Submission, *, job_id: str, created_s: int) -> ResponseHead:
        """`job_id`: another one than that of the submission if the request has come before."""
        return cls(
            job_id=job_id,
            created_s=created_s,
            model=job.model,
            background=job.background,
            store=job.store,
            metadata=job.metadata,
            fields=Echo(**job.echo).fields,
        )

    @classmethod
    def of_record(cls, job: JobRecord) -> ResponseHead:
        return cls(
            job_id=job.job_id,
            created_s=job.created_s,
            model=job.model,
            background=job.background,
            store=job.store,
            metadata=job.metadata,
            fields=Echo(**job.echo).fields,
        )

    def response(
        self,
        status: str,
        output: Sequence[dict[str, Any]] = (),
        *,
        completed_s: int | None = None,
        usage: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
        incomplete_reason: str | None = None,
    ) -> dict[str, Any]:
        """The response object in one of its states."""
        return {
            "id": self.job_id,
            "object": "response",
            "created_at": self.created_s,
            "completed_at": completed_s,
            "status": status,
            "background": self.background,
            "store": self.store,
            "error": error,
            "incomplete_details": incomplete_reason and {"reason": incomplete_reason},
            "metadata": self.metadata,
            "model": self.model,
            "output": list(output),
            "service_tier": "default",
            "usage": usage,
            **self.fields,
        }


def usage_object(usage: Usage | None) -> dict[str, Any]:
    """Zeros where the agent does not know: some clients fail on an ending without numbers."""
    asked, said = usage or (0, 0)
    return {
        "input_tokens": asked,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": said,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": asked + said,
    }


def error_object(code: str, message: str) -> dict[str, Any]:
    """Some clients lose the message of an error without a `type`."""
    return {"code": code, "message": message, "type": "server_error", "param": None}


def is_response_id(given: str) -> bool:
    """Whether there may be such a response."""
    return _JOB_ID.fullmatch(given) is not None


# -- items -------------------------------------------------------------------------------------------------------------


def item_id(kind: str, job_id: str, place: int | str) -> str:
    """`kind`: msg, rs, mcp, fc or fco. `place`: in the output from 0, or `in` and the place in the input."""
    return f"{kind}_{job_id.removeprefix(JOB_PREFIX)}_{place}"


def job_of_item(given: str) -> str | None:
    """The response whose output the item may be in; None for what is no id of an output item."""
    match = _ITEM_ID.fullmatch(given)
    return match and f"{JOB_PREFIX}{match[1]}"


def output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def input_items(messages: Sequence[Mapping[str, Any]], job_id: str) -> list[dict[str, Any]]:
    """The input of a response, from the messages that were made of it.

    What was only referred to is there as what it refers to, what was ignored is not. Of a file that came inside the
    request only its name is left.
    """
    items: list[dict[str, Any]] = []

    def place() -> str:
        return f"in{len(items)}"

    for message in messages:
        role, content = message["role"], message.get("content")
        if role == "tool":
            output = content if isinstance(content, str) else [_input_part(part) for part in content or ()]
            items.append(
                {
                    "id": item_id("fco", job_id, place()),
                    "type": "function_call_output",
                    "call_id": message["tool_call_id"],
                    "output": output,
                    "status": "completed",
                }
            )
            continue
        if content is not None:
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            shown = _said_part if role == "assistant" else _input_part
            items.append(
                {
                    "id": item_id("msg", job_id, place()),
                    "type": "message",
                    "status": "completed",
                    "role": role,
                    "content": [shown(part) for part in parts],
                }
            )
        for call in message.get("tool_calls") or ():
            items.append(
                {
                    "id": item_id("fc", job_id, place()),
                    "type": "function_call",
                    "call_id": call["id"],
                    "name": call["function"]["name"],
                    "arguments": call["function"]["arguments"],
                    "status": "completed",
                }
            )
    return items


def _said_part(part: Mapping[str, Any]) -> dict[str, Any]:
    return dict(part) if part["type"] == "refusal" else output_text(part["text"])


def _input_part(part: Mapping[str, Any]) -> dict[str, Any]:
    match part["type"]:
        case "image_url":  # its file is gone, or is going to be
            detail = part["image_url"].get("detail") or "auto"
            return {"type": "input_image", "detail": detail, "image_url": None, "file_id": None}
        case "file" if "detail" in part:
            file_id = part["file"]["file_id"]
            return {"type": "input_image", "detail": part["detail"], "image_url": None, "file_id": file_id}
        case "file":
            file = part["file"]
            return {"type": "input_file", "filename": file.get("filename"), "file_id": file.get("file_id")}
        case _:
            return {"type": "input_text", "text": part["text"]}
