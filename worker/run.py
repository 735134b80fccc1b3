"""Executes one attempt of a job: runs the agent, and ends the job whatever happens.

Rule 1: an `ok` marker is written only if the agent returned an outcome.
Rule 2: every other end of the agent is an `error` marker, unless somebody else has ended the job already.
Rule 3: an agent that is not wanted any more is cancelled, gets a moment to clean up, and says nothing from then on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from traceback import format_exception
from typing import Any, TypedDict, get_args

import structlog

from shared import metrics
from shared.connection import insist
from shared.entries import ErrorMarker, Kind, OkMarker, Tally, Usage
from shared.files import FileStore
from shared.jobs import ErrorCode, Status, session_key
from shared.packs import Row
from shared.store import Claim, Ending, JobStore
from shared.tasks import stand_back
from shared.text import json_bytes, parse_json, text_bytes
from worker.agents.contract import Agent, AgentError, FinishReason, Outcome, ToolStatus, Turn
from worker.agents.contract import Usage as AgentUsage
from worker.attachments import with_files
from worker.observe import Observation
from worker.publisher import AttemptLog, AttemptLostError, Loss, Publisher

log = structlog.get_logger(__name__)

_DELTA = Kind.DELTA  # looking a member up costs more than comparing it
WORDS_AT_ONCE = 4  # an agent that has said so many before the event loop turns lets the others go on first
CLEAN_UP_S = 1.0  # what a cancelled agent gets before its job ends without it
CANCEL_AGAIN_S = 9.0  # what it gets beyond that, until it is cancelled again: the first may have been forgotten
ABANDON_S = 1.0  # and then, until its slot and its session are given away
TRACEBACK_CHARACTERS = 16_000  # of an agent's failure, for operators: the end of it, where the error is


class Stop(Enum):
    """Why a run ends before its agent does."""

    ENDED_OUTSIDE = "ended_outside"  # cancelled, recovered or past its deadline: the job has its marker already
    IDLE = "idle"  # the agent said nothing for the idle timeout
    TIMEOUT = "timeout"  # the attempt took longer than the run timeout
    DRAINED = "drained"  # the worker stops and has waited long enough


_STOP_MARKERS = {
    Stop.IDLE: ErrorMarker(ErrorCode.TIMEOUT, "The agent fell silent and did not finish in time."),
    Stop.TIMEOUT: ErrorMarker(ErrorCode.TIMEOUT, "The agent did not finish in time."),
    Stop.DRAINED: ErrorMarker(ErrorCode.WORKER_STOPPED, "The worker was stopped before the answer was complete."),
}

# What becomes of a job whose stream Redis refuses to continue, while nobody else has ended it.
_LOSS_MARKERS = {
    Loss.EXPIRED: ErrorMarker(ErrorCode.STREAM_EXPIRED, "The stream of the answer has expired."),
    Loss.REFUSED: ErrorMarker(ErrorCode.STREAM_INCOMPLETE, "A part of the answer could not be stored."),
}


class _Durations(TypedDict):
    """Of an attempt, since its beginning."""

    ran_s: float
    first_said_s: float | None  # None: it said nothing


class StreamVoice:
    """An agent's voice: what it says becomes entries. Implements `worker.agents.contract.Voice`."""

    def __init__(self, attempt: AttemptLog, *, max_bytes: int) -> None:
        self._attempt = attempt
        self._bytes_left = max_bytes
        # time.monotonic(): an event loop may have a clock that stands while the loop does not turn.
        self.last_said_at = time.monotonic()  # or, before the first word, since when we listen
        self.first_said_at: float | None = None
        self.last_word_at: float | None = None
        self._waiting_for_redis = 0
        self.said_text = False
        self.refused: Exception | None = None  # why a word was not taken: what was said is not all any more
        self.tools_s = 0.0  # how long at least one of the agent's tools ran
        self._running_tools = 0
        self._tools_since = 0.0

    async def text(self, fragment: str) -> None:
        if fragment:
            self.said_text = True
            self._append(_DELTA, text_bytes, fragment)
            # As `_say`, without one more coroutine for each token.
            if self._attempt.must_wait:
                await self._flushed()
            elif self._attempt.said_at_once >= WORDS_AT_ONCE:
                await asyncio.sleep(0)
        elif fragment != "":
            # What no type checker lets pass, and `text_bytes` refuses; an agent may have been checked by none.
            self._append(_DELTA, text_bytes, fragment)  # type: ignore[unreachable]

    async def reasoning(self, fragment: str) -> None:
        if fragment != "":
            await self._say(Kind.REASONING, text_bytes, fragment)

    async def tool_call(self, delta: Mapping[str, Any]) -> None:
        await self._say(Kind.TOOL_CALL, _tool_call_bytes, delta)

    async def tool(
        self, name: str, status: ToolStatus, *, call_id: str | None = None, detail: str | None = None
    ) -> None:
        event = {"name": name, "status": status, "call_id": call_id, "detail": detail}
        self._append(Kind.TOOL, _tool_bytes, event)
        self._count_tool(status)
        await self._flushed()

    def _count_tool(self, status: ToolStatus) -> None:
        """Tools that run at the same time count once. An end without a beginning counts nothing."""
        if status == "started":
            if self._running_tools == 0:
                self._tools_since = time.monotonic()
            self._running_tools += 1
        elif self._running_tools > 0:
            self._running_tools -= 1
            if self._running_tools == 0:
                self.tools_s += time.monotonic() - self._tools_since

    async def _say(self, kind: Kind, encode: Callable[[Any], bytes], what: object) -> None:
        self._append(kind, encode, what)
        if self._attempt.must_wait:
            await self._flushed()
        elif self._attempt.said_at_once >= WORDS_AT_ONCE:
            await asyncio.sleep(0)

    def _append(self, kind: Kind, encode: Callable[[Any], bytes], what: object) -> None:
        """Raises what `encode` does, AgentError and AttemptLostError. An agent may swallow it: the run does not."""
        try:
            payload = encode(what)
            now = self.last_said_at = self.last_word_at = time.monotonic()
            if self.first_said_at is None:
                self.first_said_at = now
            self._bytes_left -= len(payload)
            if self._bytes_left < 0:
                raise AgentError("The answer is longer than this deployment allows.")
            self._attempt.append(kind, payload)
        except AttemptLostError:
            raise
        except Exception as error:
            self.refused = self.refused or error
            raise

    async def _flushed(self) -> None:
        """Waits for Redis; that wait is not the agent's silence."""
        self._waiting_for_redis += 1
        try:
            await self._attempt.flushed()
        finally:
            self.last_said_at = time.monotonic()
            self._waiting_for_redis -= 1

    def silent_for_s(self) -> float:
        """How long the agent has said nothing; 0 while it waits for Redis. Any thread may ask."""
        return 0 if self._waiting_for_redis else time.monotonic() - self.last_said_at


class Run:
    """One attempt on this worker, from its claim to its release."""

    def __init__(
        self,
        claim: Claim,
        agent: Agent,
        store: JobStore,
        files: FileStore,
        publisher: Publisher,
        worker_id: str,
    ) -> None:
        self.claim = claim
        self._agent = agent
        self._store = store
        self._files = files
        self._worker_id = worker_id
        self._settings = store.settings
        self._stop: Stop | None = None
        self._voice: StreamVoice | None = None
        self._agent_task: asyncio.Task[Outcome] | None = None
        self._woken = asyncio.Event()  # the agent has ended, or is to end
        self._attempt = publisher.open(claim, self._on_lost)
        self._observation = Observation(claim, agent.name)
        self._log = log.bind(job=claim.job_id, attempt=claim.attempt)

    def idle_left_s(self) -> float | None:
        """How long the agent may go on saying nothing, and then clean up; None if none runs. Any thread may ask.

        An agent that has ended is not silent: what its job waits for now is Redis, or the event loop.
        """
        if self._voice is None or self._agent_task is None:
            return None
        silent_s = 0 if self._agent_task.done() else self._voice.silent_for_s()
        return self._settings.idle_timeout_s + CLEAN_UP_S - silent_s

    def packed_rows(self) -> list[Row] | None:
        """What the stream of the job that has ended is to become; None if it has to be read for that."""
        return self._attempt.packed_rows()

    def stop(self, reason: Stop) -> None:
        """Ends the run; the first reason counts. A job that ended outside is left as it is."""
        if self._stop is None:
            self._stop = reason
            self._woken.set()
        if reason is Stop.ENDED_OUTSIDE:
            self._stop = reason
            self._attempt.lose(Loss.FENCED)

    def _on_lost(self, loss: Loss) -> None:
        self._log.warning("attempt_lost", loss=loss.value)
        if self._stop is not Stop.ENDED_OUTSIDE:
            metrics.attempts_lost.labels(loss.value).inc()
        self._stop = Stop.ENDED_OUTSIDE
        self._woken.set()

    async def execute(self) -> None:
        """Returns when the job has its marker and the agent has stopped. Cancelled: the worker is going down now."""
        with self._observation:
            await self._execute()

    async def _execute(self) -> None:
        voice = self._voice = StreamVoice(self._attempt, max_bytes=self._settings.max_answer_bytes)
        started_at = voice.last_said_at
        agent_task = asyncio.create_task(self._run_agent(voice), name=f"agent {self.claim.job_id}")
        self._agent_task = agent_task
        try:
            await stand_back()
            self._log.info("job_started", agent=self._agent.name)
            await self._until_done_or_stopped(agent_task, voice)
        except asyncio.CancelledError:
            self.stop(Stop.DRAINED)
            await self._end(agent_task, voice, started_at)
            raise
        await self._end(agent_task, voice, started_at)

    async def _run_agent(self, voice: StreamVoice) -> Outcome:
        if self._stop is not None:  # before arq delivered the job
            raise asyncio.CancelledError
        if self.claim.request is None:
            raise AgentError("The request is no longer stored.")
        request = parse_json(self.claim.request)
        tenant: str = request["tenant"]
        session: str = request["session"]
        self._observation.asked(request["model"], session)
        turn = Turn(
            job_id=self.claim.job_id,
            attempt=self.claim.attempt,
            messages=await with_files(request["messages"], self._files, tenant, self.claim.job_id),
            session_key=session or session_key(tenant, self.claim.job_id),
            owns_history=request["owns_history"],
            model=request["model"],
            tenant=tenant,
            session_state=await self._session_state(session) if session else None,
            params=request["params"],
        )
        try:
            outcome = _checked(await self._agent.run(turn, voice))
        except (SystemExit, KeyboardInterrupt) as error:
            raise RuntimeError("the agent tried to end its worker") from error
        if voice.refused is not None:
            raise voice.refused
        if session and len(outcome.session_state or b"") > self._settings.max_session_bytes:
            raise AgentError("The session has become too large to be kept. Go on with another session_id.")
        if outcome.text and not voice.said_text:
            await voice.text(outcome.text)
        return outcome

    async def _session_state(self, session: str) -> bytes | None:
        if self.claim.session_state is None:
            return await insist(lambda: self._store.session_state(session))
        return self.claim.session_state or None

    async def _until_done_or_stopped(self, agent_task: asyncio.Task[Outcome], voice: StreamVoice) -> None:
        """Waits for the agent, a stop, or a deadline, and turns a missed deadline into a stop."""
        run_deadline = time.monotonic() + self._settings.run_timeout_s
        agent_task.add_done_callback(lambda _: self._woken.set())
        while not agent_task.done() and self._stop is None:
            run_left_s = run_deadline - time.monotonic()
            idle_left_s = self._settings.idle_timeout_s - voice.silent_for_s()
            if run_left_s <= 0:
                self.stop(Stop.TIMEOUT)
            elif idle_left_s <= 0:
                self.stop(Stop.IDLE)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(run_left_s, idle_left_s)):
                        await self._woken.wait()

    async def _end(self, agent_task: asyncio.Task[Outcome], voice: StreamVoice, started_at: float) -> None:
        """Stops the agent if it still runs, writes the marker that its end deserves, and frees slot and session."""
        finished_by_itself = agent_task.done()
        if not finished_by_itself:
            agent_task.cancel()
            await asyncio.wait({agent_task}, timeout=CLEAN_UP_S)

        if self._stop is Stop.ENDED_OUTSIDE:
            ending = Ending.FENCED
            self._observation.cut_off(self._stop.value)
        elif finished_by_itself and not agent_task.cancelled() and agent_task.exception() is None:
            ending = await self._finish_ok(agent_task.result(), voice, started_at)
        elif self._stop is not None:  # what a cancelled agent returns is not a whole answer
            ending = await self._finish_error(
                _STOP_MARKERS[self._stop], voice, started_at, agent_stopped=agent_task.done()
            )
        else:
            failure = _failure_of(agent_task)
            ending = await self._finish_error(self._explain(failure), voice, started_at, failure=failure)

        if ending is Ending.FENCED and self._attempt.loss is None:
            metrics.attempts_lost.labels(Loss.FENCED.value).inc()
        loss = Loss.REFUSED if ending is Ending.INCOMPLETE else self._attempt.loss
        if loss in _LOSS_MARKERS:
            await self._end_from_outside(_LOSS_MARKERS[loss])
        agent_stopped = agent_task.done()
        if self._stop is not None:
            await self._let_go(agent_task)
        if ending is not Ending.DONE or not agent_stopped:
            await insist(lambda: self._store.release(self.claim, self._worker_id))

    async def _let_go(self, agent_task: asyncio.Task[Outcome]) -> None:
        """Waits for an unwanted agent a little longer; the slot and the session are its own until then."""
        if not agent_task.done():
            self._log.warning("agent_ignores_cancellation", agent=self._agent.name)
            await asyncio.wait({agent_task}, timeout=CANCEL_AGAIN_S)
        if not agent_task.done():
            agent_task.cancel()
            await asyncio.wait({agent_task}, timeout=ABANDON_S)
        if not agent_task.done():
            self._log.error("agent_abandoned", agent=self._agent.name)
            return
        error = None if agent_task.cancelled() else agent_task.exception()
        if error is not None and not isinstance(error, AttemptLostError):
            self._log.warning("agent_failed_while_stopping", agent=self._agent.name, exc_info=error)

    async def _finish_ok(self, outcome: Outcome, voice: StreamVoice, started_at: float) -> Ending:
        cost = outcome.usage
        if cost is not None and not (_is_count(cost.prompt_tokens) and _is_count(cost.completion_tokens)):
            self._log.warning("usage_unusable", agent=self._agent.name, usage=repr(cost))
            cost = None  # nothing of the answer hangs on it
        usage = None if cost is None else Usage(cost.prompt_tokens, cost.completion_tokens)

        finished_ms = self._instant_ms(time.monotonic(), started_at)

        def marker(tally: Tally) -> bytes:
            return OkMarker(tally.count, tally.digest, outcome.finish_reason, usage, finished_ms).payload()

        fields = self._timing(voice, started_at) | {"finish_reason": outcome.finish_reason}
        if usage is not None:
            fields["usage"] = json_bytes(usage._asdict())
        ending = await self._attempt.finish(Kind.OK, marker, Status.SUCCEEDED, fields, outcome.session_state)
        if ending is Ending.DONE:
            self._observation.ended_well(
                **self._durations(voice, started_at), finish_reason=outcome.finish_reason, usage=cost
            )
        else:
            self._observation.cut_off(ending.value)
        self._log.info("job_ended", ending=ending.value, status=Status.SUCCEEDED.value, reason=outcome.finish_reason)
        return ending

    async def _finish_error(
        self,
        error: ErrorMarker,
        voice: StreamVoice,
        started_at: float,
        *,
        agent_stopped: bool = True,
        failure: BaseException | None = None,
    ) -> Ending:
        fields = self._timing(voice, started_at)
        if failure is not None:
            story = "".join(format_exception(failure))[-TRACEBACK_CHARACTERS:]
            fields["traceback"] = story.encode("utf-8", "backslashreplace")  # it may quote lone surrogates
        ending = await self._attempt.finish(
            Kind.ERROR, lambda _: error.payload(), Status.FAILED, fields, agent_stopped=agent_stopped
        )
        if ending is Ending.DONE:
            self._observation.failed(error.code, **self._durations(voice, started_at))
        else:
            self._observation.cut_off(ending.value)
        self._log.info("job_ended", ending=ending.value, status=Status.FAILED.value, code=error.code)
        return ending

    async def _end_from_outside(self, error: ErrorMarker) -> None:
        ending = await insist(lambda: self._store.give_up(self.claim, self._worker_id, error))
        self._log.info("job_ended", ending=ending.value, status=Status.FAILED.value, code=error.code)

    def _timing(self, voice: StreamVoice, started_at: float) -> dict[str, str | bytes | int]:
        """When the first and the last entry were said, on Redis's clock, and how long tools ran."""
        fields: dict[str, str | bytes | int] = {}
        if voice.first_said_at is not None and voice.last_word_at is not None:
            fields["first_token_ms"] = self._instant_ms(voice.first_said_at, started_at)
            fields["last_token_ms"] = self._instant_ms(voice.last_word_at, started_at)
        if voice.tools_s:
            fields["tool_ms"] = round(voice.tools_s * 1000)
        return fields

    def _durations(self, voice: StreamVoice, started_at: float) -> _Durations:
        first_said_at = voice.first_said_at
        return {
            "ran_s": asyncio.get_running_loop().time() - started_at,
            "first_said_s": None if first_said_at is None else first_said_at - started_at,
        }

    def _instant_ms(self, at: float, started_at: float) -> int:
        """An instant of the loop's clock on Redis's clock."""
        return self.claim.started_ms + round((at - started_at) * 1000)

    def _explain(self, failure: BaseException | None) -> ErrorMarker:
        """What the client may know of an agent's failure. The whole story goes to the log, and to the job's record."""
        self._log.error("agent_failed", agent=self._agent.name, exc_info=failure)
        message = str(failure.public_message) if isinstance(failure, AgentError) else AgentError.public_message
        return ErrorMarker(ErrorCode.AGENT_ERROR, message)


def _failure_of(agent_task: asyncio.Task[Outcome]) -> BaseException | None:
    """Why an agent failed that nobody has stopped; a CancelledError is its own then."""
    try:
        return agent_task.exception()
    except asyncio.CancelledError as error:
        return error


def _tool_call_bytes(delta: Mapping[str, Any]) -> bytes:
    """Raises TypeError on what could not be joined to a function call, ValueError on what is no JSON."""
    function = delta.get("function", {})
    if not _is_count(delta.get("index")) or not isinstance(function, Mapping):
        raise TypeError("a tool call has an integer `index` from 0 on, and its `function` is an object")
    _check_strings(
        delta.get("id"), function.get("name"), function.get("arguments"), of="a tool call: `id`, `name` and `arguments`"
    )
    return json_bytes(delta)


def _tool_bytes(event: Mapping[str, Any]) -> bytes:
    """Raises TypeError on what is not a tool's name, status, call id and detail."""
    if event["status"] not in get_args(ToolStatus):
        raise TypeError(f"{event['status']!r} is not one of {get_args(ToolStatus)}")
    if not isinstance(event["name"], str):
        raise TypeError("a tool has a name")
    _check_strings(event["call_id"], event["detail"], of="a tool: its call id and detail")
    return json_bytes(event)


def _check_strings(*texts: Any, of: str) -> None:
    if not all(isinstance(text, str | None) for text in texts):
        raise TypeError(f"not strings of {of}")


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 63  # as far as JSON numbers are read everywhere


def _checked(outcome: Any) -> Outcome:
    """Anybody can write an agent. Raises TypeError on what would mislead a client or could not be stored."""
    if not isinstance(outcome, Outcome):
        raise TypeError(f"an agent returns an Outcome, not {type(outcome).__name__}")
    if outcome.finish_reason not in get_args(FinishReason):
        raise TypeError(f"{outcome.finish_reason!r} is not one of {get_args(FinishReason)}")
    if not isinstance(outcome.usage, AgentUsage | None):
        raise TypeError(f"usage is a Usage or None, not {type(outcome.usage).__name__}")
    if not isinstance(outcome.text, str | None):
        raise TypeError(f"text is a string or None, not {type(outcome.text).__name__}")
    if not isinstance(outcome.session_state, bytes | None):
        raise TypeError(f"session_state is bytes or None, not {type(outcome.session_state).__name__}")
    return outcome
