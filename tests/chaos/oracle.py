"""What must hold after a chaos run, whatever has happened in it. Each broken rule is one sentence."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from shared.entries import BEGINNING
from shared.jobs import ErrorCode, JobRecord
from shared.packs import entries_from_row
from tests.chaos.cluster import MAX_ATTEMPTS, Cluster
from tests.chaos.load import Told
from tests.conftest import leaks
from tests.index import actual_index_of, expected_index

TERMINAL = ("succeeded", "failed", "cancelled")
# Codes that only a marker brings: the record of the job must say the same.
OF_MARKERS = {
    ErrorCode.AGENT_ERROR,
    ErrorCode.TIMEOUT,
    ErrorCode.QUEUE_TIMEOUT,
    ErrorCode.NO_WORKER,
    ErrorCode.WORKER_LOST,
    ErrorCode.WORKER_STOPPED,
    ErrorCode.UNDELIVERABLE,
}
KNOWN = {*ErrorCode, "queue_unreachable", "queue_full", "files_unavailable"} - {
    ErrorCode.CANCELLED,  # nobody who is still there asks for it
}


@dataclass
class Attempt:
    """What the agent has noted of one attempt."""

    said: list[str] = field(default_factory=list)
    finished: bool = False


class Notes:
    """The agent's log."""

    def __init__(self, path: Path) -> None:
        self.attempts: defaultdict[str, dict[int, Attempt]] = defaultdict(dict)  # by job and attempt
        self.jobs_of: defaultdict[str, set[str]] = defaultdict(set)  # by label
        for line in path.read_text().splitlines() if path.exists() else []:
            note: dict[str, Any] = json.loads(line)
            self.jobs_of[note["label"]].add(note["job"])
            attempt = self.attempts[note["job"]].setdefault(note["attempt"], Attempt())
            if note["what"] == "said":
                attempt.said.append(note["text"])
            elif note["what"] == "finished":
                attempt.finished = True


class Oracle:
    """Compares what clients were told with what the agent said and with what Redis holds."""

    def __init__(self, cluster: Cluster, told: list[Told], *, durable: bool) -> None:
        """`durable`: Redis has lost nothing that it had answered."""
        self._cluster = cluster
        self._told = told
        self._durable = durable
        self._notes = Notes(cluster.log)
        self._redis: redis.Redis = cluster.redis.client
        self._records: dict[str, JobRecord] = {}
        for key in self._redis.scan_iter(f"{cluster.keys.prefix}:*:job", count=1000):
            job_id = key.decode().partition("{")[2].partition("}")[0]
            self._records[job_id] = JobRecord.from_hash(job_id, self._redis.hgetall(key))  # type: ignore[arg-type]  # redis-py types both its clients at once

    def broken_rules(self) -> list[str]:
        return [
            *self._cluster.ended_by_themselves(),
            *(f"{told}: {what}" for told in self._told for what in self._complaints_of(told)),
            *self._about_records(),
            *self._about_streams(),
            *self._about_the_index(),
            *leaks(self._redis, self._cluster.keys.prefix),
        ]

    # -- each client ---------------------------------------------------------------------------------------------------

    def _complaints_of(self, told: Told) -> Iterator[str]:
        yield from told.complaints
        job_ids = self._notes.jobs_of[told.label] | ({told.job_id} if told.job_id else set())
        if len(job_ids) > 1:
            yield f"one request has become the jobs {job_ids}"
        attempts = [attempt for job_id in job_ids for attempt in self._notes.attempts[job_id].values()]
        record = next((self._records[job_id] for job_id in job_ids if job_id in self._records), None)
        if told.outcome == "connection":
            yield from self._about_connection(told)
        elif told.outcome in ("hung", "silent"):
            yield "it has no ending"
        elif told.outcome not in ("success", "left") and told.outcome not in KNOWN:
            yield "no code that a client could know"

        if told.outcome == "success":
            yield from self._about_success(told, attempts, record)
        elif told.text and not any("".join(attempt.said).startswith(told.text) for attempt in attempts):
            yield f"the text is not the beginning of what any attempt has said: {told.text[:300]!r}"
        if told.outcome in OF_MARKERS and record is not None:
            code = record.error and record.error.code
            if code != told.outcome:
                yield f"the record says {record.status.value} {code}"

    def _about_success(self, told: Told, attempts: list[Attempt], record: JobRecord | None) -> Iterator[str]:
        whole = ["".join(attempt.said) for attempt in attempts if attempt.finished]
        if told.text not in whole and not (told.label.startswith("w") and "" in whole):
            yield f"the text is not what an attempt has said that finished: {told.text[:300]!r}"
        if self._durable and (record is None or record.status != "succeeded"):
            yield f"success, but the record says {record and record.status.value}"

    def _about_connection(self, told: Told) -> Iterator[str]:
        outages = [o for o in self._cluster.apis[told.api].outages if o.touches(told.started, told.ended)]
        if not any(outage.abrupt or not told.headed for outage in outages):
            yield "a connection error though its API was not killed"

    # -- what is left --------------------------------------------------------------------------------------------------

    def _about_records(self) -> Iterator[str]:
        for job_id, record in self._records.items():
            if record.status.value not in TERMINAL:
                yield f"{job_id} is still {record.status.value}"
            attempts = self._notes.attempts.get(job_id, {})
            if attempts and max(attempts) > MAX_ATTEMPTS:
                yield f"{job_id} was attempted {max(attempts)} times"
        for name in self._redis.scan_iter(self._cluster.keys.worker_jobs("*")):
            yield f"{name.decode()} still holds {self._redis.smembers(name)!r}"
        for name in self._redis.scan_iter(self._cluster.keys.turns("*")):
            yield f"{name.decode()} still holds {self._redis.lrange(name, 0, -1)!r}"

    def _about_streams(self) -> Iterator[str]:
        """Ids count without a gap, one marker is last, and one attempt at most has said anything."""
        for job_id, record in self._records.items():
            rows: Any = self._redis.xrange(self._cluster.keys.stream(job_id))
            entries = [entry for raw_id, fields in rows for entry in entries_from_row(raw_id, fields)]
            ids = [entry.id for entry in entries]
            kinds = [entry.kind.value for entry in entries]
            before = BEGINNING
            for entry_id in ids:
                if not before.is_followed_by(entry_id):
                    yield f"{job_id}: {entry_id} after {before}"
                before = entry_id
            if [kind for kind in kinds if kind in ("ok", "error")] != kinds[-1:]:
                yield f"{job_id} is {record.status.value}, and its entries are {kinds[-5:]}"
            said_in = {entry_id.attempt for entry_id, kind in zip(ids, kinds, strict=True) if kind == "delta"}
            if len(said_in) > 1:
                yield f"{job_id}: the attempts {said_in} have both said something"

    def _about_the_index(self) -> Iterator[str]:
        """It names the jobs that have a record, and each of them where its record says."""
        keys = self._cluster.keys
        expected, actual = expected_index(keys, list(self._records.values())), actual_index_of(self._redis, keys)
        for name in sorted(expected.keys() | actual.keys()):
            if expected.get(name) != actual.get(name):
                yield f"{name} holds {actual.get(name)}, not {expected.get(name)}"

    # -- sessions ------------------------------------------------------------------------------------------------------

    def turns_that_ended_well(self, session: str) -> list[str]:
        """Labels, in the order in which their turns were accepted."""
        label_of = {job_id: label for label, job_ids in self._notes.jobs_of.items() for job_id in job_ids}
        turns = [r for r in self._records.values() if r.session == f"api:{session}" and r.status == "succeeded"]
        return [label_of[turn.job_id] for turn in sorted(turns, key=lambda turn: turn.accepted_ms)]
