"""What the processes write: one form for everybody's lines, and nothing that is not theirs to tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployment import KEY, Deployment, Start, free_port, script, stream_until_error
from tests.waiting import wait_until

ADMIN = "sk-admin-secret"
PASSWORD = "hunter22-of-redis"
PROMPT, ANSWER = "xyzzy-of-the-prompt", "plugh-of-the-answer"


def lines_of(output: str) -> list[dict[str, Any]]:
    """Every line, which has to be one JSON object."""
    return [json.loads(line) for line in output.splitlines()]


def stop(service: Deployment) -> None:
    for process in (*service.workers, service.api):
        process.process.terminate()
        process.wait()


def test_every_line_is_an_object_of_one_form_and_keeps_secrets(own_service: Start, redis_url: str) -> None:
    service = own_service(
        redis_url=redis_url.replace("://", f"://default:{PASSWORD}@"), admin_keys=ADMIN, log_level="DEBUG"
    )
    with service.client() as client, service.http() as http, service.http(key=ADMIN) as admin:
        for stream in (True, False):
            messages = script(say=[ANSWER], reasoning=[ANSWER], tools=["search"], note=PROMPT)
            answer = client.chat.completions.create(model="endmark", messages=messages, stream=stream)
            list(answer)
        form = {"message": PROMPT, "session_id": "1"}
        assert http.post("/v1/chat/completions", data=form, files={"files": ("a.txt", PROMPT)}).status_code == 200
        http.post("/v1/chat/completions", content=f'{{"messages": "{PROMPT}"')
        http.post("/v1/chat/completions", json={"model": PROMPT, "messages": [{"role": PROMPT}]})
        http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a.txt", PROMPT)})
        http.get("/v1/models", headers={"authorization": f"Bearer {KEY}-{PROMPT}"})
        admin.post("/v1/queue/resume")
    stream_until_error(service, script(say=[ANSWER], then="raise", note=PROMPT))
    stop(service)
    for process in (service.api, *service.workers):
        lines = lines_of(process.output)
        assert all({"event", "level", "logger", "timestamp"} <= set(line) for line in lines)
        for secret in (KEY, ADMIN, PASSWORD, PROMPT, ANSWER):
            assert secret not in process.output
    loggers = {line["logger"] for line in lines_of(service.api.output)}
    assert "uvicorn.error" in loggers
    assert "uvicorn.access" not in loggers


def test_every_line_of_a_run_names_the_job_and_the_attempt(own_service: Start) -> None:
    service = own_service()
    stream_until_error(service, script(say=["a"], then="raise"))
    service.wait_until_idle()
    lines = lines_of(service.workers[0].output)
    of_runs = [line for line in lines if line["logger"] == "worker.run"]
    assert {line["event"] for line in of_runs} >= {"job_started", "agent_failed", "job_ended"}
    assert {(line["job"], line["attempt"]) for line in of_runs} == {(service.job_ids()[0], 1)}


def test_an_agents_own_lines_name_its_job(own_service: Start, tmp_path: Path) -> None:
    (tmp_path / "talkative.py").write_text(
        "import logging\n"
        "async def agent(turn):\n"
        "    logging.getLogger('of.the.agent').warning('%s', 'its own words')\n"
        "    yield 'a'\n"
    )
    service = own_service(ENDMARK_AGENT="talkative:agent", PYTHONPATH=str(tmp_path))
    with service.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=script(say=["a"]))
    (line,) = [line for line in lines_of(service.workers[0].output) if line["logger"] == "of.the.agent"]
    assert (line["event"], line["job"], line["attempt"]) == ("its own words", answer.id, 1)


@pytest.mark.parametrize(
    ("command", "port_option"),
    [
        (("-m", "uvicorn", "--factory", "api.app:create_app"), "--port"),
        (("-m", "arq", "worker.settings.WorkerSettings"), ""),
    ],
    ids=["uvicorn", "arq"],
)
def test_other_peoples_command_lines_write_the_same_lines(
    own_service: Start, command: tuple[str, ...], port_option: str
) -> None:
    service = own_service(workers=0)
    port = str(free_port())
    process = service._start(*command, *((port_option, port) if port_option else ()))

    def is_up() -> bool:
        assert process.process.poll() is None, process.output
        if not port_option:
            return bool(service.live_workers())
        try:
            return httpx.get(f"http://127.0.0.1:{port}/v1/models?x={PROMPT}").status_code == 401
        except httpx.TransportError:
            return False

    wait_until(is_up, timeout=30, description="a process that serves")
    process.process.terminate()
    process.wait()
    loggers = {line["logger"] for line in lines_of(process.output)}
    assert loggers & {"uvicorn.access", "worker.queue"}
