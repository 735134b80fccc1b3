"""A scripted OpenAI-compatible model: streams K tokens on a clock, and fails on request.

The script travels inside the *last user message*, so it passes through any agent unchanged:

    [[mock k=200 i=20]]                    200 tokens, one every 20 ms
    [[mock k=1000 i=0 b=8]]                as fast as the socket takes them, 8 SSE events per write
    [[mock k=200 i=20 fail=close at=50]]   abort the TCP connection after 50 tokens
    [[mock k=20 tool=list_dir args={"path":"."}]]   call a tool first, then, when its result is there, the text

Words: k tokens, i ms between tokens, b events per write when i=0, ttft ms before the first token, r fragments of
reasoning before the text, reason=<finish reason>, tool and args (JSON without spaces), say tokens before the tool, and

fail= (at token `at`, default k//2):
  close    abort the connection (RST)         eof      end the HTTP body cleanly, no finish_reason, no [DONE]
  sse      data: {"error": ...} then end      badjson  a broken data: line, then go on to the end
  hang     stop for ever, keep the socket     length | content_filter   that finish_reason, then [DONE]
  nodone   finish_reason=stop, no [DONE]      empty    200 OK, finish_reason=stop, no more content
  status<NNN>  answer HTTP NNN instead of streaming (status500, status429, status401, ...)
With a tool, what fails is not the request that calls it, but the one that brings its result; except for
  toolcut  end the HTTP body behind the call of the tool, without a finish_reason
times=N id=X   fail only the first N requests that carry id X (to watch retries)

Every token is `@<seq>.<CLOCK_MONOTONIC ns in hex>; `, stamped when it is written to the socket: a reader on the same
machine subtracts the stamp from its own clock. GET /stats returns counters, GET /requests the bodies of all completion
requests, POST /reset forgets both.

Run it alone with `python -m tests.upstream --port 9100`, or in a test: `async with scripted_upstream() as upstream`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import httptools

DIRECTIVE = re.compile(rb"\[\[mock ([^\]]*)\]\]")
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
END_OF_BODY = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What one request asked for; see the module's docstring for the words."""

    tokens: int = 20
    reasoning_fragments: int = 0
    interval_s: float = 0.02
    first_token_delay_s: float = 0.0
    events_per_write: int = 8
    finish_reason: str = "stop"
    fail: str = ""
    fail_at: int = 10
    fail_times: int | None = None  # None: every time
    fail_id: str = ""
    tool: str | None = None
    tool_arguments: str = "{}"
    tokens_before_tool: int = 0

    @classmethod
    def parse(cls, body: bytes) -> Script:
        """Read the last directive of a request body; a body without one gets the defaults."""
        found = DIRECTIVE.findall(body.replace(b'\\"', b'"'))
        words = dict(word.split("=", 1) for word in found[-1].decode().split() if "=" in word) if found else {}
        tokens = int(words.get("k", 20))
        return cls(
            tokens=tokens,
            reasoning_fragments=int(words.get("r", 0)),
            interval_s=float(words.get("i", 20)) / 1e3,
            first_token_delay_s=float(words.get("ttft", 0)) / 1e3,
            events_per_write=int(words.get("b", 8)),
            finish_reason=words.get("reason", "stop"),
            fail=words.get("fail", ""),
            fail_at=int(words.get("at", tokens // 2)),
            fail_times=int(words["times"]) if "times" in words else None,
            fail_id=words.get("id", ""),
            tool=words.get("tool"),
            tool_arguments=words.get("args", "{}"),
            tokens_before_tool=int(words.get("say", 0)),
        )


class ScriptedUpstream:
    """The state that the connections of one server share."""

    def __init__(self) -> None:
        self.stats: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []  # the bodies of the completion requests, oldest first
        self.base_url = ""  # known once it listens; ends in /v1
        self.runs_of_id: Counter[str] = Counter()


@asynccontextmanager
async def scripted_upstream(host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[ScriptedUpstream]:
    """Serve on a port (0: a free one) until the block ends; open connections are aborted then."""
    upstream = ScriptedUpstream()
    connections: set[_Connection] = set()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(upstream, connections), host, port, backlog=4096)
    upstream.base_url = f"http://{host}:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield upstream
    finally:
        server.close()
        for connection in list(connections):
            connection.transport.abort()
        await server.wait_closed()


def framed(data: bytes) -> bytes:
    """One chunk of a chunked HTTP body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def stamped_token(sequence: int) -> str:
    """The trailing space keeps it a word for strippers of markdown."""
    return f"@{sequence}.{time.monotonic_ns():x}; "


def tool_was_answered(messages: list[dict[str, Any]]) -> bool:
    """Whether a tool result follows the last user message that carries a script."""
    for message in reversed(messages):
        if message.get("role") == "tool":
            return True
        if message.get("role") == "user" and "[[mock" in json.dumps(message.get("content")):
            return False
    return False


class _Connection(asyncio.Protocol):
    """One client; answers one request at a time."""

    transport: asyncio.Transport

    def __init__(self, upstream: ScriptedUpstream, connections: set[_Connection]) -> None:
        self.upstream = upstream
        self.connections = connections
        self.parser = httptools.HttpRequestParser(self)
        self.url, self.body = b"", b""
        self.script = Script()
        self.streaming = False
        self.fail = ""  # what is still to go wrong with this request
        self.sequence = 0  # of the next token
        self.chunk_prefix = b""
        self.writable = asyncio.Event()
        self.writable.set()
        self.answering: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        self.connections.add(self)
        self.upstream.stats["connections"] += 1

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's own signature
        self.connections.discard(self)
        if self.streaming:
            self.upstream.stats["client_gone_midstream"] += 1
        if self.answering is not None:
            self.answering.cancel()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_message_begin(self) -> None:
        self.url, self.body = b"", b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        path = self.url.split(b"?")[0]
        if path.endswith(b"/chat/completions") and self.parser.get_method() == b"POST":
            self.answering = asyncio.get_running_loop().create_task(self._complete(self.body))
        elif path == b"/stats":
            self._answer(200, dict(self.upstream.stats))
        elif path == b"/requests":
            self._answer(200, self.upstream.requests)
        elif path == b"/reset":
            self.upstream.stats.clear()
            self.upstream.requests.clear()
            self._answer(200, {})
        elif path.endswith(b"/models"):
            self._answer(200, {"object": "list", "data": [{"id": "mock", "object": "model"}]})
        else:
            self._answer(200, {"status": "ok"})

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        self.transport.write(head + body)

    async def _complete(self, body: bytes) -> None:
        request = json.loads(body)
        self.upstream.requests.append(request)
        self.upstream.stats["requests"] += 1
        self.script = script = Script.parse(body)
        self.sequence = 0
        self.fail = script.fail
        if script.fail_times is not None:
            self.upstream.runs_of_id[script.fail_id] += 1
            if self.upstream.runs_of_id[script.fail_id] > script.fail_times:
                self.fail = ""
        calls_tool = script.tool is not None and not tool_was_answered(request.get("messages", []))
        if self.fail.startswith("status") and not calls_tool:
            code = int(self.fail.removeprefix("status"))
            self._answer(code, {"error": {"message": f"scripted {code}", "type": "mock", "code": code}})
            return
        if request.get("stream"):
            await self._stream(request.get("model", "mock"), calls_tool=calls_tool)
        else:
            await self._answer_whole(request.get("model", "mock"), calls_tool=calls_tool)

    async def _answer_whole(self, model: str, *, calls_tool: bool) -> None:
        message: dict[str, Any] = {"role": "assistant"}
        if calls_tool:
            function = {"name": self.script.tool, "arguments": self.script.tool_arguments}
            message |= {
                "content": None,
                "tool_calls": [{"id": self._call_id(), "type": "function", "function": function}],
            }
        else:
            message["content"] = "".join(stamped_token(n) for n in range(self.script.tokens))
            await asyncio.sleep(self.script.tokens * self.script.interval_s)
        reason = "tool_calls" if calls_tool else self.script.finish_reason
        usage = {"prompt_tokens": 1, "completion_tokens": self.script.tokens, "total_tokens": self.script.tokens + 1}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        self._answer(200, {"id": "chatcmpl-mock", "object": "chat.completion", "created": 1, "model": model,
                           "choices": [choice], "usage": usage})  # fmt: skip

    async def _stream(self, model: str, *, calls_tool: bool) -> None:
        self.streaming = True
        self.chunk_prefix = (
            f'data: {{"id":"chatcmpl-mock{self.upstream.stats["requests"]}","object":"chat.completion.chunk",'
            f'"created":1,"model":{json.dumps(model)},"choices":[{{"index":0,"delta":'
        ).encode()
        self.transport.write(SSE_HEAD + self._delta({"role": "assistant", "content": ""}))
        for n in range(self.script.reasoning_fragments):
            self.transport.write(self._delta({"reasoning_content": f"because {n} "}))
        if calls_tool:
            self._write_tokens(self.script.tokens_before_tool)
            function = {"name": self.script.tool, "arguments": self.script.tool_arguments}
            call = {"index": 0, "id": self._call_id(), "type": "function", "function": function}
            self.transport.write(self._delta({"tool_calls": [call]}))
            if self.fail == "toolcut":
                self._act_out_failure()
            else:
                self._finish("tool_calls")
            return
        await asyncio.sleep(self.script.first_token_delay_s)
        if self.script.interval_s:
            await self._tick()
        else:
            await self._burst()

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        next_at_s = loop.time()
        while True:
            if self.fail and self.sequence == self.script.fail_at and self._act_out_failure():
                return
            if self.sequence >= self.script.tokens:
                self._finish(self.script.finish_reason)
                return
            self._write_tokens(1)
            next_at_s += self.script.interval_s
            await asyncio.sleep(next_at_s - loop.time())

    async def _burst(self) -> None:
        while True:
            upto = self.script.fail_at if self.fail and self.script.fail_at < self.script.tokens else self.script.tokens
            self._write_tokens(min(self.script.events_per_write, upto - self.sequence))
            if self.fail and self.sequence == self.script.fail_at and self._act_out_failure():
                return
            if self.sequence >= self.script.tokens:
                self._finish(self.script.finish_reason)
                return
            await self.writable.wait()
            await asyncio.sleep(0)

    def _write_tokens(self, count: int) -> None:
        events = [self._delta({"content": stamped_token(n)}) for n in range(self.sequence, self.sequence + count)]
        self.transport.write(b"".join(events))
        self.sequence += count
        self.upstream.stats["tokens"] += count

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return framed(self.chunk_prefix + json.dumps(delta).encode() + b',"finish_reason":null}]}\n\n')

    def _call_id(self) -> str:
        return f"call_{self.upstream.stats['requests']}"

    def _act_out_failure(self) -> bool:
        """Do what the script says; True when the stream ends (or hangs) here."""
        self.upstream.stats["failures_acted"] += 1
        mode, self.fail = self.fail, ""
        match mode:
            case "badjson":
                self.transport.write(framed(b'data: {"choices":[{"delta":{"conte\n\n'))
                return False
            case "length" | "content_filter":
                self._finish(mode)
            case "nodone":
                self._finish("stop", done=False)
            case "empty":
                self._finish("stop")
            case "hang":
                pass
            case "close":
                self.streaming = False
                self.transport.abort()
            case "eof" | "toolcut":
                self.streaming = False
                self.transport.write(END_OF_BODY)
            case "sse":
                self.streaming = False
                error = b'data: {"error":{"message":"scripted failure","type":"server_error","code":500}}\n\n'
                self.transport.write(framed(error) + END_OF_BODY)
            case _:
                raise ValueError(f"the script's fail={mode} is unknown")
        return True

    def _finish(self, reason: str, *, done: bool = True) -> None:
        usage = {"prompt_tokens": 1, "completion_tokens": self.sequence, "total_tokens": self.sequence + 1}
        last = b'{},"finish_reason":%s}],"usage":%s}\n\n' % (json.dumps(reason).encode(), json.dumps(usage).encode())
        self.streaming = False
        self.upstream.stats["finished"] += 1
        self.transport.write(
            framed(self.chunk_prefix + last) + (framed(b"data: [DONE]\n\n") if done else b"") + END_OF_BODY
        )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9100)
    arguments = parser.parse_args()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with scripted_upstream(arguments.host, arguments.port) as upstream:
        print(f"scripted model on {upstream.base_url}", flush=True)  # noqa: T201 - the ready line of a program
        await stop.wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
