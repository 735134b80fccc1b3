"""The first version that anyone writes of streaming through arq: what a user would have without Endmark.

One XADD for each token, one blocking XREAD for each open stream, arq's defaults for the rest: it polls its queue every
0.5 s. Only `max_jobs` is raised, since the load has more streams than arq's ten. It promises nothing: a lost worker
leaves its clients waiting.

    uvicorn benchmarks.naive_arq:app
    arq benchmarks.naive_arq.WorkerSettings
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.agent import speaker

speak = speaker()
REDIS_SETTINGS = RedisSettings.from_dsn(os.environ.get("ENDMARK_REDIS_URL", "redis://127.0.0.1:6379/0"))


async def run_completion(ctx: dict[str, Any], stream: str, text: str) -> None:
    """The worker's side."""
    async for token in speak(text):
        await ctx["redis"].xadd(stream, {"token": token})
    await ctx["redis"].xadd(stream, {"done": "1"})


class WorkerSettings:
    """What arq's command line reads."""

    functions = (run_completion,)
    redis_settings = REDIS_SETTINGS
    max_jobs = int(os.environ.get("NAIVE_MAX_JOBS", "10000"))


async def create_completion(request: Request) -> Response:
    """The API's side."""
    body = await request.json()
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    arq = request.app.state.arq
    await arq.enqueue_job("run_completion", completion_id, body["messages"][-1]["content"])

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        fields = {"id": completion_id, "object": "chat.completion.chunk", "created": int(time.time())}
        return f"data: {json.dumps(fields | {'model': 'endmark', 'choices': [choice]})}\n\n"

    async def chunks() -> AsyncIterator[str]:
        last_id = b"0-0"
        while True:
            for _, entries in await arq.xread({completion_id: last_id}, block=5000):
                for entry_id, fields in entries:
                    last_id = entry_id
                    if b"done" in fields:
                        yield chunk({}, "stop")
                        yield "data: [DONE]\n\n"
                        return
                    yield chunk({"content": fields[b"token"].decode()})

    return StreamingResponse(chunks(), media_type="text/event-stream")


async def health(_: Request) -> Response:
    return PlainTextResponse("ok")


@asynccontextmanager
async def lifespan(application: Starlette) -> AsyncIterator[None]:
    application.state.arq = await create_pool(REDIS_SETTINGS)
    yield
    await application.state.arq.aclose()


app = Starlette(
    routes=[Route("/v1/chat/completions", create_completion, methods=["POST"]), Route("/health", health)],
    lifespan=lifespan,
)
