"""Background jobs, found and acted on: what is running, what failed and why, and once more."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.deployment import KEY, Deployment, Start, noted, script
from tests.waiting import wait_until

ADMIN, OTHER = "sk-admin", "sk-acme"


@pytest.fixture
def operated(own_service: Start) -> Deployment:
    """A service with operators and a second tenant."""
    return own_service(api_keys=f"{KEY},acme:{OTHER}", admin_keys=ADMIN)


def succeed(service: Deployment, *, key: str = KEY, **options: Any) -> str:
    with service.client(api_key=key) as client:
        messages = options.pop("messages", script(say=["a", "b"]))
        job_id: str = client.chat.completions.create(model="endmark", messages=messages, **options).id
        return job_id


def fail(service: Deployment, *, key: str = KEY, **steps: Any) -> str:
    """The id of a job that failed."""
    before = set(service.job_ids())
    with service.client(api_key=key) as client, pytest.raises(openai.APIError):
        client.chat.completions.create(model="endmark", messages=script(**({"say": ["a"], "then": "raise"} | steps)))
    (job_id,) = set(service.job_ids()) - before
    return job_id


def listed(http: httpx.Client, **query: Any) -> list[str]:
    answer = http.get("/v1/jobs", params=query)
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.json()["data"]]


# -- finding -----------------------------------------------------------------------------------------------------------


def test_jobs_are_found_by_what_is_known_of_them(operated: Deployment) -> None:
    plain = succeed(operated)
    described = succeed(operated, metadata={"team": "blue", "a b": "c=d"}, extra_body={"session_id": "s1"})
    failed = fail(operated)
    acme = succeed(operated, key=OTHER)
    with operated.http(key=ADMIN) as http:
        assert listed(http) == [acme, failed, described, plain]
        assert listed(http, order="asc") == [plain, described, failed, acme]
        assert listed(http, status="failed") == [failed]
        assert listed(http, status="succeeded", tenant="acme") == [acme]
        assert listed(http, code="agent_error") == [failed]
        assert listed(http, kind="chat", model="endmark", limit="2") == [acme, failed]
        assert listed(http, kind="response") == []
        assert listed(http, session="api:s1") == [described]
        assert listed(http, **{"metadata[team]": "blue"}) == [described]
        assert listed(http, **{"metadata[team]": "blue", "metadata[a b]": "c=d"}) == [described]
        assert listed(http, **{"metadata[team]": "red"}) == []
        record = http.get(f"/v1/jobs/{failed}").json()
        assert listed(http, worker=record["worker"], status="failed") == [failed]
        accepted = record["accepted_ms"]
        assert failed in listed(http, since=accepted, until=accepted)
        assert plain not in listed(http, since=accepted)
        counts = http.get("/v1/jobs/counts").json()
        assert counts["by_status"] == {"succeeded": 3, "failed": 1}
        assert (counts["total"], counts["by_code"]) == (4, {"agent_error": 1})
        assert http.get("/v1/jobs/counts", params={"tenant": "acme"}).json()["total"] == 1


def test_pages_hold_together_while_jobs_come(operated: Deployment) -> None:
    first = [succeed(operated) for _ in range(5)]
    with operated.http(key=ADMIN) as http:
        page = http.get("/v1/jobs", params={"limit": 2}).json()
        assert page["has_more"]
        succeed(operated)
        seen = [job["id"] for job in page["data"]]
        while page["has_more"]:
            page = http.get("/v1/jobs", params={"limit": 2, "after": page["next_cursor"]}).json()
            seen += [job["id"] for job in page["data"]]
    assert seen == first[::-1]


def test_a_tenant_sees_its_own_jobs_only(operated: Deployment) -> None:
    own, theirs = succeed(operated), succeed(operated, key=OTHER)
    with operated.http() as http:
        assert listed(http) == [own]
        assert http.get("/v1/jobs/counts").json()["total"] == 1
        assert http.get("/v1/jobs", params={"tenant": "acme"}).status_code == 403
        assert http.get(f"/v1/jobs/{theirs}").status_code == 404
        assert http.delete(f"/v1/jobs/{theirs}").status_code == 404
        assert http.post(f"/v1/jobs/{theirs}/retry").status_code == 404


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"state": "failed"}, "state"),
        ({"status": "done"}, "status"),
        ({"kind": "chats"}, "kind"),
        ({"since": "yesterday"}, "since"),
        ({"until": "-1"}, "until"),
        ({"since": "9" * 16}, "since"),
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"limit": "1000000"}, "limit"),
        ({"limit": "ten"}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "x"}, "after"),
        ({"after": "AAAAAAAA" * 8}, "after"),
        ({"metadata": "x"}, "metadata"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(service: Deployment, query: dict[str, str], param: str) -> None:
    with service.http() as http:
        answer = http.get("/v1/jobs", params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_unknown_filter_names_the_known_ones(service: Deployment) -> None:
    with service.http() as http:
        message = http.get("/v1/jobs", params={"state": "failed"}).json()["error"]["message"]
    assert "status, kind, model, session, tenant, code, worker, metadata" in message


def test_a_cursor_that_was_changed_is_refused(operated: Deployment) -> None:
    for _ in range(2):
        succeed(operated)
    with operated.http() as http:
        cursor = http.get("/v1/jobs", params={"limit": 1}).json()["next_cursor"]
        changed = cursor[:-2] + ("AA" if cursor[-2:] != "AA" else "BB")
        assert http.get("/v1/jobs", params={"after": changed}).status_code == 400


# -- one job -----------------------------------------------------------------------------------------------------------


def test_a_job_tells_all_about_itself(operated: Deployment) -> None:
    messages = script(reasoning=["hm"], tools=["search"], say=["a", "b"], every_s=0.02)
    job_id = succeed(operated, messages=messages, temperature=0.5, metadata={"team": "blue"})
    with operated.http() as http:
        job = http.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"], job["tenant"], job["metadata"]) == ("succeeded", "default", {"team": "blue"})
    assert job["request"]["messages"] == messages
    assert job["request"]["params"] == {"temperature": 0.5}
    assert (job["answer"]["text"], job["answer"]["reasoning"]) == ("ab", "hm")
    assert [tool["status"] for tool in job["answer"]["tools"]] == ["started", "completed"]
    steps = [step["what"] for step in job["timeline"]]
    assert steps == ["accepted", "claimed", "first_token", "last_token", "ended"]
    instants = [step["at_ms"] for step in job["timeline"]]
    assert instants == sorted(instants)
    timings = job["timings"]
    assert timings["run_ms"] >= 20
    assert timings["wait_ms"] <= timings["first_token_ms"]
    assert timings["tool_ms"] >= 0
    (attempt,) = job["attempts"]
    assert (attempt["attempt"], attempt["outcome"]) == (1, "succeeded")


def test_a_job_that_speaks_of_half_a_character_is_shown(operated: Deployment) -> None:
    said = script(say=["\ud83d", "\ude00 and \ud83d"])
    with operated.http() as http:
        body = {"messages": said, "note": "\ud83d"}
        asked = http.post("/v1/chat/completions", content=json.dumps(body))
        assert asked.status_code == 200, asked.text
        shown = http.get(f"/v1/jobs/{asked.json()['id']}").json()
    assert (shown["answer"]["text"], shown["request"]["params"]) == ("\U0001f600 and \ud83d", {"note": "\ud83d"})


def test_operators_see_why_an_agent_failed_and_nobody_else_does(operated: Deployment) -> None:
    job_id = fail(operated)
    with operated.http(key=ADMIN) as admin, operated.http() as tenant:
        assert "RuntimeError" in admin.get(f"/v1/jobs/{job_id}").json()["traceback"]
        job = tenant.get(f"/v1/jobs/{job_id}").json()
    assert job["traceback"] is None
    assert job["error"]["code"] == "agent_error"
    assert job["attempts"][0]["outcome"] == "agent_error"


def test_what_was_said_can_be_kept_from_whoever_looks(own_service: Start) -> None:
    service = own_service(inspect_content="false", admin_keys=ADMIN)
    job_id = succeed(service)
    with service.http() as http:
        job = http.get(f"/v1/jobs/{job_id}").json()
        assert (job["request"], job["answer"]) == (None, None)
        assert http.get(f"/v1/jobs/{job_id}/events").status_code == 200, "to its own client"
    with service.http(key=ADMIN) as http:
        assert http.get(f"/v1/jobs/{job_id}/events").status_code == 403


def test_an_attempt_that_was_lost_is_told(own_service: Start, tmp_path: Path) -> None:
    service, log, gate = own_service(), tmp_path / "log", tmp_path / "gate"
    with ThreadPoolExecutor() as pool, service.client() as client:
        answer = pool.submit(
            client.chat.completions.create,
            model="endmark",
            messages=script(waits_for=str(gate), say=["a"], log=str(log)),
        )
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
        service.workers[0].process.kill()
        service.start_worker()
        wait_until(lambda: noted(log, "started") == 2, timeout=20, description="the second attempt")
        gate.touch()
        job_id = answer.result().id
    with service.http() as http:
        job = http.get(f"/v1/jobs/{job_id}").json()
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["worker_lost", "succeeded"]
    assert [step["what"] for step in job["timeline"]][:4] == ["accepted", "claimed", "lost", "claimed"]


def test_what_one_client_sent_hides_no_jobs_from_operators(operated: Deployment) -> None:
    """As deep as a body may be, and then put into what is stored."""
    deep: Any = "end"
    for _ in range(190):
        deep = [deep]
    tool = {"type": "function", "name": "f", "parameters": {"a": deep}}
    with operated.http() as http, operated.http(key=ADMIN) as admin:
        answer = http.post("/v1/responses", json={"input": "x", "background": True, "tools": [tool]})
        assert answer.status_code == 200
        job_id = answer.json()["id"]
        assert listed(admin) == [job_id]
        operated.wait_until_idle()
        assert admin.get(f"/v1/jobs/{job_id}").status_code == 200
        assert http.get(f"/v1/responses/{job_id}").json()["status"] == "completed"
        assert http.delete(f"/v1/responses/{job_id}").status_code == 200


# -- acting ------------------------------------------------------------------------------------------------------------


def test_a_retried_job_is_a_new_one_that_names_the_old(operated: Deployment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job_id = fail(operated, log=str(log))
    with operated.http() as http:
        answer = http.post(f"/v1/jobs/{job_id}/retry")
        again = answer.json()
        assert (answer.status_code, again["retry_of"]) == (201, job_id)
        assert again["id"] != job_id
        wait_until(
            lambda: http.get(f"/v1/jobs/{again['id']}").json()["status"] == "failed",
            timeout=10,
            description="the new job to fail as the old one did",
        )
        assert http.get(f"/v1/jobs/{job_id}").json()["status"] == "failed"
    assert noted(log, "started") == 2


def test_a_job_that_runs_is_neither_retried_nor_deleted(operated: Deployment) -> None:
    with operated.client() as client, operated.http() as http:
        stream = client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang"), stream=True)
        job_id = next(stream).id
        for answer in (http.post(f"/v1/jobs/{job_id}/retry"), http.delete(f"/v1/jobs/{job_id}")):
            assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
        stream.close()


def test_a_deleted_job_is_gone(operated: Deployment) -> None:
    job_id = succeed(operated)
    with operated.http() as http:
        assert http.delete(f"/v1/jobs/{job_id}").json() == {"id": job_id, "object": "job.deleted", "deleted": True}
        for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events"):
            assert http.get(path).status_code == 404
        assert listed(http) == []


def test_a_request_whose_files_are_gone_is_not_retried(operated: Deployment) -> None:
    file = {"type": "file", "file": {"filename": "a.txt", "file_data": "data:text/plain;base64,aGVsbG8="}}
    job_id = succeed(operated, messages=[{"role": "user", "content": [{"type": "text", "text": "read"}, file]}])
    with operated.http() as http:
        answer = http.post(f"/v1/jobs/{job_id}/retry")
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "files_gone")


def test_operators_act_on_all_that_a_filter_chooses(operated: Deployment) -> None:
    failed = {fail(operated), fail(operated, key=OTHER)}
    succeed(operated)
    with operated.http(key=ADMIN) as http:
        body = {"filters": {"code": "agent_error"}}
        would = http.post("/v1/jobs/retry", json=body | {"dry_run": True}).json()
        assert (would["matched"], would["done"], set(would["ids"])) == (2, 0, failed)
        assert len(operated.job_ids()) == 3
        did = http.post("/v1/jobs/retry", json=body).json()
        assert (did["matched"], did["done"]) == (2, 2)
        wait_until(lambda: len(listed(http, status="failed")) == 4, timeout=10, description="the new jobs to fail")
        assert {job["retry_of"] for job in http.get("/v1/jobs", params={"limit": 2}).json()["data"]} == failed
        actions = [entry["action"] for entry in http.get("/v1/audit").json()["data"]]
        assert actions == ["jobs.retry"]


def test_operators_cancel_all_that_runs(operated: Deployment) -> None:
    with operated.client() as client, operated.http(key=ADMIN) as http:
        streams = [
            client.chat.completions.create(
                model="endmark",
                messages=script(say=["a"], then="hang"),
                stream=True,
                extra_body={"session_id": str(number)},
            )
            for number in range(3)
        ]
        ids = {next(stream).id for stream in streams}
        did = http.post("/v1/jobs/cancel", json={"filters": {"status": "running"}}).json()
        assert (did["done"], set(did["ids"])) == (3, ids)
        for stream in streams:
            with pytest.raises(openai.APIError) as raised:
                list(stream)
            assert raised.value.code == "cancelled"


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"filters": {"state": "failed"}},
        {"filters": {}, "limit": 0},
        {"filters": {}, "dry": True},
        {"filters": 1},
        {"filters": {"model": "\ud83d"}},
        {"filters": {"metadata": {"\ud83d": "a"}}},
    ],
)
def test_a_bulk_action_that_makes_no_sense_is_refused(operated: Deployment, body: object) -> None:
    with operated.http(key=ADMIN) as http:
        assert http.post("/v1/jobs/cancel", content=json.dumps(body)).status_code == 400


def test_only_operators_act_on_many(operated: Deployment) -> None:
    with operated.http() as http:
        for action in ("cancel", "retry"):
            answer = http.post(f"/v1/jobs/{action}", json={"filters": {}})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
