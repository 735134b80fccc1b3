"""The agent that needs nothing: it answers with what it was asked. For first steps, demonstrations and tests."""

from __future__ import annotations

import asyncio
import re

from worker.agents.contract import Outcome, Turn, Usage, Voice
from worker.agents.media import last_user_message, parts_of, text_of

WORD = re.compile(r"\s*\S+\s*")


class EchoAgent:
    """Echoes the last user message word by word; the same turn always gives the same fragments."""

    name = "echo"

    def __init__(self, *, delay_per_word_s: float = 0.02) -> None:
        self._delay_per_word_s = delay_per_word_s  # long enough for a person to see it stream

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        question = last_user_message(turn.messages)
        kinds = [part.get("type") for part in parts_of(question)]
        counts = {"image": kinds.count("image_url"), "file": kinds.count("file"), "sound": kinds.count("input_audio")}
        received = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count)
        answer = " ".join(filter(None, [text_of(question), f"({received})" if received else ""]))
        words = WORD.findall(answer)
        for word in words:
            await voice.text(word)
            await asyncio.sleep(self._delay_per_word_s)
        asked = sum(len(WORD.findall(text_of(message))) for message in turn.messages)
        return Outcome(usage=Usage(prompt_tokens=asked, completion_tokens=len(words)))

    async def aclose(self) -> None:
        """Nothing is held."""
