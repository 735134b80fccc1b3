"""The load generator: users that run streams, and what can be said of every token that they get.

Rule 1: every token carries its number and the instant at which it was made (CLOCK_MONOTONIC). Its delay is what lies
        between that and the read of the client's socket: all that the system under test adds. One machine, one clock.
Rule 2: whatever a server claims, an answer is whole only if every number came, once, in order. A success that is
        claimed for any other answer is counted as what it is: a false one.
Rule 3: a token counts when its SSE event is complete.
Rule 4: the loop is closed: a user begins the next stream when the last one has ended and a random pause is over.
        The users begin spread over a ramp. Starts and pauses are drawn from a seed, the same ones for every system.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any
from uuid import uuid4

import orjson

from benchmarks.accounting import Cost, Meter
from benchmarks.systems import Serving
from benchmarks.wire import Close, Connection, address_of, encode_request

PATH = "/v1/chat/completions"
SILENCE_S = 60.0  # without a byte for so long, a stream is given up
WARM_UP_STREAMS = 4  # for each API process, one after another: two workers get them in turn

_STAMP = re.compile(rb"@(\d+)\.([0-9a-f]{6,16});")
_FINISH_REASON = re.compile(rb'"finish_reason":\s*"(\w+)"')
_NOT_FINISHED = b'"finish_reason":null'
_DONE = b"data: [DONE]"
_ERROR = re.compile(rb'^event: ?error|^data: ?\{"error"|"error": ?\{', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Load:
    """A number of users, and what each of them asks for."""

    users: int
    tokens: int  # of each stream
    interval_ms: float  # between the tokens of a stream; 0: as fast as they are taken
    rounds: int = 1  # streams of each user, one after another
    begins_s: float = 0  # before the first user begins
    ramp_s: float | None = None  # over which the users begin; None: the length of a stream; 0: all at once
    think_s: float = 1.0  # the longest pause of a user between two streams
    words: str = ""  # more words for the script (tests/upstream.py)
    in_sessions: bool = False  # each stream is the one turn of a session of its own

    @property
    def stream_s(self) -> float:
        """How long a stream takes on an ideal server."""
        return max(0, self.tokens - 1) * self.interval_ms / 1000

    @cached_property
    def pauses_s(self) -> list[list[float]]:
        """Of each user: how long to wait before each of its streams.

        Random, or a server that polls would be met in the same phase every time.
        """
        draw = random.Random(1)
        ramp_s = max(0.5, self.stream_s) if self.ramp_s is None else self.ramp_s
        return [
            [self.begins_s + ramp_s * (user + draw.random()) / self.users]
            + [self.think_s * draw.random() for _ in range(self.rounds - 1)]
            for user in range(self.users)
        ]

    @property
    def ideal_s(self) -> float:
        """How long all of it takes on an ideal server."""
        return max(sum(pauses) for pauses in self.pauses_s) + self.rounds * self.stream_s

    @property
    def offered_tokens_per_s(self) -> float | None:
        """What an ideal server delivers, as a mean; None if tokens come as fast as they are taken."""
        return self.users * self.rounds * self.tokens / self.ideal_s if self.interval_ms else None

    def request(self, host: str) -> bytes:
        """A whole conversation, as of a client that keeps the history itself; or the first message of a session."""
        script = f"[[mock k={self.tokens} i={self.interval_ms:g} {self.words}]] go"
        question = {"role": "user", "content": script}
        body: dict[str, Any] = {"stream": True}
        if self.in_sessions:
            body |= {"messages": [question], "session_id": uuid4().hex}
        else:
            body |= {"model": "endmark", "messages": [{"role": "system", "content": "You count."}, question]}
        return encode_request(host, PATH, orjson.dumps(body))


class Stream:
    """One request, from its first byte sent to its last byte read, and what can be said about it."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.received = self.missing = self.repeated = 0
        self.sent_ns = self.first_ns = self.last_ns = 0
        self.longest_gap_ns = 0
        self.delays_ns = array("q")
        self.finish_reason = ""
        self.is_done = self.is_error = False
        self.how = Close.CUT
        self.status = 0
        self._rest = b""  # of an event that is not complete yet

    def feed(self, data: bytes, now_ns: int) -> None:
        if self._rest or not data.endswith(b"\n\n"):
            data = self._rest + data
            cut = data.rfind(b"\n\n") + 2
            if cut < 2:
                self._rest = data
                return
            self._rest, data = data[cut:], data[:cut]
        for number, made_at in _STAMP.findall(data):
            sequence = int(number)
            if sequence < self.received:
                self.repeated += 1
                continue
            self.missing += sequence - self.received
            self.received = sequence + 1
            self.delays_ns.append(now_ns - int(made_at, 16))
            if not self.first_ns:
                self.first_ns = self.last_ns = now_ns
        if now_ns - self.last_ns > self.longest_gap_ns and self.first_ns:
            self.longest_gap_ns = now_ns - self.last_ns
        self.last_ns = now_ns
        # Most events are tokens: what they cannot hold is not looked for in each.
        if data.count(b"finish_reason") > data.count(_NOT_FINISHED) and (found := _FINISH_REASON.search(data)):
            self.finish_reason = found[1].decode()
        if _DONE in data:
            self.is_done = True
        if b"error" in data and _ERROR.search(data):
            self.is_error = True

    @property
    def is_whole(self) -> bool:
        return self.received == self.tokens and not self.missing and not self.repeated

    @property
    def outcome(self) -> str:
        """What the client could tell, held against what really came. `ok` is the only good one."""
        if self.status >= 400:
            return f"http {self.status}"
        if self.is_error:
            return "told error"
        claims_success = self.finish_reason == "stop" and self.is_done
        if claims_success and not self.is_whole:
            return "FALSE SUCCESS"
        if claims_success:
            return "ok"
        if self.how is not Close.END:
            return self.how.value
        return f"ended with {self.finish_reason}" if self.finish_reason else "ended without a word"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of many values, in milliseconds."""

    p50: float
    p95: float
    p99: float
    most: float
    count: int


def spread(values_ns: Iterable[int]) -> Spread | None:
    """None of nothing."""
    ordered = sorted(values_ns)
    if not ordered:
        return None

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e6, 3)

    return Spread(p50=at(0.5), p95=at(0.95), p99=at(0.99), most=at(1), count=len(ordered))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a load got."""

    outcomes: dict[str, int]
    tokens: int
    tokens_per_s: float  # from the first request sent to the last token received
    share_of_offered: float | None  # 1 if it took no longer than on an ideal server; None without a pace
    ttft_ms: Spread | None  # before the request is sent, with the connection to be made, to the first token
    delay_ms: Spread | None  # of each token, from when it was made
    late_ms: Spread | None  # of each stream's last token, behind an ideal server
    longest_gap_ms: Spread | None  # of each stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of some loads on one system."""

    loads: dict[str, Answered]
    cost: Cost
    cpu_us_per_token: float | None  # of the system under test, all its processes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def measure(serving: Serving, loads: Mapping[str, Load], *, most_s: float = 300) -> Measured:
    """Runs loads side by side until their streams have ended; after `most_s` what still runs is cut."""
    warm_up = Load(users=1, tokens=5, interval_ms=1, in_sessions=any(load.in_sessions for load in loads.values()))
    for _ in range(WARM_UP_STREAMS):
        for base_url in serving.base_urls:
            stream = Stream(warm_up.tokens)
            await _run_stream(stream, base_url, warm_up)
            if stream.outcome != "ok":
                raise RuntimeError(f"a stream to warm it up: {stream.outcome}")
    streams: dict[str, list[Stream]] = {name: [] for name in loads}
    gc.collect()
    gc.disable()
    try:
        meter = Meter(serving.processes, [os.getpid(), *serving.tools], time.monotonic())
        began_ns = time.monotonic_ns()
        users = [
            asyncio.create_task(_be_user(serving.base_urls, load, user, streams[name]))
            for name, load in loads.items()
            for user in range(load.users)
        ]
        _, unfinished = await asyncio.wait(users, timeout=most_s)
        cost = meter.read(time.monotonic())
    finally:
        gc.enable()
    for task in unfinished:
        task.cancel()
    for ended in await asyncio.gather(*users, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    answered = {name: _answered(load, streams[name], began_ns) for name, load in loads.items()}
    tokens = sum(answer.tokens for answer in answered.values())
    return Measured(
        loads=answered, cost=cost, cpu_us_per_token=round(cost.servers_s * 1e6 / tokens, 1) if tokens else None
    )


async def _be_user(base_urls: Sequence[str], load: Load, user: int, streams: list[Stream]) -> None:
    for number, pause_s in enumerate(load.pauses_s[user]):
        await asyncio.sleep(pause_s)
        stream = Stream(load.tokens)
        streams.append(stream)
        await _run_stream(stream, base_urls[(user + number) % len(base_urls)], load)


async def _run_stream(stream: Stream, base_url: str, load: Load) -> None:
    host, port = address_of(base_url)
    request = load.request(f"{host}:{port}")
    stream.sent_ns = time.monotonic_ns()
    try:
        _, connection = await asyncio.get_running_loop().create_connection(lambda: Connection(stream.feed), host, port)
    except OSError:
        stream.how = Close.REFUSED
        return
    try:
        connection.transport.write(request)
        stream.how = await _until_closed(connection)
    finally:
        stream.status = connection.status
        connection.transport.abort()


async def _until_closed(connection: Connection) -> Close:
    while True:
        await asyncio.wait({connection.closed}, timeout=SILENCE_S / 4)
        if connection.closed.done():
            return connection.closed.result()
        if time.monotonic_ns() - connection.last_byte_ns > SILENCE_S * 1e9:
            return Close.SILENT


def _answered(load: Load, streams: list[Stream], began_ns: int) -> Answered:
    spoken = [stream for stream in streams if stream.first_ns]
    tokens = sum(stream.received - stream.missing for stream in streams)
    ended_ns = max((stream.last_ns for stream in spoken), default=time.monotonic_ns())
    sent_ns = min((stream.sent_ns for stream in streams), default=began_ns)
    whole = [stream for stream in spoken if stream.outcome == "ok"]
    return Answered(
        outcomes=dict(Counter(stream.outcome for stream in streams)),
        tokens=tokens,
        tokens_per_s=round(tokens / ((ended_ns - sent_ns) / 1e9), 1),
        share_of_offered=round(load.ideal_s / ((ended_ns - began_ns) / 1e9), 4) if load.interval_ms else None,
        ttft_ms=spread(stream.first_ns - stream.sent_ns for stream in spoken),
        delay_ms=spread(delay for stream in spoken for delay in stream.delays_ns),
        late_ms=spread(stream.last_ns - stream.sent_ns - round(load.stream_s * 1e9) for stream in whole),
        longest_gap_ms=spread(stream.longest_gap_ns for stream in spoken),
    )
