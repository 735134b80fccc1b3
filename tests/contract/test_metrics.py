"""What Prometheus is told of a running service."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

from shared.jobs import Status
from tests.deployment import KEY, Deployment, Start, free_port, script, stream_until_error, text_of
from tests.prometheus import Scraped, scraped
from tests.waiting import wait_until

ADMIN = "sk-admin-key"


def api_says(service: Deployment) -> Scraped:
    return scraped(f"{service.base_url}/metrics", ADMIN)


def one_folder(tmp_path: Path) -> dict[str, str]:
    """The setting with which all processes answer as one."""
    folder = tmp_path / "multiproc"
    folder.mkdir()
    return {"PROMETHEUS_MULTIPROC_DIR": str(folder)}


def test_only_operators_may_scrape(service: Deployment) -> None:
    with service.http() as http:
        assert http.get("/metrics").status_code == 403
    assert httpx.get(f"{service.base_url}/metrics").status_code == 401


def test_a_deployment_without_keys_is_scraped_from_its_own_machine(own_service: Start) -> None:
    service = own_service(api_keys="", workers=0)
    assert scraped(f"{service.base_url}/metrics").value("endmark_redis_up") == 1


def test_a_job_is_counted_by_whoever_saw_it(own_service: Start) -> None:
    port = free_port()
    service = own_service(admin_keys=ADMIN, metrics_port=port)
    with service.client() as client:
        chunks = list(client.chat.completions.create(model="endmark", messages=script(say=["ab", "cd"]), stream=True))
        assert text_of(chunks) == "abcd"
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="endmark", messages=script(say=["x"], then="raise"))
    service.wait_until_idle()

    api, worker = api_says(service), scraped(f"http://127.0.0.1:{port}/metrics")
    assert api.value("endmark_submissions_total", result="accepted") == 2
    assert api.value("endmark_answers_total", code="none") == 1
    assert api.value("endmark_answers_total", code="agent_error") == 1
    assert api.value("endmark_relay_lag_seconds_count") == 1
    assert api.value("endmark_open_streams") == 0
    assert api.value("endmark_redis_scripts_total", script="submit") == 2
    assert api.value("endmark_jobs_ended_total") == 0

    with service.http() as http:  # who comes later has to read what was said
        assert http.get(f"/v1/chat/completions/{chunks[0].id}/stream").status_code == 200
    assert api_says(service).value("endmark_catch_ups_total") > api.value("endmark_catch_ups_total")

    assert worker.value("endmark_jobs_ended_total", status="succeeded", code="none") == 1
    assert worker.value("endmark_jobs_ended_total", status="failed", code="agent_error") == 1
    assert worker.value("endmark_jobs_ended_total") == 2
    assert worker.value("endmark_attempts_total") == 2
    assert worker.value("endmark_said_bytes_total") == 5
    assert 2 <= worker.value("endmark_entries_total") <= 3
    assert worker.value("endmark_flushes_total") >= 2
    assert worker.value("endmark_tokens_total", direction="output") == 2
    for histogram in ("job_wait", "job_first_token", "job_duration", "attempt_duration"):
        assert worker.value(f"endmark_{histogram}_seconds_count") == 2
        assert 0 <= worker.value(f"endmark_{histogram}_seconds_sum") < 60
    assert worker.value("endmark_job_duration_seconds_sum") >= worker.value("endmark_attempt_duration_seconds_sum")
    assert worker.value("endmark_build_info") == api.value("endmark_build_info") == 1


def test_the_api_tells_the_state_of_the_queue(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN, max_jobs=1)
    with service.http(key=ADMIN) as http, service.client() as client:
        stream = client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang"), stream=True)
        job_id = next(stream).id
        http.post("/v1/queue/pause", json={"for_s": 60})
        api = api_says(service)
        assert api.value("endmark_open_streams") == 1
        assert api.value("endmark_queue_running_jobs") == api.value("endmark_queue_paused") == 1
        assert api.value("endmark_workers") == api.value("endmark_worker_slots") == 1
        assert api.value("endmark_queue_claimable_jobs") == api.value("endmark_queue_oldest_wait_seconds") == 0
        assert http.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
        stream.close()
        service.wait_for_status(job_id, Status.CANCELLED)
        assert api_says(service).value("endmark_jobs_ended_total", status="cancelled", code="cancelled") == 1
        wait_until(lambda: api_says(service).value("endmark_open_streams") == 0, timeout=10, description="no stream")


def test_requests_are_counted_by_the_template_of_their_route(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN, workers=0)
    with service.http(key=ADMIN) as http:
        http.get("/v1/jobs/job-of-a-tenant")
        http.get("/of-a-tenant")
        http.put("/v1/models")
        http.get("/v1/models", headers={"authorization": "Bearer wrong"})
        http.post("/v1/chat/completions", json={"model": 1})
    api = api_says(service)

    def count(route: str, status: int, method: str = "GET") -> float:
        return api.value("endmark_http_requests_total", method=method, route=route, status=str(status))

    assert count("/v1/jobs/{id}", 404) == 1
    assert count("unmatched", 404) == 1
    assert count("/v1/models", 405, "PUT") == 1
    assert count("/v1/models", 401) == 1
    assert count("/v1/chat/completions", 400, "POST") == 1
    assert not [route for route in api.label_values("endmark_http_requests_total", "route") if "tenant" in route]


def test_without_redis_the_rest_is_told(own_service: Start) -> None:
    service = own_service(admin_keys=ADMIN, workers=0, redis_url="redis://127.0.0.1:1/0")
    api = api_says(service)
    assert api.value("endmark_redis_up") == 0
    assert api.label_values("endmark_build_info", "version")
    assert api.label_values("endmark_workers", "x") == set()


def test_what_sweeps_did_is_counted(own_service: Start, tmp_path: Path) -> None:
    service = own_service(admin_keys=ADMIN, workers=2, **one_folder(tmp_path))
    _, error = stream_until_error(service, script(say=[], then="die"))
    assert error.code == "worker_lost"
    api = api_says(service)
    assert api.value("endmark_swept_jobs_total", what="retried") == 1
    assert api.value("endmark_swept_jobs_total", what="worker_lost") == 1
    assert api.value("endmark_jobs_ended_total", status="failed", code="worker_lost") == 1
    assert api.value("endmark_jobs_ended_total") == 1
    assert api.value("endmark_attempts_total") == 2


def test_processes_that_share_a_folder_answer_as_one(own_service: Start, tmp_path: Path) -> None:
    service = own_service(admin_keys=ADMIN, **one_folder(tmp_path))
    another = f"{service.start_another_api()}/metrics"
    with service.client() as client:
        assert client.chat.completions.create(model="endmark", messages=script(say=["a"])).choices
        service.wait_until_idle()
        assert scraped(another, ADMIN).value("endmark_submissions_total", result="accepted") == 1
        assert scraped(another, ADMIN).value("endmark_jobs_ended_total", status="succeeded") == 1

        stream = client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang"), stream=True)
        next(stream)
        assert scraped(another, ADMIN).value("endmark_open_streams") == 1
        service.api.process.kill()
        service.api.wait()
        assert scraped(another, ADMIN).value("endmark_open_streams") == 0
        stream.close()


def test_a_worker_asks_for_another_port_if_its_own_is_taken(own_service: Start) -> None:
    port = free_port()
    service = own_service(metrics_port=port)
    second = service._start("-m", "cli.main", "worker")
    assert second.wait() == 1
    assert f"port {port} on 127.0.0.1 is taken" in second.output
    assert "ENDMARK_METRICS_PORT" in second.output


def test_no_metric_says_what_a_client_chose(own_service: Start, tmp_path: Path) -> None:
    service = own_service(api_keys=f"{KEY},acme:sk-acme-key", admin_keys=ADMIN, **one_folder(tmp_path))
    chosen = "chosen-by-the-client"
    with service.client(api_key="sk-acme-key") as client:
        client.chat.completions.create(
            model="endmark",
            messages=[{"role": "user", "content": chosen}],
            user=chosen,
            metadata={chosen: chosen},
            extra_body={"session_id": chosen},
            extra_headers={"x-request-id": chosen},
        )
    text = httpx.get(f"{service.base_url}/metrics", headers={"authorization": f"Bearer {ADMIN}"}).text
    assert chosen not in text
    assert "acme" not in text
