"""The Lua scripts of shared/lua, each with the key names and the shared parts put before it.

A script changes everything or nothing: Redis runs it without interruption, and each does what can be refused first.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Literal

from shared.keys import lua_names

ScriptName = Literal[
    "submit",
    "leave",
    "forget",
    "claim",
    "compact",
    "finish",
    "end",
    "release",
    "beat",
    "retire",
    "stale",
    "sweep",
    "put_file",
    "delete",
    "delete_file",
    "describe",
    "list_jobs",
    "count_jobs",
    "claim_webhooks",
    "settle_webhook",
]


@cache
def source(name: ScriptName) -> str:
    """The complete text of a script, as Redis runs it."""
    folder = files("shared") / "lua"
    parts = (folder / "_parts.lua").read_text()
    return "\n".join((lua_names(), parts, (folder / f"{name}.lua").read_text()))
