"""What operators see and do: the queue, the workers, and the trail of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.deployment import KEY, Deployment, Start, noted, script
from tests.waiting import wait_until

ADMIN = "sk-admin"
OPERATORS_ROUTES = [
    ("GET", "/v1/queue"),
    ("POST", "/v1/queue/pause"),
    ("POST", "/v1/queue/resume"),
    ("GET", "/v1/workers"),
    ("POST", "/v1/workers/nobody/drain"),
    ("GET", "/v1/audit"),
]


@pytest.mark.parametrize(("method", "path"), OPERATORS_ROUTES)
def test_a_key_that_is_no_admins_operates_nothing(service: Deployment, method: str, path: str) -> None:
    with service.http() as http:
        answer = http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


def test_a_deployment_without_keys_is_operated_from_its_own_machine(own_service: Start) -> None:
    service = own_service(api_keys="")
    with service.http(key="anything") as http:
        assert http.get("/v1/queue").status_code == 200
        assert http.get("/v1/queue", headers={"host": "evil.example"}).status_code == 403


def test_operators_see_the_queue_and_the_workers(own_service: Start, tmp_path: Path) -> None:
    service = own_service(admin_keys=ADMIN, max_jobs=1)
    log = tmp_path / "log"
    with service.http(key=ADMIN) as http, service.client() as client, ThreadPoolExecutor() as pool:
        stream = client.chat.completions.create(
            model="endmark", messages=script(say=["a"], then="hang", log=str(log)), stream=True
        )
        job_id = next(stream).id
        (worker,) = http.get("/v1/workers").json()["data"]
        assert (worker["agent"], worker["max_jobs"], worker["jobs"]) == ("scripted", 1, [job_id])
        assert worker["pid"] == service.workers[0].process.pid
        assert worker["lease_ends_ms"] > worker["last_beat_ms"] >= worker["started_ms"] - 1000
        waiting = pool.submit(
            client.chat.completions.create, model="endmark", messages=script(say=["b"]), extra_body={"session_id": "2"}
        )
        wait_until(lambda: http.get("/v1/queue").json()["claimable"] == 1, timeout=10, description="a waiting job")
        queue = http.get("/v1/queue").json()
        assert (queue["running"], queue["slots"], queue["workers"], queue["paused"]) == (1, 1, 1, None)
        assert queue["oldest_wait_ms"] >= 0
        assert queue["last_minute"] == {
            "accepted": 2,
            "queued": 1,
            "running": 1,
            "succeeded": 0,
            "failed": 0,
            "cancelled": 0,
        }
        assert http.get("/v1/workers").json()["data"][0]["load"] == 1
        assert http.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
        stream.close()
        assert waiting.result().choices[0].message.content == "b"


def test_a_paused_queue_starts_nothing_until_it_is_resumed(own_service: Start, tmp_path: Path) -> None:
    service, log = own_service(admin_keys=ADMIN), tmp_path / "log"
    with service.http(key=ADMIN) as http, service.client() as client, ThreadPoolExecutor() as pool:
        paused = http.post("/v1/queue/pause", json={"for_s": 600}).json()["paused"]
        assert paused["by"].startswith("key-")
        assert 0 < paused["for_ms"] <= 600_000
        answers = [
            pool.submit(
                client.chat.completions.create,
                model="endmark",
                messages=script(say=["a"], log=str(log)),
                extra_body={"session_id": str(number)},
            )
            for number in range(3)
        ]
        wait_until(lambda: http.get("/v1/queue").json()["claimable"] == 3, timeout=10, description="waiting jobs")
        assert http.post("/v1/queue/resume", headers={"content-type": "application/json"}).json()["paused"] is None
        assert [answer.result().choices[0].message.content for answer in answers] == ["a"] * 3
    assert noted(log, "started") == 3


@pytest.mark.parametrize(
    "body",
    [
        *({"for_s": 0}, {"for_s": 1e-9}, {"for_s": -1}, {"for_s": 1e9}),
        *({"for_s": "x"}, {"for_s": "5"}, {"for_s": True}, {"for": 3}, [], "x"),
    ],
)
def test_a_pause_that_makes_no_sense_is_refused(own_service: Start, body: object) -> None:
    service = own_service(admin_keys=ADMIN, workers=0)
    with service.http(key=ADMIN) as http:
        assert http.post("/v1/queue/pause", json=body).status_code == 400
        assert http.get("/v1/queue").json()["paused"] is None


def test_a_drained_worker_finishes_what_it_runs_and_leaves(own_service: Start, tmp_path: Path) -> None:
    service, gate = own_service(admin_keys=ADMIN, workers=2), tmp_path / "gate"
    with service.http(key=ADMIN) as http, service.client() as client:
        stream = client.chat.completions.create(
            model="endmark", messages=script(say=["a"], then="hang", log=str(tmp_path / "log")), stream=True
        )
        job_id = next(stream).id
        (busy,) = [worker for worker in http.get("/v1/workers").json()["data"] if job_id in worker["jobs"]]
        assert http.post(f"/v1/workers/{busy['id']}/drain").json()["draining"] is True

        def says_so() -> bool:
            workers = http.get("/v1/workers").json()["data"]
            return any(worker["id"] == busy["id"] and worker["draining"] for worker in workers)

        wait_until(says_so, timeout=10, description="a worker that drains")
        http.post(f"/v1/jobs/{job_id}/cancel")
        stream.close()
        wait_until(lambda: len(service.live_workers()) == 1, timeout=20, description="the worker to leave")
        whole = client.chat.completions.create(model="endmark", messages=script(say=["still here"]))
        assert whole.choices[0].message.content == "still here"
    gate.touch()


def test_an_unknown_worker_cannot_be_drained(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN, workers=0)
    with service.http(key=ADMIN) as http:
        assert http.post("/v1/workers/nobody/drain").status_code == 404


def test_what_operators_do_leaves_a_trail(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN, workers=0)
    with service.http(key=ADMIN) as http:
        http.post("/v1/queue/pause", json={"for_s": 60})
        http.post("/v1/queue/resume")
        latest = http.get("/v1/audit", params={"limit": "1"}).json()
        assert [entry["action"] for entry in latest["data"]] == ["queue.resume"]
        assert latest["has_more"]
        (first,) = http.get("/v1/audit", params={"before": latest["last_id"]}).json()["data"]
        assert (first["action"], first["details"]) == ("queue.pause", {"for_s": 60.0})
        assert first["operator"].startswith("key-")
        assert ADMIN not in str(first)
        for query in ({"limit": "0"}, {"limit": "x"}, {"limit": "9999"}):
            assert http.get("/v1/audit", params=query).status_code == 400
        for before in ("x", "1", "0-0", f"{2**64}-0", f"1-{2**64}"):
            assert http.get("/v1/audit", params={"before": before}).status_code == 400


def test_operators_see_every_tenants_jobs(own_service: Start) -> None:
    service = own_service(api_keys=f"{KEY},acme:sk-acme", admin_keys=ADMIN)
    with service.client(api_key="sk-acme") as client:
        job_id = client.chat.completions.create(model="endmark", messages=script(say=["a"])).id
    with service.http(key=ADMIN) as admin, service.http() as other:
        assert admin.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"
        assert other.get(f"/v1/jobs/{job_id}").status_code == 404
