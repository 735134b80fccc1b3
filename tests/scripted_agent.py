"""An agent that does what the last user message says, for tests of the running service.

The message is plain text, which it answers with itself, or a JSON script:

    {"say": ["a", "b"]}                          says the fragments
    {"say": ["a"], "then": "raise"}              … then raises; also "hang", "exit", "die" (kill -9 of its worker),
                                                 "stubborn" (ignores its cancellation for two seconds),
                                                 "forgetful" (ignores only the first one)
    {"waits_for": "/path"}                       says nothing before this file is there
    {"blocks_until": "/path"}                    … and keeps the event loop from turning until then
    {"signs": true}                              says first which attempt it is, and leaves that to the next turn
    {"say": ["a"], "every_s": 0.1}               waits before each fragment
    {"say": ["a"], "times": 1000}                says the fragments again and again
    {"say": [], "returns": "text"}               returns text without having said any
    {"finish_reason": "length"}                  ends with it
    {"reasoning": ["hm"], "tools": ["search"]}   says these before the text
    {"tool_calls": [{…}]}                        fragments of a function call for the client
    {"recalls": true}                            says first what the turn before has left to it
    {"leaves": "text"}                           leaves this to the session's next turn
    {"log": "/path"}                             notes there what happens to the run: started, cancelled, finished
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from worker.agents.contract import Outcome, Turn, Usage, Voice
from worker.agents.media import divide, text_of

SECRET = "s3cret-of-the-agent"  # in the text of its exception; must reach no client


class ScriptedAgent:
    name = "scripted"

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        text = text_of(divide(turn).question)
        try:
            script = json.loads(text)
        except ValueError:
            script = None
        if not isinstance(script, dict):
            script = {"say": [text]}
        note = _notebook(script.get("log"), turn)
        note("started")
        try:
            while "waits_for" in script and not Path(script["waits_for"]).exists():
                await asyncio.sleep(0.01)
            while "blocks_until" in script and not Path(script["blocks_until"]).exists():
                time.sleep(0.01)  # that is what it is for
            if script.get("signs"):
                script["leaves"] = f"attempt {turn.attempt}"
                await voice.text(script["leaves"])
            if script.get("recalls"):
                await voice.text((turn.session_state or b"nothing").decode())
            await self._perform(script, voice)
        except asyncio.CancelledError:
            note("cancelled")
            raise
        note("finished")
        usage = Usage(prompt_tokens=len(turn.messages), completion_tokens=len(script.get("say", [])))
        return Outcome(
            finish_reason=script.get("finish_reason", "stop"),
            usage=usage,
            text=script.get("returns"),
            session_state=script["leaves"].encode() if "leaves" in script else None,
        )

    async def _perform(self, script: dict[str, Any], voice: Voice) -> None:
        for fragment in script.get("reasoning", []):
            await voice.reasoning(fragment)
        for name in script.get("tools", []):
            await voice.tool(name, "started", call_id="call_1")
            await voice.tool(name, "completed", call_id="call_1")
        for delta in script.get("tool_calls", []):
            await voice.tool_call(delta)
        for fragment in chain.from_iterable(repeat(script.get("say", []), script.get("times", 1))):
            if every_s := script.get("every_s"):
                await asyncio.sleep(every_s)
            await voice.text(fragment)
        match script.get("then"):
            case "raise":
                raise RuntimeError(SECRET)
            case "hang":
                await asyncio.Event().wait()
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                sys.exit(3)
            case "stubborn":
                await _ignore_cancellation(for_s=2)
            case "forgetful":
                with suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                await asyncio.Event().wait()

    async def aclose(self) -> None:
        """Nothing is held."""


async def _ignore_cancellation(*, for_s: float) -> None:
    """Returns `for_s` after the first cancellation."""
    with suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    until = asyncio.get_running_loop().time() + for_s
    while (left_s := until - asyncio.get_running_loop().time()) > 0:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(left_s)


def _notebook(path: str | None, turn: Turn) -> Any:
    """Appends lines to a file, each in one write, so that several workers can share it."""

    def note(what: str) -> None:
        if path is not None:
            with Path(path).open("a") as file:
                file.write(json.dumps({"what": what, "job": turn.job_id, "session": turn.session_key}) + "\n")

    return note


agent = ScriptedAgent()
