"""The files of a deployment: an object store in Redis. Only this module knows that it is one.

    uploaded file     belongs to a tenant, has an id, and lives as long as its own time to live
    attachment        came inside of a request, belongs to its job, and lives as long as the stored request

Rule 1: a file is one key. What is told of it and its content expire together.
Rule 2: the tenant is part of the key. Nobody finds another tenant's file, whatever id is asked for.
Rule 3: ids order as the files were created, so an id is a place in the list even when its file is gone.

Errors:
    redis.exceptions.RedisError   Redis did not answer or refused
    FileStoreFullError            there is no room for the file
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from arq.connections import ArqRedis
from redis.exceptions import OutOfMemoryError

from shared import scripts
from shared.keys import Keys
from shared.settings import Settings

MAX_TENANT_FILES = 10_000  # as many as one page of the list may hold
LIST_STEP = 200  # files that one round trip of the list reads
ORPHAN_TTL_S = 60  # how long attachments wait for the job that takes them over
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")
_RECORD = ["filename", "purpose", "media_type", "bytes", "created_ms", "expires_ms"]


class FileStoreFullError(Exception):
    """There is no room for the file. `of_tenant`: the tenant has stored as much as it may; otherwise Redis is full."""

    def __init__(self, message: str, *, of_tenant: bool) -> None:
        super().__init__(message)
        self.of_tenant = of_tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """What is known of an uploaded file, without its content. Instants are Redis's clock, ms since the epoch."""

    file_id: str
    filename: str
    purpose: str
    media_type: str
    size: int  # bytes
    created_ms: int
    expires_ms: int


class FilePage(NamedTuple):
    files: list[StoredFile]
    has_more: bool


def is_file_id(text: str) -> bool:
    """Whether this can be the id of a file. What cannot never becomes part of a key."""
    return _FILE_ID.fullmatch(text) is not None


class FileStore:
    """The files of one deployment."""

    def __init__(self, redis: ArqRedis, settings: Settings) -> None:
        self._redis = redis
        self._keys = Keys(settings.prefix)
        self._max_tenant_bytes = settings.max_tenant_file_bytes
        self._put = redis.register_script(scripts.source("put_file"))
        self._delete = redis.register_script(scripts.source("delete_file"))

    # -- uploaded files ------------------------------------------------------------------------------------------------

    async def put(
        self, tenant: str, content: bytes, *, filename: str, purpose: str, media_type: str, ttl_s: float
    ) -> StoredFile:
        """Stores a file under a new id: a repeated call stores another one. Raises FileStoreFullError."""
        ttl_ms = round(ttl_s * 1000)
        fields = {"filename": filename, "purpose": purpose, "media_type": media_type}
        args: list[str | bytes | int] = [
            self._keys.prefix,
            tenant,
            secrets.token_hex(11)[1:],  # with the 11 digits of the instant, 32
            content,
            ttl_ms,
            self._max_tenant_bytes,
            MAX_TENANT_FILES,
            *(part for pair in fields.items() for part in pair),
        ]
        try:
            answer = await self._put([self._keys.files(tenant)], args)
        except OutOfMemoryError as error:
            raise FileStoreFullError("Redis is full", of_tenant=False) from error
        if answer == b"too_many_bytes":
            raise FileStoreFullError(f"more than {self._max_tenant_bytes} bytes", of_tenant=True)
        if answer == b"too_many_files":
            raise FileStoreFullError(f"more than {MAX_TENANT_FILES} files", of_tenant=True)
        file_id, created_ms = answer[0].decode(), int(answer[1])
        return StoredFile(
            file_id=file_id, size=len(content), created_ms=created_ms, expires_ms=created_ms + ttl_ms, **fields
        )

    async def find(self, tenant: str, file_ids: Sequence[str]) -> list[StoredFile | None]:
        """The files with these ids, in order; None for those that the tenant does not have."""
        askable = [file_id for file_id in file_ids if is_file_id(file_id)]
        async with self._redis.pipeline(transaction=False) as pipe:
            for file_id in askable:
                pipe.hmget(self._keys.file(tenant, file_id), _RECORD)
            found = dict(zip(askable, await pipe.execute(), strict=True))
        return [_stored_file(file_id, found[file_id]) if file_id in found else None for file_id in file_ids]

    async def read(self, tenant: str, file_id: str) -> tuple[StoredFile, bytes] | None:
        """A file with its content; None if the tenant does not have it."""
        if not is_file_id(file_id):
            return None
        *record, content = await self._redis.hmget(self._keys.file(tenant, file_id), [*_RECORD, "content"])  # type: ignore[misc]  # redis-py types both its clients at once
        file = _stored_file(file_id, record)
        return None if file is None else (file, content)

    async def page(
        self, tenant: str, *, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> FilePage:
        """Up to `limit` files in the order of their creation, behind the place of the id `after`."""
        members: list[bytes] = await self._redis.zrange(self._keys.files(tenant), 0, -1)
        ids = sorted((member.decode().partition(":")[0] for member in members), reverse=newest_first)
        if after is not None:
            ids = [file_id for file_id in ids if (file_id < after if newest_first else file_id > after)]
        files: list[StoredFile] = []
        for start in range(0, len(ids), LIST_STEP):
            for file in await self.find(tenant, ids[start : start + LIST_STEP]):
                if file is not None and purpose in (None, file.purpose):
                    files.append(file)
            if len(files) > limit:
                break
        return FilePage(files[:limit], has_more=len(files) > limit)

    async def delete(self, tenant: str, file_id: str) -> bool:
        """False if the tenant does not have the file."""
        if not is_file_id(file_id):
            return False
        return bool(await self._delete([self._keys.file(tenant, file_id)], [self._keys.prefix, tenant, file_id]))

    # -- attachments ---------------------------------------------------------------------------------------------------

    async def attach(self, job_id: str, contents: Sequence[bytes]) -> None:
        """Stores the attachments of a job that is about to be submitted. Raises FileStoreFullError.

        The script that accepts the job takes them over; if it is not accepted, they are soon gone.
        """
        key = self._keys.attachments(job_id)
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.rpush(key, *contents)
                pipe.pexpire(key, ORPHAN_TTL_S * 1000)
                await pipe.execute()
        except OutOfMemoryError as error:
            raise FileStoreFullError("Redis is full", of_tenant=False) from error

    async def discard(self, job_id: str) -> None:
        """Drops the attachments of a job that was not accepted."""
        await self._redis.unlink(self._keys.attachments(job_id))

    async def attachments(self, job_id: str) -> list[bytes]:
        """The attachments of a job by their numbers; empty if they are gone."""
        contents: list[bytes] = await self._redis.lrange(self._keys.attachments(job_id), 0, -1)  # type: ignore[misc]  # as above
        return contents


def _stored_file(file_id: str, record: Sequence[bytes | None]) -> StoredFile | None:
    if None in record:  # it has expired, or never was
        return None
    filename, purpose, media_type, size, created_ms, expires_ms = (value.decode() for value in record if value)
    return StoredFile(
        file_id=file_id,
        filename=filename,
        purpose=purpose,
        media_type=media_type,
        size=int(size),
        created_ms=int(created_ms),
        expires_ms=int(expires_ms),
    )
