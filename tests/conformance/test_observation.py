"""What a worker tells about a run: spans around the agent, log lines that carry the job, and fenced attempts."""

from __future__ import annotations

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY

from shared import tracing
from shared.files import FileStore
from shared.store import JobStore
from shared.wire import Wire
from tests.jobs import a_submission, a_worker, nobody_listens, running, submitted
from worker.agents.contract import Outcome, Turn, Voice
from worker.publisher import Publisher
from worker.run import Run

pytestmark = pytest.mark.parametrize("backend", ["valkey"], indirect=True)  # what is said goes over a wire


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What has been exported, in this test alone."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", provider.get_tracer("test"))
    return exporter


class TestAgent:
    __test__ = False
    name = "tested"

    def __init__(self, store: JobStore, *, is_fenced: bool = False) -> None:
        self._store = store
        self._is_fenced = is_fenced
        self.context: dict[str, object] = {}

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        self.context = structlog.contextvars.get_contextvars()
        with tracing.tracer.start_as_current_span("chat gpt-5-mini"):  # as an instrumented SDK does
            await voice.text("a")
        if self._is_fenced:
            await self._store.cancel(turn.job_id, "Somebody else has ended it.")
            await voice.tool("search", "started")
        return Outcome()

    async def aclose(self) -> None:
        """Nothing is held."""


async def run_once(store: JobStore, agent: TestAgent) -> str:
    """A job, from its submission to its release; its id."""
    (job_id,) = await run_some(store, agent, jobs=1)
    return job_id


async def run_some(store: JobStore, agent: TestAgent, *, jobs: int) -> list[str]:
    """Jobs of one worker, one after another."""
    worker, job_ids = await a_worker(store), []
    async with Publisher(store, worker.id) as publisher:
        for _ in range(jobs):
            with tracing.tracer.start_as_current_span("request"):
                job_ids.append((await store.submit(a_submission())).job_id)
            (claim,) = await store.claim(worker.id, 1)
            await Run(claim, agent, store, FileStore(store.redis, store.settings), publisher, worker.id).execute()
    return job_ids


async def test_what_the_agent_asks_is_a_child_of_its_span(store: JobStore, spans: InMemorySpanExporter) -> None:
    job_id = await run_once(store, TestAgent(store))
    named = {span.name: span for span in spans.get_finished_spans()}
    assert set(named) == {"request", "queue", "invoke_agent tested", "chat gpt-5-mini"}
    ids = {name: span.context.span_id for name, span in named.items() if span.context is not None}
    parents = {name: span.parent.span_id for name, span in named.items() if span.parent is not None}
    assert parents == {
        "queue": ids["request"],
        "invoke_agent tested": ids["request"],
        "chat gpt-5-mini": ids["invoke_agent tested"],
    }
    queue, attributes = named["queue"], named["invoke_agent tested"].attributes or {}
    assert queue.start_time is not None
    assert queue.end_time is not None
    assert queue.start_time <= queue.end_time
    assert attributes["gen_ai.response.id"] == job_id
    assert "gen_ai.usage.input_tokens" not in attributes  # the agent did not say


async def test_the_lines_of_an_agent_carry_job_and_attempt(store: JobStore, spans: InMemorySpanExporter) -> None:
    agent = TestAgent(store)
    job_id = await run_once(store, agent)
    assert agent.context == {"job": job_id, "attempt": 1}
    assert structlog.contextvars.get_contextvars() == {}


async def test_the_first_word_is_on_its_way_before_the_worker_tells_of_the_start(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    send = Wire._send

    def noted(wire: Wire) -> None:
        if any(b"XADD" in commands for commands in wire._unsent):
            happened.append("first word written")
        send(wire)

    monkeypatch.setattr(Wire, "_send", noted)

    def note(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
        happened.append(line["event"])
        raise structlog.DropEvent

    monkeypatch.setattr("worker.run.log", structlog.wrap_logger(None, processors=[note]))
    await run_some(store, TestAgent(store), jobs=2)
    second = happened[happened.index("job_ended") + 1 :]  # the first one has opened the connection
    assert second == ["first word written", "job_started", "job_ended"]


async def test_an_attempt_that_is_fenced_is_counted_and_told(store: JobStore, spans: InMemorySpanExporter) -> None:
    def count() -> float:
        return REGISTRY.get_sample_value("endmark_attempts_lost_total", {"loss": "fenced"}) or 0

    before = count()
    await run_once(store, TestAgent(store, is_fenced=True))
    assert count() == before + 1
    (agent,) = [span for span in spans.get_finished_spans() if span.name == "invoke_agent tested"]
    assert (agent.attributes or {})["error.type"] == "ended_outside"


def ended(status: str, code: str) -> float:
    return REGISTRY.get_sample_value("endmark_jobs_ended_total", {"status": status, "code": code}) or 0


async def test_a_job_that_a_release_ends_is_counted_once(store: JobStore) -> None:
    attempt = await running(store)
    before = ended("failed", "worker_lost")
    await attempt.release()
    await attempt.release()
    assert ended("failed", "worker_lost") == before + 1


async def test_a_job_that_a_claim_gives_up_is_counted_once(store: JobStore) -> None:
    job_id = await submitted(store, is_waited_for=True)
    worker = await a_worker(store)
    await nobody_listens(store, job_id)
    before = ended("cancelled", "cancelled")
    assert await store.claim(worker.id, 1) == []
    assert await store.claim(worker.id, 1) == []
    assert ended("cancelled", "cancelled") == before + 1


async def test_a_job_that_ends_twice_is_counted_once(store: JobStore) -> None:
    job_id = await submitted(store)
    before = ended("cancelled", "cancelled")
    for _ in range(2):
        await store.cancel(job_id, "The client went away.")
    assert ended("cancelled", "cancelled") == before + 1
