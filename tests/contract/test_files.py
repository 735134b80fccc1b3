"""Files as the official SDK sends and names them, for two tenants, in front of two workers."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests import media_samples as samples
from tests.contract.test_refusals import assert_refused
from tests.deployment import KEY, Deployment, deployed
from tests.waiting import wait_until

ACME, ACME_NEW, OTHER = "sk-acme", "sk-acme-rotated", "sk-other"
DIRECT = "tests.process_direct_agent:make"
MAX_BODY_BYTES, MAX_FILE_BYTES = 100_000, 50_000


@pytest.fixture(scope="module")
def filing(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Deployment]:
    """An agent that answers with what it was given, on two workers; keys of three tenants."""
    with deployed(
        tmp_path_factory.mktemp("filing"),
        redis_url,
        f"test-{secrets.token_hex(4)}",
        workers=2,
        agent=DIRECT,
        api_keys=f"{KEY},acme:{ACME},acme:{ACME_NEW},other:{OTHER}",
        max_file_bytes=MAX_FILE_BYTES,
        max_body_bytes=MAX_BODY_BYTES,
        max_tenant_file_bytes=4 * MAX_FILE_BYTES,
    ) as deployment:
        yield deployment


@pytest.fixture(autouse=True)
def _nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test no job is unfinished, and every key has a time to live."""
    yield
    if "filing" in request.fixturenames:
        filing: Deployment = request.getfixturevalue("filing")
        filing.wait_until_idle()
        assert filing.keys_without_ttl() == []


@pytest.fixture
def client(filing: Deployment) -> Iterator[openai.OpenAI]:
    with filing.client() as client:
        yield client
        for file in client.files.list():
            client.files.delete(file.id)


@pytest.fixture
def http(filing: Deployment) -> Iterator[httpx.Client]:
    with filing.http() as http:
        yield http


def asking(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": [{"type": "text", "text": "read"}, *parts]}]


def uploaded(file_id: str) -> dict[str, Any]:
    return {"type": "file", "file": {"file_id": file_id}}


def inline(content: bytes, filename: str = "a.txt", media_type: str = "text/plain") -> dict[str, Any]:
    url = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    return {"type": "file", "file": {"filename": filename, "file_data": url}}


def agent_was_given(client: openai.OpenAI, messages: list[Any], **options: Any) -> dict[str, Any]:
    """What `process_direct` was called with."""
    answer = client.chat.completions.create(model="endmark", messages=messages, extra_body=options)
    called: dict[str, Any] = json.loads(answer.choices[0].message.content or "")
    return called


# -- the life of a file ------------------------------------------------------------------------------------------------


def test_a_file_is_uploaded_found_read_and_deleted(client: openai.OpenAI) -> None:
    content = samples.png()
    created = client.files.create(file=("é photo.png", content), purpose="vision")
    assert created.object == "file"
    assert (created.bytes, created.filename, created.purpose) == (len(content), "é photo.png", "vision")
    assert created.status == "processed"
    assert created.expires_at == created.created_at + 24 * 3600
    assert client.files.retrieve(created.id) == created
    answer = client.files.content(created.id)
    assert answer.read() == content
    assert answer.response.headers["content-type"] == "application/octet-stream"
    assert answer.response.headers["x-content-type-options"] == "nosniff"
    assert answer.response.headers["content-disposition"] == "attachment; filename*=UTF-8''%C3%A9%20photo.png"
    assert [file.id for file in client.files.list()] == [created.id]
    assert client.files.wait_for_processing(created.id).id == created.id
    deleted = client.files.delete(created.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (created.id, "file", True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as raised:
            call(created.id)
        assert raised.value.code == "file_not_found"
    assert list(client.files.list()) == []


async def test_the_async_client_does_the_same(filing: Deployment) -> None:
    async with filing.async_client() as client:
        created = await client.files.create(file=Path(__file__), purpose="user_data")
        assert (await client.files.content(created.id)).read() == Path(__file__).read_bytes()
        assert [file.id async for file in client.files.list()] == [created.id]
        await client.files.delete(created.id)


def test_a_wire_object_has_just_the_fields_of_the_contract(http: httpx.Client, client: openai.OpenAI) -> None:
    created = http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a.txt", b"abc")}).json()
    assert created == {
        "id": created["id"],
        "object": "file",
        "bytes": 3,
        "created_at": created["created_at"],
        "filename": "a.txt",
        "purpose": "user_data",
        "status": "processed",
        "expires_at": created["expires_at"],
    }
    page = http.get("/v1/files").json()
    ids = {"first_id": created["id"], "last_id": created["id"]}
    assert page == {"object": "list", "data": [created], "has_more": False} | ids
    client.files.delete(created["id"])
    empty: dict[str, Any] = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert http.get("/v1/files").json() == empty


def test_the_list_has_pages_an_order_and_a_filter(client: openai.OpenAI) -> None:
    for number in range(5):
        client.files.create(file=(f"{number}.txt", b"x"), purpose="user_data" if number % 2 else "assistants")
    ids = [file.id for file in client.files.list(order="asc")]
    assert ids == sorted(ids)
    assert [file.id for file in client.files.list()] == ids[::-1], "the newest first, as with OpenAI"
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids, "the SDK turns the pages"
    first = client.files.list(limit=2, order="asc")
    assert ([file.id for file in first.data], first.has_more) == (ids[:2], True)
    last = client.files.list(limit=2, order="asc", after=ids[2])
    assert ([file.id for file in last.data], last.has_more) == (ids[3:], False)
    assert {file.purpose for file in client.files.list(purpose="assistants", limit=1)} == {"assistants"}
    assert len(list(client.files.list(purpose="assistants", limit=1))) == 3


def test_a_list_may_be_deleted_while_its_pages_are_turned(client: openai.OpenAI) -> None:
    for number in range(5):
        client.files.create(file=(f"{number}.txt", b"x"), purpose="user_data")
    assert sum(client.files.delete(file.id).deleted for file in client.files.list(limit=2)) == 5
    assert list(client.files.list()) == []


def test_a_file_expires_when_it_was_asked_to(client: openai.OpenAI) -> None:
    created = client.files.create(
        file=("a.txt", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 1}
    )
    assert created.expires_at == created.created_at + 1

    def is_gone() -> bool:
        try:
            client.files.retrieve(created.id)
        except openai.NotFoundError:
            return True
        return False

    wait_until(is_gone, timeout=10, description="the file to expire")
    assert list(client.files.list()) == []
    with pytest.raises(openai.NotFoundError) as raised:
        agent_was_given(client, asking(uploaded(created.id)))
    assert raised.value.param == "messages[0].content[1].file.file_id"


def test_no_file_is_kept_longer_than_the_deployment_keeps_files(client: openai.OpenAI) -> None:
    month = 30 * 24 * 3600
    created = client.files.create(
        file=("a.txt", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": month}
    )
    assert created.expires_at == created.created_at + 24 * 3600


# -- files in a conversation -------------------------------------------------------------------------------------------


def test_an_agent_on_any_worker_gets_the_files_and_they_are_removed_after_the_turn(client: openai.OpenAI) -> None:
    file = client.files.create(file=("notes.txt", b"some notes"), purpose="user_data")
    picture = client.files.create(file=("a.png", samples.png()), purpose="vision")
    image = {
        "type": "image_url",
        "image_url": {"url": f"data:image/gif;base64,{base64.b64encode(samples.GIF).decode()}"},
    }
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(samples.WAV).decode(), "format": "wav"}}
    parts = [uploaded(file.id), inline(b"inline"), uploaded(picture.id), image, sound]
    for turn in range(4):
        called = agent_was_given(client, asking(*parts), session_id=f"turn {turn}")
        assert called["media"] == {
            "notes.txt": "some notes",
            "a.txt": "inline",
            "image.png": samples.png().decode("latin-1"),
            "image.gif": samples.GIF.decode("latin-1"),
            "audio.wav": samples.WAV.decode("latin-1"),
        }
        assert not any(Path(path).parent.exists() for path in called["paths"])


def test_the_files_of_a_request_are_beside_it_and_go_with_the_end_of_its_job(
    filing: Deployment, client: openai.OpenAI
) -> None:
    secret = b"quite-a-unique-content" * 20
    job_id = client.chat.completions.create(model="endmark", messages=asking(inline(secret))).id
    request: bytes = filing.redis.get(filing.keys.request(job_id))  # type: ignore[assignment]  # redis-py types
    assert base64.b64encode(secret) not in request
    assert not filing.redis.exists(filing.keys.attachments(job_id))


def test_an_upload_with_the_message_is_told_apart_by_its_content(http: httpx.Client) -> None:
    files = [
        ("files", ("a.png", samples.png(), "application/octet-stream")),
        ("files", ("a.mp3", samples.MP3, "audio/mpeg")),
        ("files", ("a.docx", samples.docx(), "application/octet-stream")),
    ]
    answer = http.post("/v1/chat/completions", data={"message": "read"}, files=files)
    assert set(json.loads(answer.json()["choices"][0]["message"]["content"])["media"]) == {
        "image.png",
        "audio.mp3",
        "a.docx",
    }


# -- tenants -----------------------------------------------------------------------------------------------------------


def test_another_tenants_file_does_not_exist(filing: Deployment, client: openai.OpenAI) -> None:
    with filing.client(api_key=ACME) as acme, filing.client(api_key=ACME_NEW) as rotated:
        file = acme.files.create(file=("a.txt", b"theirs"), purpose="user_data")
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file.id)
        with pytest.raises(openai.NotFoundError) as raised:
            agent_was_given(client, asking(inline(b"x"), uploaded(file.id)))
        assert raised.value.code == "file_not_found"
        assert raised.value.param == "messages[0].content[2].file.file_id"
        assert list(client.files.list()) == []
        assert rotated.files.content(file.id).read() == b"theirs", "two keys of one tenant"
        assert agent_was_given(rotated, asking(uploaded(file.id)))["media"] == {"a.txt": "theirs"}
        acme.files.delete(file.id)


def test_tenants_never_share_a_session(filing: Deployment, client: openai.OpenAI) -> None:
    hello = [{"role": "user", "content": "hi"}]
    with filing.client(api_key=ACME) as acme, filing.client(api_key=OTHER) as other:
        keys = [
            agent_was_given(sender, hello, session_id=session_id)["session_key"]
            for sender in (client, acme, other)
            for session_id in ("a", "acme:a", "@acme:a", "api@acme:a", "{a}:job", "*", "turns:a", "a:jobs", "%s", "..")
        ]
        assert len(set(keys)) == len(keys)
        assert keys[0] == "api:a"
        assert "api@acme:a" in keys
        [alone] = [agent_was_given(acme, hello)["session_key"]]
        assert alone == "api@acme:default"
        history = [{"role": "system", "content": "x"}, *hello]
        assert agent_was_given(acme, history)["session_key"].startswith("api@acme:chatcmpl-")
        answer = acme.chat.completions.create(model="endmark", messages=hello)  # type: ignore[arg-type]  # plain dicts
        assert filing.job_field(answer.id, "tenant") == "acme"


@pytest.mark.parametrize("key", ["acme:" + ACME, "acme", "acme:", "other", "sk-acme2"])
def test_the_name_of_a_tenant_opens_nothing(filing: Deployment, key: str) -> None:
    with filing.http(key=key) as http:
        assert_refused(http.get("/v1/files"), 401, code="invalid_api_key")


# -- what is refused ---------------------------------------------------------------------------------------------------


BAD_FILES = [
    (("../a.txt", b"x"), 400, "invalid_filename"),
    (("..\\a.txt", b"x"), 400, "invalid_filename"),
    (("/etc/passwd", b"x"), 400, "invalid_filename"),
    (("..", b"x"), 400, "invalid_filename"),
    (("a" * 256, b"x"), 400, "invalid_filename"),
    (("a.txt", b""), 400, "empty_file"),
    (("a.png", b"no image", "image/png"), 400, "unsupported_file"),
    (("a.exe", b"MZ\x90\x00\x03", "application/octet-stream"), 400, "unsupported_file"),
    (("a.zip", samples.archive("a.txt"), "application/zip"), 400, "unsupported_file"),
    (("a.mp4", b"\x00\x00\x00\x18ftypmp42", "video/mp4"), 400, "unsupported_file"),
    (("a.docx", samples.zip_bomb()), 400, "decompression_bomb"),
    (("a.docx", samples.announced_bomb()), 400, "decompression_bomb"),
    (("a.png", samples.png(60_000, 60_000), "image/png"), 400, "decompression_bomb"),
    (("a.txt", b"x" * (MAX_FILE_BYTES + 1)), 413, "file_too_large"),
    (("a.txt", b"x" * MAX_BODY_BYTES * 2), 413, "payload_too_large"),
]
NAMES = ["dots", "backslash", "absolute", "parent", "long", "empty", "not an image", "program", "archive", "video"]
NAMES += ["bomb", "announced bomb", "huge image", "large", "very large"]


@pytest.mark.parametrize(("file", "status", "code"), BAD_FILES, ids=NAMES)
def test_a_bad_file_is_refused_wherever_it_comes_in(
    http: httpx.Client, client: openai.OpenAI, file: Any, status: int, code: str
) -> None:
    upload = http.post("/v1/files", data={"purpose": "user_data"}, files={"file": file})
    assert_refused(upload, status, code=code, param="file" if code != "payload_too_large" else None)
    assert list(client.files.list()) == []
    form = http.post("/v1/chat/completions", data={"message": "read"}, files={"files": file})
    assert_refused(form, status, code=code, param="files" if code != "payload_too_large" else None)
    filename, content, *declared = file
    part = inline(content, filename, *(declared or ["application/octet-stream"]))
    message = http.post("/v1/chat/completions", json={"messages": asking(part)})
    assert_refused(message, status, code=code)
    if code != "payload_too_large":
        assert message.json()["error"]["param"].startswith("messages[0].content[1].file.")


FILE = {"file": ("a.txt", b"x")}


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, FILE, "purpose"),
        ({"purpose": ""}, FILE, "purpose"),
        ({"purpose": "world-domination"}, FILE, "purpose"),
        ({"purpose": "user_data"}, {"other": ("a.txt", b"x")}, "file"),
        ({"purpose": "user_data", "file": "text"}, {"other": ("a.txt", b"x")}, "file"),
    ],
)
def test_a_bad_upload_is_told_what_is_wrong(http: httpx.Client, data: Any, files: Any, param: str) -> None:
    assert_refused(http.post("/v1/files", data=data, files=files), 400, param=param)
    assert http.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    ("anchor", "seconds", "param"),
    [
        (None, "3600", "expires_after.anchor"),
        ("last_active_at", "3600", "expires_after.anchor"),
        *(
            ("created_at", seconds, "expires_after.seconds")
            for seconds in (None, "", "0", "-1", "soon", "1.5", "2592001")
        ),
        ("created_at", "²", "expires_after.seconds"),
    ],
)
def test_a_bad_expiry_is_told_what_is_wrong(
    http: httpx.Client, anchor: str | None, seconds: str | None, param: str
) -> None:
    fields = {"purpose": "user_data", "expires_after[anchor]": anchor, "expires_after[seconds]": seconds}
    data = {name: value for name, value in fields.items() if value is not None}
    assert_refused(http.post("/v1/files", data=data, files=FILE), 400, param=param)


def test_a_form_that_can_hold_no_file_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/files", data={"purpose": "user_data", "file": "text"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_form")
    assert "multipart/form-data" in answer.json()["error"]["message"]


def test_an_upload_that_is_no_form_is_refused(http: httpx.Client) -> None:
    assert_refused(http.post("/v1/files", json={"purpose": "user_data"}), 400, param="file")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert_refused(http.post("/v1/files", content=b"--y\r\n\r\n", headers=headers), 400)
    assert_refused(http.put("/v1/files"), 405, code="method_not_allowed")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        *(({"limit": limit}, "limit") for limit in ("0", "-1", "10001", "many", "", "1e3", "٣", "9" * 30)),
        *(({"after": after}, "after") for after in ("", "file-1", "chatcmpl-1", "*", "file-" + "0" * 31 + "}")),
        ({"order": "sideways"}, "order"),
    ],
)
def test_a_bad_list_query_is_told_what_is_wrong(http: httpx.Client, query: dict[str, str], param: str) -> None:
    assert_refused(http.get("/v1/files", params=query), 400, code="invalid_request", param=param)


@pytest.mark.parametrize("file_id", ["file-1", "file-" + "0" * 32, "default:file-" + "0" * 32, "*", "%7B%7D", "%2e%2e"])
def test_an_unknown_file_is_a_404(http: httpx.Client, file_id: str) -> None:
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert_refused(http.request(method, f"/v1/files/{file_id}{path}"), 404)
    response = http.post("/v1/chat/completions", json={"messages": asking(uploaded(file_id))})
    assert_refused(response, 404, code="file_not_found", param="messages[0].content[1].file.file_id")


def test_a_tenant_stores_only_as_much_as_it_may(filing: Deployment, client: openai.OpenAI) -> None:
    def store(sender: openai.OpenAI) -> str:
        return sender.files.create(file=("a.txt", b"x" * MAX_FILE_BYTES), purpose="user_data").id

    ids = [store(client) for _ in range(4)]
    with pytest.raises(openai.APIStatusError, match="Delete some, or wait") as raised:
        client.files.create(file=("a.txt", b"x"), purpose="user_data")
    assert (raised.value.status_code, raised.value.code) == (413, "file_storage_full")
    with filing.client(api_key=OTHER) as other:
        other.files.delete(store(other))
    client.files.delete(ids[0])
    store(client)


def test_the_files_of_one_request_are_limited_together(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.txt", b"x" * MAX_FILE_BYTES), purpose="user_data")
    assert len(agent_was_given(client, asking(uploaded(file.id), uploaded(file.id)))["media"]) == 2
    with pytest.raises(openai.APIStatusError) as raised:
        agent_was_given(client, asking(*[uploaded(file.id)] * 3))
    assert raised.value.status_code == 413


def test_a_file_that_is_deleted_while_the_request_waits_fails_it(tmp_path: Path, redis_url: str, prefix: str) -> None:
    with deployed(tmp_path, redis_url, prefix, workers=0, agent=DIRECT) as service, service.client() as client:
        file = client.files.create(file=("a.txt", b"x"), purpose="user_data")
        stream = client.chat.completions.create(model="endmark", messages=asking(uploaded(file.id)), stream=True)
        client.files.delete(file.id)
        service.start_worker()
        with pytest.raises(openai.APIError, match="was deleted or has expired") as raised:
            list(stream)
        assert raised.value.code == "agent_error"


def test_files_cannot_be_stored_without_redis(tmp_path: Path, prefix: str) -> None:
    with (
        deployed(tmp_path, "redis://127.0.0.1:1/0", prefix, workers=0) as service,
        service.http() as http,
    ):
        for response in (
            http.post("/v1/files", data={"purpose": "user_data"}, files=FILE),
            http.get("/v1/files"),
            http.get("/v1/files/file-" + "0" * 32),
            http.post("/v1/chat/completions", json={"messages": asking(uploaded("file-" + "0" * 32))}),
        ):
            assert_refused(response, 503, code="files_unavailable")
            assert response.headers["retry-after"]
