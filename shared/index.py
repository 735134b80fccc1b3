"""Finds jobs: by time, tenant, kind, status, model, error, session, worker and metadata, a page at a time.

    shelf     a sorted set of jobs that are alike: of one tenant, kind, status, error code and model, stored or not
    place     where a job stands in every list: the instant of its acceptance, and its id

Rule 1: a job is on one shelf. The scripts that change its status move it in the same step.
Rule 2: places never change, so a page begins where the one before ended, whatever came and went meanwhile.
Rule 3: the record decides. What the index names is shown only if its record is there and is what was asked for.
Rule 4: no call holds up Redis for long: it looks at LOOKS jobs at most, and says where the next one goes on.

Errors:
    shared.connection.FAILURES    Redis refused, or did not answer
    BadCursorError                a text is no cursor
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from shared.jobs import JobKind, JobRecord, Status, pair_digest, pairs_of
from shared.store import JobStore
from shared.text import json_bytes

LOOKS = 500  # jobs that one call of the script looks at
CALLS = 20  # of the script, for one page: what nothing is found for is a page that is short, with a cursor
_PLACE = re.compile(r"(\d{1,15})\.([A-Za-z0-9_-]{1,64})")
_CHECK_BYTES = 6


class BadCursorError(Exception):
    """A text is no cursor, or was changed on its way."""


class Place(NamedTuple):
    """Where a job stands in every list."""

    accepted_ms: int
    job_id: str

    def cursor(self) -> str:
        """What a client gives back to go on behind this place. Opaque to it."""
        text = f"{self.accepted_ms}.{self.job_id}".encode()
        return urlsafe_b64encode(_check(text) + text).rstrip(b"=").decode()

    @classmethod
    def parse(cls, cursor: str) -> Place:
        """The inverse of `cursor`. Raises BadCursorError."""
        try:
            raw = urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
            match = _PLACE.fullmatch(raw[_CHECK_BYTES:].decode("ascii"))
        except ValueError as error:
            raise BadCursorError("the text is no cursor") from error
        place = match and cls(int(match[1]), match[2])
        if place is None or place.cursor() != cursor:
            raise BadCursorError("the text is no cursor")
        return place

    @classmethod
    def of(cls, job: JobRecord) -> Place:
        return cls(job.accepted_ms, job.job_id)


def _check(text: bytes) -> bytes:
    return blake2b(text, digest_size=_CHECK_BYTES, person=b"cursor").digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """What jobs are asked for: those for which all of this holds. The defaults hold for every job."""

    statuses: frozenset[Status] = frozenset()  # one of these; empty: any
    tenant: str | None = None
    kind: JobKind | None = None
    stored: bool | None = None
    model: str | None = None
    error_code: str | None = None
    session: str | None = None  # session key
    worker: str | None = None  # who executes or executed the last attempt
    metadata: Mapping[str, str] = field(default_factory=dict)  # pairs that the job's metadata holds
    since_ms: int | None = None  # least instant of acceptance
    until_ms: int | None = None  # greatest

    def asks_for_nothing(self) -> bool:
        """Whether no job can be like that: the index has no word for an empty value."""
        return "" in (self.tenant, self.model, self.error_code, self.session, self.worker)


class JobPage(NamedTuple):
    jobs: list[JobRecord]  # may be fewer than asked for, even none, although there are more
    next: Place | None  # behind which the next page begins; None: there are no more


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """What the jobs of one shelf have in common."""

    tenant: str
    kind: JobKind
    stored: bool
    status: Status
    error_code: str  # "" unless the job has failed or was cancelled
    model: str

    @classmethod
    def parse(cls, name: str) -> Shelf:
        """A shelf's name as the scripts make it."""
        tenant, kind, store, status, error_code, model = name.split(":", 5)
        return cls(
            tenant=tenant,
            kind=JobKind(kind),
            stored=store == "1",
            status=Status(status),
            error_code=error_code,
            model=model,
        )


class JobIndex:
    """The jobs of one deployment, to be looked through."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._keys = store.keys

    async def page(
        self,
        asked: JobFilter,
        *,
        after: Place | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> JobPage:
        """Up to `limit` jobs in the order of their acceptance. What is rare among many may need several pages."""
        jobs: list[JobRecord] = []
        if asked.asks_for_nothing():
            return JobPage(jobs, None)
        for _ in range(CALLS):
            may_be_more, last_ms, last_id, rows = await self._store.script("list_jobs")(
                [self._keys.shelves],
                [
                    self._keys.prefix,
                    limit + 1 - len(jobs),
                    LOOKS,
                    "desc" if newest_first else "asc",
                    *_optional(asked.since_ms, asked.until_ms),
                    *(after or ("", "")),
                    " ".join(sorted(asked.statuses)),
                    *_optional(asked.tenant, asked.kind, None if asked.stored is None else int(asked.stored)),
                    *_optional(asked.model, asked.error_code, asked.session, asked.worker),
                    *(pair_digest(key, value) for key, value in asked.metadata.items()),
                ],
            )
            jobs += [JobRecord.from_hash(job_id.decode(), _fields(flat)) for job_id, flat in rows]
            if len(jobs) > limit:
                return JobPage(jobs[:limit], Place.of(jobs[limit - 1]))
            if may_be_more == b"0":
                return JobPage(jobs, None)
            after = Place(int(last_ms), last_id.decode())
        return JobPage(jobs, after)

    async def counts(self, *, since_ms: int | None = None, until_ms: int | None = None) -> dict[Shelf, int]:
        """How many jobs there are of each sort, all at one instant."""
        rows = await self._store.script("count_jobs")(
            [self._keys.shelves],
            [
                self._keys.prefix,
                "-inf" if since_ms is None else since_ms,
                "+inf" if until_ms is None else until_ms,
            ],
        )
        return {Shelf.parse(name.decode()): count for name, count in rows if count}

    async def place_of_deleted(self, tenant: str, job_id: str) -> Place | None:
        """Where a job stood that was deleted some minutes ago, so that a client may delete what it pages through."""
        accepted_ms: bytes | None = await self._store.redis.get(self._keys.deleted(tenant, job_id))
        return None if accepted_ms is None else Place(int(accepted_ms), job_id)

    async def describe(self, job_id: str, metadata: Mapping[str, str]) -> bool:
        """Gives a job other metadata; False if there is no such job."""
        described = await self._store.script("describe")(
            [self._keys.job(job_id)], [self._keys.prefix, job_id, json_bytes(dict(metadata)), pairs_of(metadata)]
        )
        return bool(described)


def _optional(*values: str | int | None) -> Iterable[str | int]:
    return ("" if value is None else value for value in values)


def _fields(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
