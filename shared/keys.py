"""The name of every Redis key and channel, in one place, for Python and for the Lua scripts alike.

What belongs to one job carries the hash tag `{job id}`. The scripts cross jobs, sessions and the queue, so all keys
live on one primary (docs/decisions/0003-one-primary.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from arq.constants import job_key_prefix

# Templates of the keys that are made from an id. `%s` is the only directive, so that Python and Lua format them alike.
_PER_ID = {
    "job_key": "%s:{%s}:job",  # hash: the job record
    "request_key": "%s:{%s}:request",  # string: the request, as JSON
    "attachments_key": "%s:{%s}:attachments",  # list: the files that came inside of the request
    "stream_key": "%s:{%s}:stream",  # stream: what the agent said, and how it ended
    "packing_key": "%s:{%s}:packing",  # stream: what is to take its place, packed, while it is being made
    "times_key": "%s:{%s}:times",  # string: when the entries of that stream were said (shared/timing.py)
    "stream_channel": "%s:{%s}:stream",  # pub/sub: every entry of that stream, as it is appended
    "webhook_key": "%s:{%s}:webhook",  # hash: where the job's end is told, and what became of telling it
    # What follows the kind is the session's own name, whatever it holds: no other key begins like these two.
    "turns_key": "%s:turns:%s",  # list: ids of a session's unfinished turns, oldest first; the head may run
    "session_key": "%s:session:%s",  # string: the session state, as the last whole turn left it
    "once_key": "%s:once:%s",  # string: the job of a request that may come twice, by `tenant:what tells it is the same`
    "file_key": "%s:file:%s",  # hash: an uploaded file, by `tenant:file id`
    "files_key": "%s:files:%s",  # sorted set: `file id:size` of a tenant's files, by the instant they expire
    "file_bytes_key": "%s:file-bytes:%s",  # string: what these hold together
    "worker_key": "%s:worker:%s",  # hash: who the worker is
    "worker_jobs_key": "%s:worker:%s:jobs",  # set: ids of the jobs whose attempt may still be executing there
    "worker_channel": "%s:worker:%s",  # pub/sub: orders to that worker
    # The index: sorted sets of job ids by the instant of acceptance, and what takes the expired ones out of them.
    "shelf_key": "%s:index:shelf:%s",  # sorted set: the jobs of a tenant that are alike, by the name of their shelf
    "ended_key": "%s:index:ended:%s",  # list: the ended jobs of that shelf, the next to expire first
    "deleted_key": "%s:index:deleted:%s",  # string: when a deleted job was accepted, by `tenant:job id`; for a while
    "session_jobs_key": "%s:index:session:%s",  # sorted set: the jobs of a session
    "worker_jobs_ended_badly_key": "%s:index:worker:%s",  # sorted set: the jobs of a worker that have no whole answer
    "pair_jobs_key": "%s:index:pair:%s",  # sorted set: the jobs with a pair of metadata, by `tenant:digest of the pair`
}
_SHARED = {
    "queue": "%s:queue",  # sorted set, arq's queue: ids of the jobs that may be claimed, by the instant since when
    "bell": "%s:bell",  # list: holds a token while the queue may hold a claimable job
    "deadlines": "%s:deadlines",  # sorted set: ids of all unfinished jobs, by the instant they must have moved on
    "webhooks": "%s:webhooks",  # sorted set: ids of the ended jobs whose webhook is pending, by the instant it is due
    "workers": "%s:workers",  # sorted set: ids of the workers, by the instant their lease ends
    "paused": "%s:paused",  # string: there while the queue is paused; who paused it
    "audit": "%s:audit",  # stream: what operators did
    "shelves": "%s:index:shelves",  # set: the names of all shelves that hold a job
    "sweeper": "%s:sweeper",  # string: there for a moment after each sweep, so that processes do not all sweep at once
}


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one deployment, named by its prefix."""

    prefix: str

    @property
    def queue(self) -> str:
        return _SHARED["queue"] % self.prefix

    @property
    def bell(self) -> str:
        return _SHARED["bell"] % self.prefix

    @property
    def deadlines(self) -> str:
        return _SHARED["deadlines"] % self.prefix

    @property
    def webhooks(self) -> str:
        return _SHARED["webhooks"] % self.prefix

    @property
    def workers(self) -> str:
        return _SHARED["workers"] % self.prefix

    @property
    def paused(self) -> str:
        return _SHARED["paused"] % self.prefix

    @property
    def audit(self) -> str:
        return _SHARED["audit"] % self.prefix

    @property
    def sweeper(self) -> str:
        return _SHARED["sweeper"] % self.prefix

    @property
    def shelves(self) -> str:
        return _SHARED["shelves"] % self.prefix

    def job(self, job_id: str) -> str:
        return _PER_ID["job_key"] % (self.prefix, job_id)

    def request(self, job_id: str) -> str:
        return _PER_ID["request_key"] % (self.prefix, job_id)

    def attachments(self, job_id: str) -> str:
        return _PER_ID["attachments_key"] % (self.prefix, job_id)

    def stream(self, job_id: str) -> str:
        return _PER_ID["stream_key"] % (self.prefix, job_id)

    def packing(self, job_id: str) -> str:
        return _PER_ID["packing_key"] % (self.prefix, job_id)

    def times(self, job_id: str) -> str:
        return _PER_ID["times_key"] % (self.prefix, job_id)

    def stream_channel(self, job_id: str) -> str:
        return _PER_ID["stream_channel"] % (self.prefix, job_id)

    def webhook(self, job_id: str) -> str:
        return _PER_ID["webhook_key"] % (self.prefix, job_id)

    def turns(self, session: str) -> str:
        return _PER_ID["turns_key"] % (self.prefix, session)

    def session(self, session: str) -> str:
        return _PER_ID["session_key"] % (self.prefix, session)

    def once(self, name: str) -> str:
        return _PER_ID["once_key"] % (self.prefix, name)

    def file(self, tenant: str, file_id: str) -> str:
        return _PER_ID["file_key"] % (self.prefix, f"{tenant}:{file_id}")

    def files(self, tenant: str) -> str:
        return _PER_ID["files_key"] % (self.prefix, tenant)

    def file_bytes(self, tenant: str) -> str:
        return _PER_ID["file_bytes_key"] % (self.prefix, tenant)

    def worker(self, worker_id: str) -> str:
        return _PER_ID["worker_key"] % (self.prefix, worker_id)

    def worker_jobs(self, worker_id: str) -> str:
        return _PER_ID["worker_jobs_key"] % (self.prefix, worker_id)

    def worker_channel(self, worker_id: str) -> str:
        return _PER_ID["worker_channel"] % (self.prefix, worker_id)

    def shelf(self, name: str) -> str:
        return _PER_ID["shelf_key"] % (self.prefix, name)

    def ended(self, name: str) -> str:
        return _PER_ID["ended_key"] % (self.prefix, name)

    def deleted(self, tenant: str, job_id: str) -> str:
        return _PER_ID["deleted_key"] % (self.prefix, f"{tenant}:{job_id}")

    def session_jobs(self, session: str) -> str:
        return _PER_ID["session_jobs_key"] % (self.prefix, session)

    def worker_jobs_ended_badly(self, worker_id: str) -> str:
        return _PER_ID["worker_jobs_ended_badly_key"] % (self.prefix, worker_id)

    def pair_jobs(self, tenant: str, digest: str) -> str:
        return _PER_ID["pair_jobs_key"] % (self.prefix, f"{tenant}:{digest}")


def lua_names() -> str:
    """The same names as Lua locals; `ARGV[1]` is the prefix."""
    lines = ["local P = ARGV[1]"]
    lines += [f"local {name} = {_in_lua(template, 'P')}" for name, template in _SHARED.items()]
    lines += [
        f"local function {name}(id) return {_in_lua(template, 'P', 'id')} end" for name, template in _PER_ID.items()
    ]
    lines += [
        f"local function arq_job_key(id) return '{job_key_prefix}' .. id end",
    ]
    return "\n".join(lines)


def _in_lua(template: str, *variables: str) -> str:
    """A concatenation, which costs Redis less than `string.format`."""
    words = [f"'{words}'" for words in template.split("%s")]
    parts = [words[0], *(part for pair in zip(variables, words[1:], strict=True) for part in pair)]
    return " .. ".join(part for part in parts if part != "''")
