"""Whose a key is, and that tenants never share a session or a file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send

from api.errors import AuthenticationError
from api.middleware import AuthMiddleware
from shared.jobs import session_key
from shared.keys import Keys
from shared.settings import DEFAULT_TENANT, Settings

TENANTS = st.one_of(st.just(DEFAULT_TENANT), st.from_regex(r"[a-z][a-z0-9_]{0,31}", fullmatch=True))
SESSION_IDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20) | st.text(
    "a:@{}*?[]", min_size=1, max_size=6
)


@pytest.mark.parametrize(
    ("api_keys", "tenant_keys"),
    [
        ("", ()),
        ("one", ((b"one", "default"),)),
        ("one, acme:two ,acme:three", ((b"one", "default"), (b"two", "acme"), (b"three", "acme"))),
        ("default:one", ((b"one", "default"),)),
        ("a_1:sk:with:colons", ((b"sk:with:colons", "a_1"),)),
        ("a" * 32 + ":x", ((b"x", "a" * 32),)),
        ("acme:same,acme:same", ((b"same", "acme"), (b"same", "acme"))),
    ],
)
def test_a_key_may_name_its_tenant(api_keys: str, tenant_keys: tuple[tuple[bytes, str], ...]) -> None:
    assert Settings(api_keys=api_keys).tenant_keys == tenant_keys


@pytest.mark.parametrize(
    "api_keys",
    [
        *("acme:", ":sesame", "Acme:sesame", "1a:sesame", "a-b:sesame", "a b:sesame", "a" * 33 + ":sesame"),
        *("acme:sesame,other:sesame", "sesame,acme:sesame"),
    ],
)
def test_a_key_that_is_nobodys_or_two_tenants_is_refused_at_the_start(api_keys: str) -> None:
    with pytest.raises(ValidationError, match="entry") as raised:
        Settings(api_keys=api_keys)
    assert "sesame" not in str(raised.value)


async def _tenant_seen(settings: Settings, key: str | None) -> str:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["tenant"])

    async def receive() -> Message:
        raise AssertionError("nothing is read")

    async def send(message: Message) -> None:
        raise AssertionError("nothing is sent")

    headers = [(b"host", b"127.0.0.1")]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    scope: Scope = {"type": "http", "path": "/v1/models", "headers": headers, "server": ("127.0.0.1", 80)}
    await AuthMiddleware(app, settings)(scope, receive, send)
    return seen[0]


async def test_a_request_belongs_to_the_tenant_of_its_key() -> None:
    settings = Settings(api_keys="one,acme:two,acme:three,other:four")
    keys = ("one", "two", "three", "four")
    assert [await _tenant_seen(settings, key) for key in keys] == ["default", "acme", "acme", "other"]
    for key in (None, "acme:two", "acme", "acme:", "five"):
        with pytest.raises(AuthenticationError):
            await _tenant_seen(settings, key)


async def test_without_keys_everything_is_the_default_tenants() -> None:
    assert await _tenant_seen(Settings(), None) == "default"
    assert await _tenant_seen(Settings(), "anything") == "default"


def test_sessions_are_named_as_with_nanobot_and_after_their_tenant() -> None:
    assert session_key("default", "a") == "api:a"
    assert session_key("acme", "a") == "api@acme:a"


@given(TENANTS, SESSION_IDS, TENANTS, SESSION_IDS)
def test_no_session_id_names_a_session_of_another_tenant(tenant: str, one: str, other_tenant: str, other: str) -> None:
    same = (tenant, one) == (other_tenant, other)
    assert (session_key(tenant, one) == session_key(other_tenant, other)) is same


@given(TENANTS, SESSION_IDS)
def test_no_session_id_names_another_key(tenant: str, session_id: str) -> None:
    """What follows the kind of a key is the session's own name to its end, so braces, colons and stars mean nothing."""
    keys = Keys("p")
    session = session_key(tenant, session_id)
    assert keys.session(session) == f"p:session:{session}"
    others = {keys.queue, keys.bell, keys.deadlines, keys.workers, keys.files(tenant), keys.file_bytes(tenant)}
    others |= {keys.file(tenant, session_id), keys.job(session_id), keys.worker(session_id)}
    others |= {keys.attachments(session_id), keys.request(session_id), keys.stream(session_id)}
    assert keys.session(session) not in others


@given(TENANTS, TENANTS)
def test_tenants_share_no_key_of_files(one: str, other: str) -> None:
    keys = Keys("p")
    file_id = "file-" + "0" * 32
    names = [{keys.files(tenant), keys.file_bytes(tenant), keys.file(tenant, file_id)} for tenant in (one, other)]
    assert len(names[0]) == 3
    assert bool(names[0] & names[1]) is (one == other)
