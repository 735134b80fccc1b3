"""Files in Redis: whose they are, how long they live, how many there may be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from shared.files import FileStore, FileStoreFullError, StoredFile
from shared.jobs import Submission
from shared.settings import Settings
from shared.store import JobStore
from tests.conftest import Backend, MakeStore
from tests.waiting import async_wait_until

HOUR_S = 3600.0


@pytest.fixture
def files(backend: Backend, prefix: str) -> FileStore:
    settings = Settings(redis_url=backend.url, prefix=prefix, max_tenant_file_bytes=100)
    return FileStore(backend.client(settings), settings)


async def put(files: FileStore, content: bytes = b"hi", *, tenant: str = "default", **changes: Any) -> StoredFile:
    fields: dict[str, Any] = {"filename": "a.txt", "purpose": "user_data", "media_type": "text/plain", "ttl_s": HOUR_S}
    return await files.put(tenant, content, **(fields | changes))


async def ids(files: FileStore, **changes: Any) -> tuple[list[str], bool]:
    options: dict[str, Any] = {"after": None, "limit": 100, "newest_first": False, "purpose": None}
    page = await files.page("default", **(options | changes))
    return [file.file_id for file in page.files], page.has_more


async def until_expired(files: FileStore, file: StoredFile) -> None:
    async def is_gone() -> bool:
        return await files.read("default", file.file_id) is None

    predicate: Callable[[], Awaitable[bool] | bool] = is_gone
    await async_wait_until(predicate, timeout=5, description="the file to expire")


async def test_what_was_stored_is_found_and_read(files: FileStore) -> None:
    content = bytes(range(64))
    file = await put(files, content, filename="é 🙂.txt", media_type="image/png", purpose="vision")
    assert (file.size, file.filename, file.expires_ms - file.created_ms) == (64, "é 🙂.txt", 3_600_000)
    assert await files.find("default", [file.file_id]) == [file]
    assert await files.read("default", file.file_id) == (file, content)


async def test_another_tenant_has_no_such_file(files: FileStore) -> None:
    file = await put(files, tenant="acme")
    assert await files.find("default", [file.file_id]) == [None]
    assert await files.read("default", file.file_id) is None
    assert not await files.delete("default", file.file_id)
    assert await ids(files) == ([], False)
    assert await files.read("acme", file.file_id) is not None


@pytest.mark.parametrize(
    "file_id", ["", "file-1", "file-" + "g" * 32, "acme:file-" + "0" * 32, "*", "{}", "file-" + "0" * 33]
)
async def test_what_cannot_be_an_id_is_no_file(files: FileStore, file_id: str) -> None:
    assert await files.find("default", [file_id]) == [None]
    assert await files.read("default", file_id) is None
    assert not await files.delete("default", file_id)


async def test_some_of_many_are_found(files: FileStore) -> None:
    one, other = await put(files), await put(files)
    found = await files.find("default", [other.file_id, "nonsense", "file-" + "0" * 32, one.file_id, other.file_id])
    assert found == [other, None, None, one, other]


async def test_a_deleted_file_is_gone_and_leaves_room(files: FileStore) -> None:
    file = await put(files, b"x" * 100)
    assert await files.delete("default", file.file_id)
    assert not await files.delete("default", file.file_id)
    assert await files.read("default", file.file_id) is None
    assert await ids(files) == ([], False)
    await put(files, b"x" * 100)


async def test_a_tenant_has_limited_room_of_its_own(files: FileStore) -> None:
    await put(files, b"x" * 60)
    with pytest.raises(FileStoreFullError) as raised:
        await put(files, b"x" * 41)
    assert raised.value.of_tenant
    await put(files, b"x" * 41, tenant="acme")
    await put(files, b"x" * 40)


async def test_a_tenant_has_a_limited_number_of_files(files: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.files.MAX_TENANT_FILES", 2)
    await put(files)
    await put(files)
    with pytest.raises(FileStoreFullError, match="more than 2 files"):
        await put(files)


async def test_an_expired_file_is_gone_and_leaves_room(files: FileStore) -> None:
    kept = await put(files, b"x" * 10)
    file = await put(files, b"x" * 90, ttl_s=0.2)
    await until_expired(files, file)
    assert await files.find("default", [file.file_id]) == [None]
    assert await ids(files) == ([kept.file_id], False)
    await put(files, b"x" * 90)
    with pytest.raises(FileStoreFullError):
        await put(files, b"x")


async def test_the_room_is_right_after_all_files_have_expired(files: FileStore) -> None:
    file = await put(files, b"x" * 100, ttl_s=0.2)
    await until_expired(files, file)
    await put(files, b"x" * 100)


async def test_files_are_listed_in_the_order_of_their_creation(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.files.LIST_STEP", 2)
    purposes = ["vision", "user_data", "vision", "vision", "user_data"]
    stored = [await put(files, purpose=purpose) for purpose in purposes]
    created = sorted(file.file_id for file in stored)  # of one millisecond, any may be the first
    assert [file.created_ms for file in sorted(stored, key=lambda file: file.file_id)] == sorted(
        file.created_ms for file in stored
    )
    assert await ids(files) == (created, False)
    assert await ids(files, newest_first=True) == (created[::-1], False)
    assert await ids(files, limit=2) == (created[:2], True)
    assert await ids(files, limit=2, after=created[1]) == (created[2:4], True)
    assert await ids(files, limit=2, after=created[3]) == (created[4:], False)
    assert await ids(files, limit=5) == (created, False)
    assert await ids(files, after=created[2], newest_first=True) == (created[1::-1], False)
    visions = [file.file_id for file in sorted(stored, key=lambda file: file.file_id) if file.purpose == "vision"]
    assert await ids(files, limit=2, purpose="vision") == (visions[:2], True)
    assert await ids(files, limit=3, purpose="vision") == (visions, False)
    assert await ids(files, purpose="fine-tune") == ([], False)


async def test_a_deleted_file_is_still_a_place_in_the_list(files: FileStore) -> None:
    """A client that deletes what it lists goes on behind a file that it has just deleted."""
    stored = sorted([(await put(files)).file_id for _ in range(3)])
    await files.delete("default", stored[1])
    assert await ids(files, after=stored[1]) == (stored[2:], False)
    assert await ids(files, after=stored[1], newest_first=True) == (stored[:1], False)


# -- attachments -------------------------------------------------------------------------------------------------------


def a_job(job_id: str) -> Submission:
    return Submission(
        job_id=job_id, session="", model="endmark", messages=[{"role": "user", "content": "hi"}], owns_history=True
    )


async def test_attachments_live_until_the_job_ends(make_store: MakeStore, backend: Backend) -> None:
    store: JobStore = make_store(retention_s=7)
    files = FileStore(store.redis, store.settings)
    contents = [b"\x00\xff", b"two"]
    await files.attach("job-1", contents)
    key, request_key = store.keys.attachments("job-1"), store.keys.request("job-1")
    assert 0 < await store.redis.ttl(key) <= 60, "nobody has taken them over yet"
    await store.submit(a_job("job-1"))
    assert await files.attachments("job-1") == contents
    assert await store.redis.ttl(key) == pytest.approx(await store.redis.ttl(request_key), abs=1)
    await store.claim("worker-1", 1)
    assert await store.redis.ttl(key) == pytest.approx(await store.redis.ttl(request_key), abs=1)
    await store.cancel("job-1", "no longer wanted")
    assert await files.attachments("job-1") == []
    assert await files.attachments("job-2") == []
