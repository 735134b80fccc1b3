"""A job as a command line that asks for the same again. Keys are named by a variable, never written. No I/O."""

from __future__ import annotations

import shlex
from typing import Any

from shared.text import json_bytes


def commands(job: dict[str, Any], base_url: str) -> list[tuple[str, str]]:
    """What each command does, and the command. `job` is as `GET /v1/jobs/{id}` answers."""
    url = f"{base_url}/v1/jobs/{job['id']}"
    found = [("Look at it", f"{_curl(url)}"), ("Watch it", f"{_curl(url + '/events', '-N')}")]
    asked = job["request"]
    if asked and job["kind"] == "chat" and not _holds_attachment(asked["messages"]):
        body = {"model": job["model"], "messages": asked["messages"], **asked["params"]}
        if job["metadata"]:
            body["metadata"] = job["metadata"]
        if job["session"]:
            body["session_id"] = job["session"].partition(":")[2]
        data = shlex.quote(json_bytes(body).decode())
        ask = f"{_curl(base_url + '/v1/chat/completions')} \\\n  -H 'Content-Type: application/json' \\\n  -d {data}"
        found.insert(0, ("Ask for the same", ask))
    return found


def _curl(url: str, *options: str) -> str:
    return " ".join(["curl", *options, shlex.quote(url), '-H "Authorization: Bearer $ENDMARK_KEY"'])


def _holds_attachment(value: object) -> bool:
    if isinstance(value, dict):
        return set(value) == {"attachment", "media_type"} or any(_holds_attachment(part) for part in value.values())
    return isinstance(value, list) and any(_holds_attachment(part) for part in value)
