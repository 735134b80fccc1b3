"""The clients of a chaos run: OpenAI's SDK as most people use it, and one that looks at every byte."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from tests.chaos.cluster import LONGEST_JOB_S, Cluster
from tests.deployment import KEY


@dataclass
class Told:
    """What one client was told of one request."""

    label: str
    api: int
    session: str | None
    started: float  # time.monotonic, as `ended`
    ended: float = 0.0
    job_id: str | None = None
    text: str = ""
    outcome: str = ""  # success | left | connection | hung | silent | an error code
    headed: bool = False  # whether the head of a 200 had come
    complaints: list[str] = field(default_factory=list)  # rules of the wire that were broken

    def __str__(self) -> str:
        return (
            f"{self.label} ({self.job_id}, api {self.api}, session {self.session}): {self.outcome} after "
            f"{self.ended - self.started:.2f} s, {len(self.text)} characters {self.complaints}"
        )


class Load:
    """Clients that ask again and again until they are told to stop."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.told: list[Told] = []
        self.sessions = [f"session-{number}" for number in range(4)]
        self._cluster = cluster
        self._seed = seed
        self._stopping = False

    async def run(self) -> None:
        """Until `stop`, and then until every open request has been answered."""
        async with asyncio.TaskGroup() as clients:
            for number, session in enumerate(self.sessions):
                clients.create_task(self._client(f"s{number}", session, self.stream_by_sdk))
            for number in range(4):
                clients.create_task(self._client(f"p{number}", None, self.stream_by_sdk))
            for number in range(3):
                clients.create_task(self._client(f"r{number}", None, self.stream_by_bytes))
            clients.create_task(self._client("w0", None, self.ask_whole))
            clients.create_task(self._client("q0", None, self._leave))
            clients.create_task(self._client("l0", None, self._read_slowly))

    def stop(self) -> None:
        self._stopping = True

    async def _client(self, name: str, session: str | None, ask: Any) -> None:
        dice = random.Random(f"{self._seed} {name}")
        number = 0
        while not self._stopping:
            number += 1
            steps = {
                "fragments": dice.choice([0, 1, 3, 10, 30]),
                "every_s": dice.choice([0, 0, 0.02, 0.1]),
                "size": dice.choice([0, 5, 200, 5000]),
            }
            if dice.random() < 0.08:
                steps["fails"] = True
            api = dice.randrange(len(self._cluster.apis))
            told = await self.ask(ask, f"{name}.{number}", api, session, steps)
            if told.outcome in ("connection", "queue_unreachable"):
                await asyncio.sleep(0.2)  # no client asks a dead API without a pause

    async def ask(self, how: Any, label: str, api: int, session: str | None, steps: dict[str, Any]) -> Told:
        told = Told(label, api, session, time.monotonic())
        self.told.append(told)
        script = steps | {"label": label} | ({"recalls": True} if session else {})
        try:
            async with asyncio.timeout(LONGEST_JOB_S):
                await how(told, json.dumps(script))
        except TimeoutError:
            told.outcome = "hung"
        except openai.APIConnectionError:
            told.outcome = "connection"
        except httpx.TransportError:
            told.outcome = "connection"
        except openai.APIError as error:
            told.outcome = error.code or f"an error without a code: {error!r}"
        told.ended = time.monotonic()
        return told

    def _sdk(self, api: int) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self._cluster.base_url(api)}/v1", api_key=KEY, max_retries=0, timeout=LONGEST_JOB_S
        )

    def _request(self, told: Told, script: str) -> dict[str, Any]:
        messages: list[dict[str, str]] = [{"role": "user", "content": script}]
        if told.session is None:  # a history of its own, so that it belongs to no session
            messages.insert(0, {"role": "system", "content": "You cause chaos."})
            return {"model": "endmark", "messages": messages}
        return {"model": "endmark", "messages": messages, "extra_body": {"session_id": told.session}}

    async def stream_by_sdk(self, told: Told, script: str, *, pause_s: float = 0, leave_after: int = 0) -> None:
        finished = 0
        async with self._sdk(told.api) as client:
            stream = await client.chat.completions.create(**self._request(told, script), stream=True)
            told.headed = True
            seen = 0
            async with stream:
                async for chunk in stream:
                    told.job_id = chunk.id
                    if finished:
                        told.complaints.append("a chunk after the finish reason")
                    told.text += chunk.choices[0].delta.content or ""
                    finished += chunk.choices[0].finish_reason is not None
                    seen += 1
                    if leave_after and seen == leave_after:
                        told.outcome = "left"
                        return
                    if pause_s:
                        await asyncio.sleep(pause_s)
        told.outcome = "success" if finished else "silent"

    async def _leave(self, told: Told, script: str) -> None:
        await self.stream_by_sdk(told, script, leave_after=3)

    async def _read_slowly(self, told: Told, script: str) -> None:
        await self.stream_by_sdk(told, script, pause_s=0.2)

    async def ask_whole(self, told: Told, script: str) -> None:
        async with self._sdk(told.api) as client:
            answer = await client.chat.completions.create(**self._request(told, script))
        told.job_id = answer.id
        told.text = answer.choices[0].message.content or ""
        told.outcome = "success" if answer.choices[0].finish_reason == "stop" else "silent"

    async def stream_by_bytes(self, told: Told, script: str) -> None:
        """Looks at every frame: one terminal, last, and nothing that looks like success before an error."""
        body = self._request(told, script) | {"stream": True}
        told.outcome = "silent"
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(timeout=LONGEST_JOB_S, headers=headers) as client:
            url = f"{self._cluster.base_url(told.api)}/v1/chat/completions"
            async with client.stream("POST", url, json=body) as response:
                if response.status_code != 200:
                    error = json.loads(await response.aread())["error"]
                    told.outcome = error["code"] or f"an error without a code: {error}"
                    return
                told.headed = True
                finished = terminal = False
                async for line in response.aiter_lines():
                    if not line or line.startswith(":"):
                        continue
                    if terminal:
                        told.complaints.append(f"after the terminal: {line[:80]}")
                    if line == "data: [DONE]":
                        if not finished:
                            told.complaints.append("[DONE] without a finish reason")
                        terminal, told.outcome = True, "success"
                        continue
                    frame = json.loads(line.removeprefix("data: "))
                    if "error" in frame:
                        if finished:
                            told.complaints.append("an error after a finish reason")
                        terminal, told.outcome = True, frame["error"]["code"]
                        continue
                    if finished:
                        told.complaints.append("a chunk after the finish reason")
                    told.job_id = frame["id"]
                    told.text += frame["choices"][0]["delta"].get("content") or ""
                    finished = frame["choices"][0]["finish_reason"] is not None
