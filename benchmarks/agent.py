"""The agent of the benchmarks: says stamped tokens on a clock. `ENDMARK_AGENT=benchmarks.agent:agent`.

What it says is written in the user's message, in the words of tests/upstream.py:

    [[mock k=200 i=20]]        200 tokens, one every 20 ms
    [[mock k=1000 i=0 b=8]]    as fast as they are taken; the event loop turns after every 8
    [[mock k=0]]               nothing: an agent that has finished at once

Every system that is measured runs this generator, in its own place. Where a model over HTTP is asked instead, Endmark
has its own agent for that (`ENDMARK_AGENT=openai`), the others the one of `speaker`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import TYPE_CHECKING

from tests.upstream import Script, stamped_token
from worker.agents.contract import Turn
from worker.agents.media import divide, text_of

if TYPE_CHECKING:
    from openai import AsyncOpenAI


async def agent(asked: str | Turn) -> AsyncIterator[str]:
    """The tokens that a user's message asks for, each stamped with the instant at which it is made.

    `asked`: the message, or the turn that has it.
    """
    script = Script.parse((asked if isinstance(asked, str) else text_of(divide(asked).question)).encode())
    now = asyncio.get_running_loop().time
    next_at = now() + script.first_token_delay_s
    for sequence in range(script.tokens):
        if script.interval_s or sequence == 0:
            if (wait_s := next_at - now()) > 0:
                await asyncio.sleep(wait_s)
            next_at += script.interval_s
        elif sequence % script.events_per_write == 0:
            await asyncio.sleep(0)
        yield stamped_token(sequence)


def speaker() -> Callable[[str], AsyncIterator[str]]:
    """Who answers a user's message: a model, if `OPENAI_BASE_URL` names one."""
    return model if "OPENAI_BASE_URL" in os.environ else agent


async def model(asked: str) -> AsyncIterator[str]:
    """What a model says, through its SDK as the documentation of that shows it."""
    stream = await _client().chat.completions.create(
        model="mock", messages=[{"role": "user", "content": asked}], stream=True
    )
    async for chunk in stream:
        if chunk.choices and (content := chunk.choices[0].delta.content):
            yield content


@cache
def _client() -> AsyncOpenAI:
    # Only who asks a model pays for its SDK: a seam with all of its objects in the heap collects garbage for 60 ms.
    from openai import AsyncOpenAI

    return AsyncOpenAI()
