"""The bare seam: benchmarks/seam.py without a framework, as fast as it gets in Python on this server.

Raw ASGI, uvloop and httptools, the constant parts of a chunk made once, orjson for the rest. Not what anybody has in
production: no routes, no errors, no limits. It tells what of the seam's price is the framework's.

    uvicorn benchmarks.bare_seam:app --loop uvloop --http httptools
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import orjson

from benchmarks.agent import agent

Message = dict[str, Any]


async def app(scope: Message, receive: Any, send: Any) -> None:
    """POST anything that is a chat completion request with `stream`; any GET is answered with an empty 200."""
    if scope["method"] == "GET":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
        return
    request = orjson.loads(await _body(receive))
    head = orjson.dumps(
        {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": "endmark",
            "system_fingerprint": None,
        }
    )[:-1]
    before = b"data: " + head + b',"choices":[{"index":0,"delta":{"content":'
    after = b'},"logprobs":null,"finish_reason":null}]}\n\n'
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for token in agent(request["messages"][-1]["content"]):
        chunk = before + orjson.dumps(token) + after
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    ending = b"data: " + head + b',"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n'
    await send({"type": "http.response.body", "body": ending + b"data: [DONE]\n\n"})


async def _body(receive: Any) -> bytes:
    body: bytes = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body
