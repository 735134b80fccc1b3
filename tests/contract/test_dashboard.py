"""The dashboard over HTTP: sessions across replicas, deployments without keys, and what is not shown."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import httpx

from tests.deployment import Deployment, Start, script

ADMIN = "sk-admin"
PROMPT = "a question that is nobody else's business"


def browser(base_url: str) -> httpx.Client:
    """Keeps cookies and follows redirects; its forms are those of the pages."""
    return httpx.Client(base_url=base_url, headers={"origin": base_url}, follow_redirects=True, timeout=30)


@contextmanager
def logged_in(base_url: str) -> Iterator[httpx.Client]:
    with browser(base_url) as client:
        answer = client.post("/dashboard/login", data={"key": ADMIN, "next": "/dashboard/queue"})
        assert (answer.status_code, answer.url.path) == (200, "/dashboard/queue"), answer.text
        yield client


def succeed(service: Deployment, text: str, **options: str) -> str:
    with service.client(**options) as client:
        return client.chat.completions.create(model="endmark", messages=[{"role": "user", "content": text}]).id


def test_a_session_is_good_at_every_replica(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN)
    other = service.start_another_api()
    with logged_in(service.base_url) as client:
        cookie = client.cookies["endmark_session"]
    with browser(other) as client:
        answer = client.get("/dashboard/workers", headers={"cookie": f"endmark_session={cookie}"})
        assert answer.url.path == "/dashboard/workers"
        assert "scripted" in answer.text


def test_without_keys_the_own_machine_sees_and_acts(own_service: Start) -> None:
    service = own_service(api_keys="")
    job_id = succeed(service, "hello")
    with browser(service.base_url) as client:
        assert job_id in client.get("/dashboard/jobs").text
        assert "Log out" not in client.get("/dashboard/").text
        again = client.post(f"/dashboard/jobs/{job_id}/retry")
        assert again.status_code == 200
        assert "This is the new job" in again.text
        assert job_id in again.text
        assert client.post(f"/dashboard/jobs/{job_id}/delete").url.path == "/dashboard/jobs"
        assert client.get(f"/dashboard/jobs/{job_id}").status_code == 404
        assert "job.delete" in client.get("/dashboard/audit").text
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            assert client.get("/dashboard/jobs", headers=headers).status_code == 403


def test_content_that_is_not_to_be_inspected_is_on_no_page(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN, inspect_content="false")
    job_id = succeed(service, PROMPT)
    with logged_in(service.base_url) as client:
        answer = client.get(f"/dashboard/jobs/{job_id}")
        assert answer.status_code == 200
        assert "ENDMARK_INSPECT_CONTENT" in answer.text
        for path in (f"/dashboard/jobs/{job_id}", "/dashboard/jobs", "/dashboard/"):
            assert "nobody else" not in client.get(path).text
        for path in ("events", "entries"):
            answer = client.get(f"/dashboard/jobs/{job_id}/{path}")
            assert (answer.status_code, "nobody else" in answer.text) == (403, False)


def test_the_entries_are_shown_one_by_one(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN)
    with service.client() as client:
        steps = {"tools": ["search"] * 150, "say": ["done"]}  # each tool is two entries of their own
        job_id = client.chat.completions.create(model="endmark", messages=script(**steps)).id
    with logged_in(service.base_url) as client:
        seen: list[str] = []
        path = f"/dashboard/jobs/{job_id}/entries"
        while path:
            text = client.get(path).text
            seen += re.findall(r'<td class="mono">([\d-]+)</td>', text)
            further = re.search(r'rel="next" href="([^"]+)"', text)
            path = further[1] if further else ""
        assert seen == [f"1-{number}" for number in range(303)]
        assert client.get(f"/dashboard/jobs/{job_id}/entries?after=x").status_code == 400


def test_half_a_surrogate_pair_is_shown_as_its_escape(own_service: Start) -> None:
    service, half = own_service(admin_keys=ADMIN), "\ud83d"
    body = {"model": "endmark", "messages": [{"role": "user", "content": f"x{half}y"}]}
    with service.http() as http:
        answer = http.post(
            "/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        job_id = answer.json()["id"]
        assert http.get(f"/v1/jobs/{job_id}").json()["answer"]["text"] == f"x{half}y"
        assert http.get("/v1/jobs").status_code == 200
    with logged_in(service.base_url) as client:
        shown = ascii(half)[1:-1]
        assert f"x{shown}y" in client.get(f"/dashboard/jobs/{job_id}").text
        for path in ("jobs", f"jobs/{job_id}/entries", ""):
            assert client.get(f"/dashboard/{path}").status_code == 200


def test_a_filter_that_makes_no_sense_is_told_on_a_page(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN, workers=0)
    with logged_in(service.base_url) as client:
        for query in ("status=done", "since=yesterday", "after=x", "kind=chats"):
            answer = client.get(f"/dashboard/jobs?{query}")
            assert (answer.status_code, 'role="alert"' in answer.text) == (400, True)
        assert client.get("/dashboard/bulk?action=explode").status_code == 400
        assert client.post("/dashboard/queue/pause", data={"for_s": "-1"}).status_code == 400
        assert client.post("/dashboard/jobs/chatcmpl-none/explode").status_code == 404
        assert client.post("/dashboard/workers/nobody/drain").status_code == 404


def test_an_instant_beyond_every_calendar_is_a_number(own_service: Start) -> None:
    """The API takes it; what it chooses must be shown, and not only done."""
    service = own_service(admin_keys=ADMIN, workers=0)
    digits = "9" * 5000
    with logged_in(service.base_url) as client:
        for path in ("bulk?action=cancel&since=999999999999999", "jobs?until=253402300800000"):
            assert client.get(f"/dashboard/{path}").status_code == 200, path
        far = client.post("/dashboard/bulk", data={"action": "cancel", "until": "253402300800000"})
        assert far.status_code == 200
        assert client.post("/dashboard/bulk", data={"action": "cancel", "since": digits}).status_code == 400
        assert client.post("/dashboard/queue/pause", data={"for_s": digits}).status_code == 400


def test_who_sends_a_login_slowly_takes_nobodys_place(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN, workers=0)
    head = (
        f"POST /dashboard/login HTTP/1.1\r\nHost: 127.0.0.1:{service.port}\r\nOrigin: {service.base_url}\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 100\r\n\r\nke"
    )
    with ExitStack() as stack:
        for _ in range(20):
            connection = socket.create_connection(("127.0.0.1", service.port), timeout=20)
            stack.enter_context(closing(connection)).sendall(head.encode())
        with logged_in(service.base_url):
            pass


def test_what_comes_after_the_look_is_not_acted_on(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN)
    first = succeed(service, "first")
    with logged_in(service.base_url) as client:
        page = client.get("/dashboard/bulk?action=retry&status=succeeded").text
        assert "Retry 1 job<" in page
        fields = dict(re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', page))
        second = succeed(service, "second")
        done = client.post("/dashboard/bulk", data=fields).text
        assert first in done
        assert second not in done
