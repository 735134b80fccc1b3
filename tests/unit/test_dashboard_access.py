"""Who is let into the dashboard, and where its requests come from."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from itsdangerous import TimestampSigner
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from api.app import create_app
from api.dashboard import access
from api.dashboard.access import COOKIE, SESSION_S, Sessions, TooManyTriesError, Tries, comes_from_our_page, local_path
from shared.settings import Settings

ADMIN, OTHER = "sk-admin", "sk-other-admin"
HERE = "http://127.0.0.1:8900"


def settings_with(**changes: Any) -> Settings:
    # Nobody listens there: what these tests ask for is answered, or refused, before Redis is needed.
    return Settings(redis_url="redis://127.0.0.1:1/0", **changes)


@pytest.fixture(autouse=True)
def _quick_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "WRONG_KEY_S", 0.0)


def browser(**changes: Any) -> TestClient:
    """Of a service with one admin key, unless the settings say otherwise."""
    changes = {"api_keys": "sk-user", "admin_keys": ADMIN} | changes
    app = create_app(settings_with(**changes))
    return TestClient(app, base_url=HERE, follow_redirects=False, client=("127.0.0.1", 5))


@pytest.fixture
def operated() -> Iterator[TestClient]:
    with browser() as client:
        yield client


def log_in(client: TestClient, key: str = ADMIN, **headers: str) -> Any:
    return client.post("/dashboard/login", data={"key": key}, headers={"origin": HERE} | headers)


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_an_admin_key_gets_a_cookie_that_scripts_and_other_sites_do_not(operated: TestClient) -> None:
    answer = log_in(operated)
    assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard/")
    cookie = answer.headers["set-cookie"].lower()
    for attribute in ("httponly", "samesite=strict", "path=/dashboard", f"max-age={SESSION_S}"):
        assert attribute in cookie
    assert "secure" not in cookie
    assert ADMIN not in cookie
    assert operated.get("/dashboard/login").status_code == 200


def test_over_https_the_cookie_is_secure() -> None:
    app = create_app(settings_with(api_keys="sk-user", admin_keys=ADMIN))
    with TestClient(app, base_url="https://jobs.example", follow_redirects=False) as client:
        answer = log_in(client, origin="https://jobs.example")
    assert "secure" in answer.headers["set-cookie"].lower()


@pytest.mark.parametrize("key", ["", "sk-user", "wrong", ADMIN + "x", "\udcff"])
def test_no_other_key_gets_one(operated: TestClient, key: str) -> None:
    answer = operated.post(
        "/dashboard/login",
        content=b"key=" + key.encode("utf-8", "surrogateescape"),
        headers={"origin": HERE, "content-type": "application/x-www-form-urlencoded"},
    )
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_every_replica_knows_a_session_and_a_removed_key_ends_it() -> None:
    sessions = Sessions(settings_with(admin_keys=f"{ADMIN},{OTHER}"))
    cookie = sessions.begin(ADMIN)
    assert cookie is not None
    assert ADMIN not in cookie
    operator = sessions.operator(cookie)
    assert operator is not None
    assert operator.startswith("key-")
    assert Sessions(settings_with(admin_keys=f"{OTHER},{ADMIN}")).operator(cookie) == operator
    assert Sessions(settings_with(admin_keys=ADMIN)).operator(cookie) == operator
    assert Sessions(settings_with(admin_keys=OTHER)).operator(cookie) is None


def test_a_forged_session_is_nobodys() -> None:
    sessions = Sessions(settings_with(admin_keys=f"{ADMIN},{OTHER}"))
    one, other = sessions.begin(ADMIN), sessions.begin(OTHER)
    assert one is not None
    assert other is not None
    name, rest = one.split(".", 1)
    forged = TimestampSigner("guessed", salt="endmark dashboard session").sign(name).decode()
    for cookie in (None, "", ".", name, f"{name}.", f"{name}.x.y", forged, f"{other.split('.')[0]}.{rest}", one + "x"):
        assert sessions.operator(cookie) is None


def test_a_session_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(settings_with(admin_keys=ADMIN))
    now = TimestampSigner("x").get_timestamp()
    cookie = sessions.begin(ADMIN)
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda _signer: now + SESSION_S - 5)
    assert sessions.operator(cookie) is not None
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda _signer: now + SESSION_S + 5)
    assert sessions.operator(cookie) is None


def test_without_a_session_pages_lead_to_the_login_and_come_back(operated: TestClient) -> None:
    answer = operated.get("/dashboard/jobs?status=failed")
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        "/dashboard/login?next=/dashboard/jobs%3Fstatus%3Dfailed",
    )
    assert operated.get("/dashboard/jobs", headers={"sec-fetch-dest": "empty"}).status_code == 401
    assert (
        operated.get(
            "/dashboard/jobs/x/events", headers={"accept": "text/event-stream", "sec-fetch-dest": "empty"}
        ).status_code
        == 401
    )
    assert operated.post("/dashboard/queue/pause", headers={"origin": HERE}).status_code == 401


def test_an_api_key_opens_no_page(operated: TestClient) -> None:
    for key in ("sk-user", ADMIN):
        answer = operated.get("/dashboard/jobs", headers={"authorization": f"Bearer {key}", "sec-fetch-dest": "empty"})
        assert answer.status_code == 401


def test_the_api_knows_nothing_of_the_session(operated: TestClient) -> None:
    log_in(operated)
    cookie = operated.cookies.get(COOKIE)
    assert cookie
    for path in ("/v1/jobs", "/v1/queue"):
        answer = operated.get(
            path, headers={"cookie": f"{COOKIE}={cookie}", "origin": HERE, "sec-fetch-site": "same-origin"}
        )
        assert answer.status_code == 401


def test_whoever_logs_out_is_out(operated: TestClient) -> None:
    log_in(operated)
    assert operated.post("/dashboard/logout", headers={"origin": HERE}).status_code == 303
    assert operated.get("/dashboard/jobs").headers["location"].startswith("/dashboard/login")


async def test_one_address_does_not_try_many_keys_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "WRONG_KEY_S", 60.0)
    tries = Tries()
    wrong = [asyncio.create_task(_one_wrong_try(tries)) for _ in range(access.MAX_TRIES)]
    await asyncio.sleep(0)
    with pytest.raises(TooManyTriesError):
        await _one_wrong_try(tries)
    async with tries.one("another address"):
        pass
    for task in wrong:
        task.cancel()
    await asyncio.gather(*wrong, return_exceptions=True)
    async with tries.one("address"):
        pass


async def _one_wrong_try(tries: Tries) -> None:
    async with tries.one("address"):
        await tries.was_wrong()


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        ("/dashboard/jobs?status=failed", "/dashboard/jobs?status=failed"),
        ("", "/dashboard/"),
        ("https://evil.example/", "/dashboard/"),
        ("//evil.example/dashboard/", "/dashboard/"),
        ("/dashboard/..//evil.example", "/dashboard/"),
        ("/dashboard/\\evil", "/dashboard/"),
        ("/dashboard/\r\nx: y", "/dashboard/"),
        ("/v1/jobs", "/dashboard/"),
    ],
)
def test_the_login_leads_to_pages_of_ours_only(asked: str, target: str) -> None:
    assert local_path(asked) == target


# -- where requests come from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "is_ours"),
    [
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "same-site", "origin": HERE}, False),
        ({"sec-fetch-site": "cross-site", "origin": HERE}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"origin": HERE}, True),
        ({"origin": "https://127.0.0.1:8900"}, True),  # TLS ends before us
        ({"origin": "http://127.0.0.1:8901"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://["}, False),
        ({}, False),
    ],
)
def test_only_our_own_pages_act(headers: dict[str, str], is_ours: bool) -> None:
    assert comes_from_our_page(Headers(headers | {"host": "127.0.0.1:8900"})) is is_ours


@pytest.mark.parametrize("path", ["jobs/x/cancel", "queue/pause", "workers/x/drain", "bulk", "login", "logout"])
def test_a_form_of_another_site_does_nothing(operated: TestClient, path: str) -> None:
    log_in(operated)
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site", "origin": HERE}, {}):
        answer = operated.post(f"/dashboard/{path}", data={"key": ADMIN}, headers=headers)
        assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)


# -- when there is a dashboard -----------------------------------------------------------------------------------------


def test_without_an_admin_key_there_is_none() -> None:
    with browser(admin_keys="") as client:
        for path in ("/dashboard", "/dashboard/", "/dashboard/login", "/dashboard/static/live.js"):
            assert client.get(path).status_code == 404


def test_without_any_key_this_machine_needs_no_login_and_others_get_nothing() -> None:
    with browser(api_keys="", admin_keys="") as client:
        assert client.get("/dashboard/login").headers["location"] == "/dashboard/"
        assert client.get("/dashboard/queue").status_code == 503  # let in, but there is no Redis here
        assert client.get("/dashboard/queue", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/dashboard/queue", headers={"origin": "https://evil.example"}).status_code == 403
        assert client.post("/dashboard/queue/pause", data={"for_s": "60"}).status_code == 403


def test_an_admin_key_alone_is_asked_for() -> None:
    with browser(api_keys="") as client:
        assert client.get("/dashboard/queue").headers["location"].startswith("/dashboard/login")


def test_every_answer_forbids_the_browser_what_pages_do_not_need(operated: TestClient) -> None:
    log_in(operated)
    for path in ("/dashboard/login", "/dashboard/queue", "/dashboard/nothing", "/dashboard/static/live.js"):
        headers = operated.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cache-control"] == ("no-cache" if "static" in path else "no-store")
    static = operated.get("/dashboard/static/live.js")
    assert static.headers["etag"]
    assert (
        operated.get("/dashboard/static/live.js", headers={"if-none-match": static.headers["etag"]}).status_code == 304
    )


def test_errors_are_pages(operated: TestClient) -> None:
    log_in(operated)
    for path, status in (("/dashboard/nothing", 404), ("/dashboard/queue", 503)):
        answer = operated.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8")
        assert 'role="alert"' in answer.text
    assert operated.get("/dashboard/queue/pause").status_code == 405
