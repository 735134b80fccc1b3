"""An agent for pictures: it answers any question about a deployment, at a pace that can be watched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from worker.agents.contract import AgentError, Turn, Usage
from worker.agents.events import Done, Event, Reasoning, ToolCompleted, ToolStarted
from worker.agents.media import divide, text_of

SAYING = (
    "The deployment finished at 14:02. Two of the five replicas restarted once, and both were ready again within "
    "eleven seconds. The error rate stayed below the threshold for the whole time, so nothing was rolled back."
)


async def agent(turn: Turn) -> AsyncIterator[Event]:
    question = text_of(divide(turn).question)
    pause_s = 0.3 if question.endswith("slowly.") else 0.01 * (1 + len(question) % 5)
    yield Reasoning("The user asks for the state of the deployment. I look at its events first.")
    yield ToolStarted("read_events", call_id="call_1", detail="deployment/checkout")
    await asyncio.sleep(pause_s)
    yield ToolCompleted("read_events", call_id="call_1", detail="14 events")
    if "cluster 4" in question:
        raise AgentError("The cluster does not answer.")
    for word in SAYING.split():
        yield f"{word} "
        await asyncio.sleep(pause_s)
    yield Done(usage=Usage(prompt_tokens=211, completion_tokens=len(SAYING.split())))
