"""The bare relay: what the hops alone cost, API, Redis, worker and back, with nothing of what Endmark promises.

The same three processes and the same two commands for each token, by the shortest way that Python has: sockets without
a framework, entries that are taken as they come. No leases, no recovery, no sessions, no verification, no limits, no
errors: what it tells is how much of Endmark's price is the way, and how much is what is kept on it.

    python -m benchmarks.bare_relay api --redis-port 6379 --port 8900
    python -m benchmarks.bare_relay worker --redis-port 6379
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any, cast

import click
import hiredis
import httptools
import orjson
import uvloop

from benchmarks.agent import agent
from shared.wire import command

HOST = "127.0.0.1"
JOBS = "jobs"
TTL_S = 60
START = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EMPTY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Redis(asyncio.Protocol):
    """A connection to Redis that hands on every reply."""

    transport: asyncio.Transport

    def __init__(self, heard: Callable[[Any], None]) -> None:
        self._heard = heard
        self._reader = hiredis.Reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._heard(reply)


async def connect(port: int, heard: Callable[[Any], None]) -> Redis:
    _, connection = await asyncio.get_running_loop().create_connection(lambda: Redis(heard), HOST, port)
    return connection


# -- the worker --------------------------------------------------------------------------------------------------------


class Flusher:
    """One write is on its way at a time; what is said meanwhile goes out in the next one."""

    def __init__(self) -> None:
        self._unsent: list[bytes] = []
        self._replies = self._awaited = 0  # of what is unsent, and of what is on its way
        self.redis: Redis

    def say(self, commands: bytes, replies: int) -> None:
        if not self._unsent and not self._awaited:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(commands)
        self._replies += replies

    def _flush(self) -> None:
        self.redis.transport.write(b"".join(self._unsent))
        self._unsent, self._replies, self._awaited = [], 0, self._replies

    def heard(self, _: Any) -> None:
        self._awaited -= 1
        if not self._awaited and self._unsent:
            self._flush()


async def execute(job_id: bytes, text: str, flusher: Flusher) -> None:
    stream, channel = b"stream:" + job_id, b"channel:" + job_id
    flusher.say(command("XADD", stream, "1-0", "open", ""), 1)
    sequence = 0
    async for token in agent(text):
        sequence += 1
        entry_id, payload = b"1-%d" % sequence, token.encode()
        said = command("XADD", stream, "NOMKSTREAM", entry_id, "delta", payload)
        flusher.say(said + command("PUBLISH", channel, b"delta " + payload), 2)
    ended = command("XADD", stream, f"1-{sequence + 1}", "ok", "") + command("EXPIRE", stream, TTL_S)
    flusher.say(ended + command("PUBLISH", channel, b"ok "), 3)


async def work(redis_port: int) -> None:
    flusher = Flusher()
    flusher.redis = await connect(redis_port, flusher.heard)
    tasks: set[asyncio.Task[None]] = set()

    def begin(reply: Any) -> None:
        jobs.transport.write(command("BLPOP", JOBS, 0))
        job_id, _, text = reply[1].partition(b" ")
        task = asyncio.create_task(execute(job_id, text.decode(), flusher))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    jobs = await connect(redis_port, begin)
    jobs.transport.write(command("BLPOP", JOBS, 0))
    await asyncio.Event().wait()


# -- the API -----------------------------------------------------------------------------------------------------------


class Hub:
    """The API process's two connections, and who listens."""

    def __init__(self) -> None:
        self.clients: dict[bytes, Client] = {}  # by channel
        self.commands: Redis
        self.messages: Redis

    def heard(self, reply: Any) -> None:
        if reply[0] == b"message" and (client := self.clients.get(reply[1])) is not None:
            client.pass_on(*reply[2].split(b" ", 1))


class Client(asyncio.Protocol):
    """One request."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._head = self._channel = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"GET":
            self._transport.write(EMPTY)
            return
        job_id = secrets.token_hex(16)
        head = {"id": f"chatcmpl-{job_id}", "object": "chat.completion.chunk", "created": int(time.time())}
        self._head = b"data: " + orjson.dumps(head | {"model": "endmark", "system_fingerprint": None})[:-1]
        self._channel = f"channel:{job_id}".encode()
        self._hub.clients[self._channel] = self
        text = orjson.loads(self._body)["messages"][-1]["content"]
        self._hub.messages.transport.write(command("SUBSCRIBE", self._channel))
        self._hub.commands.transport.write(command("RPUSH", JOBS, f"{job_id} {text}"))
        self._transport.write(START)

    def pass_on(self, kind: bytes, payload: bytes) -> None:
        if kind == b"delta":
            choice = b',"choices":[{"index":0,"delta":{"content":' + orjson.dumps(payload.decode())
            self._write(self._head + choice + b'},"logprobs":null,"finish_reason":null}]}\n\n')
            return
        choice = b',"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n'
        self._write(self._head + choice + b"data: [DONE]\n\n")
        self._transport.write(b"0\r\n\r\n")
        del self._hub.clients[self._channel]
        self._hub.messages.transport.write(command("UNSUBSCRIBE", self._channel))

    def _write(self, chunk: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))


async def serve(redis_port: int, port: int) -> None:
    hub = Hub()
    hub.messages = await connect(redis_port, hub.heard)
    hub.commands = await connect(redis_port, lambda _: None)
    server = await asyncio.get_running_loop().create_server(lambda: Client(hub), HOST, port, backlog=2048)
    await server.serve_forever()


@click.group(help=__doc__)
def main() -> None:
    """Nothing beside the subcommands."""


@main.command()
@click.option("--redis-port", required=True, type=int)
def worker(redis_port: int) -> None:
    uvloop.run(work(redis_port))


@main.command()
@click.option("--redis-port", required=True, type=int)
@click.option("--port", required=True, type=int)
def api(redis_port: int, port: int) -> None:
    uvloop.run(serve(redis_port, port))


if __name__ == "__main__":
    main()
