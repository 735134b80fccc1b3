"""The Lua scripts of shared/lua, each with the key names and the shared parts that it uses put before it.

A script changes everything or nothing: Redis runs it without interruption, and each does what can be refused first.
What stands before a script is made anew each time that it runs, and then thrown away, so it is no more than is used.
"""

from __future__ import annotations

import re
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


_DEFINITION = re.compile(r"^local (?:function )?(\w+)", re.MULTILINE)
_COMMENT = re.compile(r"--.*")
_WORD = re.compile(r"[A-Za-z_]\w*")


@cache
def source(name: ScriptName) -> str:
    """The complete text of a script, as Redis runs it."""
    script = _read(name)
    used = _words(script)
    before: list[str] = []
    for defined, text in reversed(_definitions()):  # each uses only what stands before it
        if defined in used:
            before.append(text)
            used |= _words(text)
    return "\n".join((*reversed(before), script))


@cache
def _definitions() -> list[tuple[str, str]]:
    """Each local of the key names and of the shared parts, in their order, with its text."""
    text = _COMMENT.sub("", f"{lua_names()}\n{_read('_parts')}")
    starts = list(_DEFINITION.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    return [(start[1], text[start.start() : end].strip()) for start, end in zip(starts, ends, strict=True)]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(_COMMENT.sub("", text)))


def _read(name: str) -> str:
    return (files("shared") / "lua" / f"{name}.lua").read_text()
