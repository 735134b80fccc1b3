"""An agent that makes the mistake which the last user message names: what anybody's first agent may do."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from worker.agents.contract import AgentError, Outcome, Turn, Usage, Voice

SURROGATE = "\ud83d"  # half of an emoji, as a client may send it and an exception quote it


class WithoutMessage(AgentError):
    def __init__(self) -> None:
        """Does not call that of its base."""


class MistakenAgent:
    name = "mistaken"

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        wrong: Any  # what no type checker would let pass
        match turn.messages[-1]["content"]:
            case "arguments that are no string":
                wrong = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": {"a": 1}}}
                await voice.tool_call(wrong)
            case "a call without an index":
                await voice.tool_call({"id": "call_1", "function": {"name": "f", "arguments": ""}})
            case "what is no JSON":
                await voice.tool_call({"index": 0, "function": {"name": "f"}, "x": [float("nan"), SURROGATE]})
            case "a status that there is not":
                wrong = "running"
                await voice.tool("f", wrong)
            case "a name that is no string":
                wrong = 1
                await voice.tool(wrong, "started")
            case "a word that is no string, which it does not mind":
                wrong = 42
                await voice.text("The answer is ")
                with suppress(Exception):
                    await voice.text(wrong)
                await voice.text(", as you asked.")
            case "more words than it may say, which it does not mind":
                for _ in range(40):
                    with suppress(Exception):
                        await voice.text("x" * 100)
            case "usage of a kind of its own":
                wrong = {"prompt_tokens": 1}
                return Outcome(text="42", usage=wrong)
            case "a text that is none":
                wrong = None
                await voice.text(wrong)
            case "a tool without a name":
                wrong = None
                await voice.tool(wrong, "started")
            case "a cancellation of its own":
                raise asyncio.CancelledError
            case "usage that no number holds":
                return Outcome(text="42", usage=Usage(prompt_tokens=2**70))
            case "usage below zero":
                return Outcome(text="42", usage=Usage(prompt_tokens=-1))
            case "an error without a message":
                raise WithoutMessage
            case "an error whose message is no string":
                wrong = ValueError("x")
                raise AgentError(wrong)
            case "half an emoji in an exception":
                raise ValueError(f"cannot read {SURROGATE}")
            case "half an emoji in a message":
                raise AgentError(f"cannot read {SURROGATE}")
        return Outcome(text="No such mistake.")

    async def aclose(self) -> None:
        """Nothing is held."""


agent = MistakenAgent()
