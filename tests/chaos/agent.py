"""The agent of the chaos runs: says what it is asked for, and notes every word before it says it.

The last user message is JSON:
    label       names the request in the notes
    fragments   how many fragments it says, each marked with job, attempt and number
    every_s     pause before each
    size        characters that each is padded with
    fails       raise at the end
In a session it says first which turns have ended well so far, and leaves itself to that list.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from worker.agents.contract import Outcome, Turn, Voice

LOG_VARIABLE = "CHAOS_LOG"


class ChaosAgent:
    name = "chaos"

    def __init__(self) -> None:
        self._log = Path(os.environ[LOG_VARIABLE])

    def _note(self, **note: Any) -> None:
        """One write, so that several workers can share the file."""
        with self._log.open("a") as file:
            file.write(json.dumps(note) + "\n")

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        script = json.loads(turn.messages[-1]["content"])
        who = {"label": script["label"], "job": turn.job_id, "attempt": turn.attempt}
        self._note(what="started", **who)
        turns: list[str] = json.loads(turn.session_state or b"[]")

        async def say(text: str) -> None:
            self._note(what="said", text=text, **who)
            await voice.text(text)

        if script.get("recalls"):
            await say(json.dumps(turns))
        for number in range(script["fragments"]):
            if script["every_s"]:
                await asyncio.sleep(script["every_s"])
            await say(f"<{turn.job_id[-6:]}/{turn.attempt}.{number}{'.' * script['size']}>")
        if script.get("fails"):
            raise RuntimeError("as it was asked to")
        self._note(what="finished", **who)
        return Outcome(
            finish_reason="stop", session_state=json.dumps([*turns, script["label"]]).encode(), usage=None, text=None
        )

    async def aclose(self) -> None:
        """Nothing is held."""


def agent() -> ChaosAgent:
    return ChaosAgent()
