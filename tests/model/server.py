"""Redis as a function: a state and a command give the next state and an answer, both remembered.

A real server runs the real scripts. Before a command it is given the state, after it the state is read back, in a
canonical form: whatever order led there, the same contents are the same state.

Time is not measured. A lease or a deadline has passed or has not; a step of its own makes it pass, at any moment and in
any order. So what is found here depends on no timeout. The scripts read the key `clock` instead of TIME.

Not part of a state: how long a key has still to live (but whether it has a time to live), and instants that no script
reads. Nothing expires.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, get_args

import orjson
import redis

from shared import scripts
from shared.entries import MARKERS, Entry, EntryId, entry_from_fields
from shared.jobs import Status
from shared.keys import Keys

KEYS = Keys("m")
CLOCK = "clock"

_TIME = "local time = redis.call('TIME')"
_CLOCK = f"local time = {{redis.call('GET', '{CLOCK}'), '0'}}"

_RESTORE = """
redis.call('DEL', unpack(redis.call('KEYS', '*'))) -- quicker than FLUSHDB
for _, item in ipairs(cjson.decode(ARGV[1])) do
  local key, kind, has_ttl, content = item[1], item[2], item[3], item[4]
  if kind == 'string' then redis.call('SET', key, content)
  elseif kind == 'hash' then redis.call('HSET', key, unpack(content))
  elseif kind == 'list' then redis.call('RPUSH', key, unpack(content))
  elseif kind == 'set' then redis.call('SADD', key, unpack(content))
  elseif kind == 'zset' then
    for i = 1, #content, 2 do redis.call('ZADD', key, content[i + 1], content[i]) end
  else
    for _, entry in ipairs(content) do redis.call('XADD', key, entry[1], unpack(entry[2])) end
  end
  if has_ttl == 1 then redis.call('PEXPIRE', key, 100000000) end
end
"""

_DUMP = """
local instant = {accepted_ms = true, deadline_ms = true, started_ms = true, first_token_ms = true, finished_ms = true}
local now = tonumber(redis.call('GET', 'clock')) * 1000
redis.call('SET', 'clock', '0')
local keys, state = redis.call('KEYS', '*'), {}
table.sort(keys)
for i, key in ipairs(keys) do
  local kind, content = redis.call('TYPE', key).ok, nil
  if kind == 'string' then content = redis.call('GET', key)
  elseif kind == 'hash' then
    local fields, values = redis.call('HGETALL', key), {}
    local names = {}
    for j = 1, #fields, 2 do
      names[#names + 1] = fields[j]
      values[fields[j]] = instant[fields[j]] and '1' or fields[j + 1]
    end
    table.sort(names)
    content = {}
    for _, name in ipairs(names) do
      content[#content + 1] = name
      content[#content + 1] = values[name]
    end
  elseif kind == 'list' then content = redis.call('LRANGE', key, 0, -1)
  elseif kind == 'set' then
    content = redis.call('SMEMBERS', key)
    table.sort(content)
  elseif kind == 'zset' then
    content = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
    for j = 2, #content, 2 do
      if key == ARGV[1] then content[j] = tostring(j - 1000) -- the order of the queue
      else content[j] = tonumber(content[j]) > now and '1' or '0' end
    end
  else content = redis.call('XRANGE', key, '-', '+')
  end
  state[i] = {key, kind, redis.call('PTTL', key) == -1 and 0 or 1, content}
end
return cjson.encode(state)
"""

RawCommand = tuple[str | bytes | int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Command:
    """One or more Redis commands that are one step. Compared by identity."""

    name: str  # of the step, for traces and rules
    by: str  # the worker that sends it, or ""
    job: str  # that it is about, or ""
    attempt: int  # that it is about, or 0
    raw: tuple[RawCommand, ...]


class Job(NamedTuple):
    """What a state says of a job."""

    status: Status
    attempt: int
    worker: str
    session: str
    fields: Mapping[str, str]
    entries: tuple[Entry, ...]

    @property
    def is_terminal(self) -> bool:
        return self.status not in (Status.QUEUED, Status.RUNNING)

    @property
    def marker(self) -> Entry | None:
        return self.entries[-1] if self.entries and self.entries[-1].kind in MARKERS else None


class View:
    """A state, to be looked at."""

    def __init__(self, dumped: bytes) -> None:
        self._items: dict[str, tuple[str, int, Any]] = {
            key: (kind, has_ttl, content) for key, kind, has_ttl, content in orjson.loads(dumped)
        }

    def _content(self, key: str, default: Any) -> Any:
        return self._items[key][2] if key in self._items else default

    def _members(self, key: str) -> dict[str, bool]:
        """Of a sorted set, each with whether its instant has passed."""
        flat = self._content(key, [])
        return {member: int(score) <= 0 for member, score in zip(flat[::2], flat[1::2], strict=True)}

    @cached_property
    def jobs(self) -> dict[str, Job]:
        jobs = {}
        for key, (_, _, flat) in self._items.items():
            if not key.endswith(":job"):
                continue
            job_id = key.partition("{")[2].partition("}")[0]
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            rows = self._content(KEYS.stream(job_id), [])
            entries = tuple(
                entry_from_fields(entry_id.encode(), [part.encode() for part in pair]) for entry_id, pair in rows
            )
            jobs[job_id] = Job(
                Status(fields["status"]), int(fields["attempt"]), fields["worker"], fields["session"], fields, entries
            )
        return jobs

    @cached_property
    def queue(self) -> dict[str, bool]:
        return self._members(KEYS.queue)

    @cached_property
    def deadlines(self) -> dict[str, bool]:
        return self._members(KEYS.deadlines)

    @cached_property
    def leases(self) -> dict[str, bool]:
        return self._members(KEYS.workers)

    def turns(self, session: str) -> list[str]:
        turns: list[str] = self._content(KEYS.turns(session), [])
        return turns

    def session_state(self, session: str) -> str:
        return str(self._content(KEYS.session(session), ""))

    def held_by(self, worker: str) -> list[str]:
        held: list[str] = self._content(KEYS.worker_jobs(worker), [])
        return held

    # What a process reads, as Redis answers it.

    def record(self, job_id: str) -> tuple[Status, str, int]:
        job = self.jobs[job_id]
        return job.status, job.worker, job.attempt

    def last_id(self, job_id: str) -> EntryId:
        return self.jobs[job_id].entries[-1].id

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self._items)

    @cached_property
    def names_without_ttl(self) -> frozenset[str]:
        return frozenset(name for name, (_, has_ttl, _) in self._items.items() if not has_ttl)


class ModelServer:
    """A database of a real server. States and answers are interned: equal ones are one object, or one number."""

    def __init__(
        self, url: str, mutations: Mapping[str, tuple[str, str]], check: Callable[[View, Command, View], None]
    ) -> None:
        """`mutations`: for a script's name, a part of its complete text and what is there instead.

        `check` is called once for each state and command: with the state, the command and the next state.
        """
        self._check = check
        self._client = redis.Redis.from_url(url)
        self._connection = self._client.connection_pool.get_connection()
        self.shas = {name: self._load(_on_the_model_clock(name, mutations.get(name))) for name in _names()}
        self._restore = self._load(_RESTORE)
        self._dump = self._load(_DUMP)
        self._numbers: dict[bytes, int] = {}  # of states
        self.views: list[View] = []
        self._dumps: list[bytes] = []
        self._known: dict[tuple[int, Command], tuple[int, Any]] = {}  # and checked
        self._fetched: dict[tuple[int, Command], tuple[int, Any]] = {}  # and perhaps never asked for
        self._prefetched: set[int] = set()
        self._client.set(CLOCK, 0)
        self.empty = self._number(orjson.dumps([[CLOCK, "string", 0, "0"]]))

    def _load(self, text: str) -> str:
        sha = self._client.script_load(text)
        assert sha == hashlib.sha1(text.encode()).hexdigest()
        return str(sha)

    def _number(self, dumped: bytes) -> int:
        if dumped not in self._numbers:
            self._numbers[dumped] = len(self._dumps)
            self._dumps.append(dumped)
            self.views.append(View(dumped))
        return self._numbers[dumped]

    def prefetch(self, state: int, commands: list[Command]) -> None:
        """Tries these at once, since a round trip costs more than a step."""
        if state in self._prefetched:
            return
        self._prefetched.add(state)
        self._fetch(state, [command for command in commands if (state, command) not in self._known])

    def apply(self, state: int, command: Command) -> tuple[int, Any]:
        """The next state, and the answer of the first command. Raises what `check` raises."""
        known = self._known.get((state, command))
        if known is not None:
            return known
        if (state, command) not in self._fetched:
            self._fetch(state, [command])
        after, answer = self._fetched.pop((state, command))
        self._check(self.views[state], command, self.views[after])
        self._known[state, command] = (after, answer)
        return after, answer

    def _fetch(self, state: int, commands: list[Command]) -> None:
        restore: RawCommand = ("EVALSHA", self._restore, 0, self._dumps[state])
        dump: RawCommand = ("EVALSHA", self._dump, 0, KEYS.queue)
        connection = self._connection
        connection.send_packed_command(
            connection.pack_commands([raw for command in commands for raw in (restore, *command.raw, dump)])
        )
        for command in commands:
            restored, *answers, dumped = [_answer(connection) for _ in range(len(command.raw) + 2)]
            assert restored is None, restored
            self._fetched[state, command] = (self._number(dumped), answers[0])

    def close(self) -> None:
        self._client.flushdb()
        self._client.connection_pool.release(self._connection)
        self._client.close()


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _names() -> tuple[scripts.ScriptName, ...]:
    return get_args(scripts.ScriptName)


def _on_the_model_clock(name: scripts.ScriptName, mutation: tuple[str, str] | None) -> str:
    text = scripts.source(name).replace(_TIME, _CLOCK)
    assert "'TIME'" not in text, f"{name} has a clock of its own"
    if mutation:
        old, new = mutation
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    return text
