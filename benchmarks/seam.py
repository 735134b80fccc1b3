"""The seam: the agent in the process that answers, without a queue. What Endmark is measured against.

What one writes who needs no second process, as the documentation of Starlette shows it: an async generator in a
`StreamingResponse`, on uvicorn with uvloop and httptools. It promises nothing: if its process dies, so do the answers,
and nobody can resume one. The same without the framework is benchmarks/bare_seam.py.

    uvicorn benchmarks.seam:app --loop uvloop --http httptools
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.agent import speaker

speak = speaker()


async def create_completion(request: Request) -> Response:
    """Answers a chat completion request with `stream`."""
    body = await request.json()
    head = {
        "id": f"chatcmpl-{secrets.token_hex(16)}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": body["model"],
        "system_fingerprint": None,
    }

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return b"data: " + orjson.dumps(head | {"choices": [choice]}) + b"\n\n"

    async def chunks() -> AsyncIterator[bytes]:
        async for token in speak(body["messages"][-1]["content"]):
            yield chunk({"content": token})
        yield chunk({}, "stop")
        yield b"data: [DONE]\n\n"

    return StreamingResponse(chunks(), media_type="text/event-stream", headers={"cache-control": "no-cache"})


async def health(_: Request) -> Response:
    return PlainTextResponse("ok")


app = Starlette(routes=[Route("/v1/chat/completions", create_completion, methods=["POST"]), Route("/", health)])
