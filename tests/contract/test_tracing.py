"""One trace from the request through the queue to the agent and back, by real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.deployment import SCRIPTED, Deployment, Start, script, stream_until_error
from tests.processes import ROOT
from tests.waiting import wait_until

CLIENT_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01", "tracestate": "vendor=opaque"}
SECRET_WORD = "xyzzy-of-the-prompt"

# An exporter as an operator could install one: a package with an entry point, which OTEL_ variables name.
EXPORTER = """
import os
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

class FileExporter(SpanExporter):
    def export(self, spans):
        with open(os.environ["TEST_SPANS"], "a") as file:
            file.write("".join(span.to_json(indent=None) + "\\n" for span in spans))
        return SpanExportResult.SUCCESS
"""


@pytest.fixture
def spans_file(tmp_path: Path) -> Path:
    return tmp_path / "spans"


@pytest.fixture
def exporter(tmp_path: Path, spans_file: Path) -> dict[str, str]:
    """The environment of processes that write their spans to a file."""
    packages = tmp_path / "packages"
    metadata = packages / "file_exporter-1.dist-info"
    metadata.mkdir(parents=True)
    (packages / "file_exporter.py").write_text(EXPORTER)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: file-exporter\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[opentelemetry_traces_exporter]\nfile = file_exporter:FileExporter\n")
    return {
        "PYTHONPATH": f"{packages}:{ROOT}",
        "OTEL_TRACES_EXPORTER": "file",
        "OTEL_BSP_SCHEDULE_DELAY": "60000",  # so that it is the end of a process that exports
        "TEST_SPANS": str(spans_file),
    }


def spans_of(path: Path, *names: str) -> dict[str, dict[str, Any]]:
    """Spans by their name, once all of these have been exported."""

    def exported() -> dict[str, dict[str, Any]]:
        lines = path.read_text().splitlines() if path.exists() else []
        return {span["name"]: span for span in map(json.loads, lines)}

    wait_until(lambda: set(names) <= set(exported()), timeout=15, description=f"spans {names}")
    return exported()


def stop(service: Deployment) -> None:
    for process in (*service.workers, service.api):
        process.process.terminate()
        process.wait()


def test_a_request_is_one_trace_from_the_client_to_the_agent(
    own_service: Start, exporter: dict[str, str], spans_file: Path
) -> None:
    service = own_service(**exporter)
    with service.client() as client:
        stream = client.chat.completions.create(
            model="endmark",
            messages=script(say=[SECRET_WORD, "b"]),
            stream=True,
            extra_headers=TRACEPARENT,
            extra_body={"session_id": "talk"},
        )
        first = next(stream)
        list(stream)
    stop(service)
    spans = spans_of(spans_file, "POST /v1/chat/completions", "queue", "invoke_agent scripted", "relay")
    assert {span["context"]["trace_id"] for span in spans.values()} == {f"0x{CLIENT_TRACE}"}

    request = spans["POST /v1/chat/completions"]
    assert (request["parent_id"], request["kind"]) == (f"0x{CLIENT_SPAN}", "SpanKind.SERVER")
    assert request["attributes"]["http.route"] == "/v1/chat/completions"
    assert request["attributes"]["http.response.status_code"] == 200
    for child in ("queue", "invoke_agent scripted", "relay"):
        assert spans[child]["parent_id"] == request["context"]["span_id"]
    assert spans["queue"]["kind"] == "SpanKind.CONSUMER"

    assert request["end_time"] >= spans["relay"]["end_time"], "it ends with the answer"

    agent = spans["invoke_agent scripted"]
    assert (
        agent["attributes"].items()
        >= {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.request.model": "endmark",
            "gen_ai.agent.name": "scripted",
            "gen_ai.conversation.id": "api:talk",
            "gen_ai.response.id": first.id,
            "gen_ai.response.finish_reasons": ["stop"],
            "gen_ai.usage.input_tokens": 1,
            "gen_ai.usage.output_tokens": 2,
            "endmark.attempt": 1,
        }.items()
    )
    assert request["resource"]["attributes"]["service.name"] == "endmark-api"
    assert agent["resource"]["attributes"]["service.name"] == "endmark-worker"
    assert SECRET_WORD not in spans_file.read_text()


def test_a_failure_is_an_error_with_its_code(own_service: Start, exporter: dict[str, str], spans_file: Path) -> None:
    service = own_service(**exporter)
    stream_until_error(service, script(say=[SECRET_WORD], then="raise"))
    stop(service)
    spans = spans_of(spans_file, "POST /v1/chat/completions", "invoke_agent scripted", "relay")
    for name in ("invoke_agent scripted", "relay"):
        assert spans[name]["status"] == {"status_code": "ERROR"}
        assert spans[name]["attributes"]["error.type"] == "agent_error"
        assert spans[name]["events"] == []
    assert SECRET_WORD not in spans_file.read_text()


def test_a_retry_is_linked_to_the_trace_of_the_job_before(
    own_service: Start, exporter: dict[str, str], spans_file: Path
) -> None:
    service = own_service(**exporter)
    with service.client() as client, service.http() as http:
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(
                model="endmark", messages=script(say=[], then="raise"), extra_headers=TRACEPARENT
            )
        assert raised.value.code == "agent_error"
        (job,) = http.get("/v1/jobs").json()["data"]
        again = http.post(f"/v1/jobs/{job['id']}/retry").json()
    service.wait_until_idle()
    stop(service)
    retry = spans_of(spans_file, "POST /v1/jobs/{id}/retry")["POST /v1/jobs/{id}/retry"]
    (link,) = retry["links"]
    assert link["context"]["trace_id"] == f"0x{CLIENT_TRACE}"
    assert retry["context"]["trace_id"] != f"0x{CLIENT_TRACE}"
    agents = [span for span in map(json.loads, spans_file.read_text().splitlines()) if "agent" in span["name"]]
    of_retry = [span for span in agents if span["attributes"]["gen_ai.response.id"] == again["id"]]
    assert [span["parent_id"] for span in of_retry] == [retry["context"]["span_id"]]


def test_without_an_exporter_the_trace_is_carried_to_the_lines_of_the_run(own_service: Start) -> None:
    service = own_service()
    with service.client() as client:
        answer = client.chat.completions.create(model="endmark", messages=script(say=["a"]), extra_headers=TRACEPARENT)
    assert service.job_field(answer.id, "traceparent") == TRACEPARENT["traceparent"]
    assert service.job_field(answer.id, "tracestate") == TRACEPARENT["tracestate"]
    service.wait_until_idle()
    lines = [json.loads(line) for line in service.workers[0].output.splitlines()]
    (started,) = [line for line in lines if line["event"] == "job_started"]
    assert (started["trace_id"], started["job"], started["attempt"]) == (CLIENT_TRACE, answer.id, 1)


@pytest.mark.parametrize("traceparent", ["", "00-zz-zz-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 5000])
def test_a_trace_that_cannot_be_read_is_as_good_as_none(service: Deployment, traceparent: str) -> None:
    with service.client() as client:
        answer = client.chat.completions.create(
            model="endmark", messages=script(say=["a"]), extra_headers={"traceparent": traceparent}
        )
    assert answer.choices[0].message.content == "a"
    assert service.job_field(answer.id, "traceparent") == ""


def test_an_exporter_that_is_not_installed_is_named_and_nothing_else_happens(own_service: Start) -> None:
    service = own_service(OTEL_TRACES_EXPORTER="nowhere", ENDMARK_AGENT=SCRIPTED)
    with service.client() as client:
        assert client.chat.completions.create(model="endmark", messages=script(say=["a"])).choices
    assert "'nowhere'" in service.workers[0].output
    assert "endmark[otel]" in service.api.output
