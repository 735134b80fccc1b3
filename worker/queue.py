"""arq's worker, made to wait for a bell instead of polling, to claim with a lease, and to drain.

What stays arq's: its queue, its record of each job, the table of functions, `main`, the health check, the command line.
What changes, and why (arq 0.28, docs/decisions/0002-arq.md):
    _poll_iteration     waits for the bell, then claims many jobs by one script; arq polls, and its claim fences nothing
    run_job             not used: the claim brings arq's record along, which saves a round trip; a job that cannot be
                        delivered gets its marker here; retries, results and aborts are the sweep's and the stream's
    signal handlers     the first one drains, the second one stops now; each job still gets its marker
"""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import time
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from signal import Signals
from typing import Any

import structlog
import uvloop
from arq.cron import CronJob
from arq.jobs import DeserializationError, deserialize_job_raw
from arq.worker import Function, Worker, func

from shared.connection import FAILURES, connect, insist, passes, try_for
from shared.entries import ErrorMarker
from shared.files import FileStore
from shared.garbage import collect_less
from shared.jobs import ARQ_FUNCTION, ErrorCode, Status
from shared.keys import Keys
from shared.sentinel import follow_primary
from shared.settings import Settings
from shared.store import CLAIM_LIMIT, Claim, IdleDeadline, JobStore
from shared.sweeper import sweep_forever
from shared.tasks import end_task, stand_back
from shared.text import json_bytes, parse_json
from shared.webhooks import WebhookStore
from shared.wire import Line
from worker.agents.contract import Agent
from worker.compactor import Compactor
from worker.liveness import Heartbeat
from worker.orders import follow_orders
from worker.publisher import Publisher
from worker.run import Run, Stop
from worker.webhook_post import WebhookPoster
from worker.webhooks import WebhookDeliverer

log = structlog.get_logger(__name__)

BELL_TIMEOUT_S = 1  # how late a job is noticed if the worker that heard the bell dies before it claims
RECONCILE_S = 5.0  # how often the worker compares what it runs with what Redis says that it holds
PAUSE_S = 1.0  # how long the worker waits for a free slot or an order to stop before it looks around
HEALTH_CHECK_INTERVAL_S = 10  # arq's own health record, for `arq --check`
STOP_TIMEOUT_S = 15.0  # what the jobs get to write their markers after the drain


def health_check_key(settings: Settings) -> str:
    """What `arq --check` looks at."""
    return f"{Keys(settings.prefix).queue}:health-check"


async def run_completion(ctx: dict[str, Any]) -> None:
    """The function that arq calls for a job: executes the attempt that this worker has claimed."""
    run: Run = ctx["run"]
    await run.execute()


class QueueWorker(Worker):
    """Claims jobs, runs each in a `Run`, keeps the worker's lease, and drains when it is told to stop."""

    def __init__(self, settings: Settings, agent: Agent, **options: Any) -> None:
        """`options` are arq's own, such as `burst` and `handle_signals`."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # arq takes the current loop: let it be the fast one
            asyncio.set_event_loop(uvloop.new_event_loop())
        self.settings = settings
        self.agent = agent
        redis = connect(settings)
        self.store = JobStore(redis, settings, Line(redis))
        self.files = FileStore(self.store.redis, settings)
        self.worker_id = f"{platform.node() or 'worker'}-{os.getpid()}-{secrets.token_hex(4)}"
        self.publisher = Publisher(self.store, self.worker_id)
        self.compactor = Compactor(self.store, self.worker_id)
        self.runs: dict[str, Run] = {}
        self._reconcile_at = 0.0  # of the loop's clock
        self._left_some = True  # the last claim got all that it asked for: there may be more
        self._claiming = asyncio.Lock()  # held while a claim, or a look at what is held, is on its way
        self._changed = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._drain_task: asyncio.Task[None] | None = None
        self._services = AsyncExitStack()
        arq_options: dict[str, Any] = {
            "functions": [func(run_completion, name=ARQ_FUNCTION)],
            "redis_pool": self.store.redis,
            "queue_name": self.store.keys.queue,
            "health_check_key": health_check_key(settings),
            "health_check_interval": HEALTH_CHECK_INTERVAL_S,
            "max_jobs": settings.max_jobs,
            "poll_delay": 0,  # _poll_iteration waits for the bell instead
            "keep_result": 0,  # the stream is the result
            "retry_jobs": False,  # recovery retries, see the sweep
            "job_serializer": json_bytes,
            "job_deserializer": parse_json,
        }
        super().__init__(**(arq_options | options))

    # -- life ----------------------------------------------------------------------------------------------------------

    async def main(self) -> None:
        heartbeat = Heartbeat(
            self.store, self.worker_id, self._describe(), self._idle_deadlines, on_lease_lost=self._on_lease_lost
        )
        await try_for(self.settings.redis_patience_s, heartbeat.start)
        self._services.push_async_callback(heartbeat.stop)
        await self._services.enter_async_context(self.publisher)  # closed before the lease may end
        await self._services.enter_async_context(self.compactor)
        webhooks = WebhookStore(self.store.redis, self.settings)
        poster = WebhookPoster(timeout_s=self.settings.webhook_timeout_s)
        await self._services.enter_async_context(WebhookDeliverer(webhooks, poster, self.worker_id))
        for service in (
            follow_primary(self.store.redis),
            sweep_forever(self.store),
            follow_orders(
                self.store,
                self.worker_id,
                on_stop=self._on_stop_order,
                on_drain=self._on_drain_order,
                on_connected=self._drop_ended_runs,
            ),
        ):
            self._services.push_async_callback(end_task, asyncio.create_task(service))
        collect_less()
        log.info("worker_started", worker=self.worker_id, agent=self.agent.name, max_jobs=self.max_jobs)
        await insist(super().main)  # which asks Redis for its version, and from then on outlives its absence

    async def close(self) -> None:
        """Ends what still runs, then lets go of the agent, the lease and Redis. Idempotent."""
        if self._pool is None:
            return
        self.allow_pick_jobs = False
        await self._stop_runs()
        await self._services.aclose()
        try:
            await self.store.retire(self.worker_id)
        except FAILURES as error:
            log.warning("worker_could_not_retire", worker=self.worker_id, reason=str(error))
        await self.store.aclose()
        self._pool = None
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.agent.aclose()
        except Exception:
            log.exception("agent_did_not_close", agent=self.agent.name)
        log.info("worker_stopped", worker=self.worker_id)

    def _describe(self) -> dict[str, str | int]:
        return {
            "agent": self.agent.name,
            "max_jobs": self.max_jobs,
            "host": platform.node(),
            "pid": os.getpid(),
            "version": version("endmark"),
            "started_ms": time.time_ns() // 1_000_000,
        }

    def _idle_deadlines(self) -> list[IdleDeadline]:
        """Of the agents that run. Called in the heartbeat's thread."""
        return [
            IdleDeadline(run.claim.job_id, run.claim.attempt, left_s)
            for run in self.runs.copy().values()  # in one step: the event loop changes it meanwhile
            if (left_s := run.idle_left_s()) is not None
        ]

    # -- claiming ------------------------------------------------------------------------------------------------------

    async def _poll_iteration(self) -> None:
        """Waits until there may be something to do, and does it. arq calls this in a loop."""
        try:
            await self.heart_beat()
            if not self.allow_pick_jobs or len(self.tasks) >= self.max_jobs:
                await self._wait_for_change()
            elif self.loop.time() >= self._reconcile_at:
                await self._reconcile()
            else:
                await self._claim(wait_s=0 if self.burst or self._left_some else BELL_TIMEOUT_S)
        except FAILURES as error:
            self._reconcile_at = 0
            self._left_some = True
            if self.allow_pick_jobs:  # otherwise the drain has cut the wait for the bell
                log.warning("worker_cannot_claim", worker=self.worker_id, reason=str(error), exc_info=not passes(error))
            await self._wait_for_change()

    async def _reconcile(self) -> None:
        """Looks for what this worker holds and does not know of: the answer to a claim may have been lost."""
        async with self._claiming:  # a drain looks, too: what one has started the other must not start again
            known = {job_id: run.claim.attempt for job_id, run in self.runs.items()}
            for held in await self.store.held_by(self.worker_id, known):
                log.warning("forgotten_job", job=held.claim.job_id, attempt=held.claim.attempt, running=held.is_running)
                if held.is_running and held.nothing_shown:
                    self._start(held.claim)
                else:
                    await self.store.release(held.claim, self.worker_id)  # which ends it, if it has not ended
        self._reconcile_at = self.loop.time() + RECONCILE_S

    async def _claim(self, *, wait_s: int) -> None:
        """`wait_s`: how long to wait for the bell at most; it may have been lost."""
        most = min(self.max_jobs - len(self.tasks), CLAIM_LIMIT)
        async with self._claiming:
            claims = await self.store.claim(self.worker_id, most, wait_s=wait_s)
            for claim in claims:
                self._start(claim)
        if claims:
            await stand_back()
        self._left_some = len(claims) == most

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(PAUSE_S):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _start(self, claim: Claim) -> None:
        run = Run(claim, self.agent, self.store, self.files, self.publisher, self.worker_id)
        earlier = self.tasks.get(claim.job_id)  # this worker's own attempt, if it lost its lease meanwhile
        if earlier is not None:
            self.runs[claim.job_id].stop(Stop.ENDED_OUTSIDE)
        self.runs[claim.job_id] = run
        task = self.tasks[claim.job_id] = self.loop.create_task(self._deliver(run, earlier))
        task.add_done_callback(partial(self._on_delivered, run))

    def _on_delivered(self, run: Run, task: asyncio.Task[None]) -> None:
        claim = run.claim
        if self.tasks.get(claim.job_id) is task:  # otherwise a later attempt has taken its place
            del self.tasks[claim.job_id]
            del self.runs[claim.job_id]
        if not task.cancelled() and (error := task.exception()):
            log.error("job_not_released", job=claim.job_id, exc_info=error)
        self._changed.set()
        # What waits there is to hold nothing of the request.
        self.compactor.offer(claim._replace(request=None, session_state=None), run.packed_rows())

    async def _deliver(self, run: Run, earlier: asyncio.Task[Any] | None) -> None:
        """Calls the function that arq's record of the job names, which executes the run."""
        claim = run.claim
        if earlier is not None:
            await asyncio.wait({earlier})
        try:
            function = self._function_of(claim)
            if function is None:
                self.jobs_failed += 1
                await self._give_up(claim)
            else:
                await function.coroutine(self.ctx | {"job_id": claim.job_id, "run": run})
                self.jobs_complete += 1
        except Exception:
            self.jobs_failed += 1
            log.exception("job_task_failed", job=claim.job_id, attempt=claim.attempt)
            await insist(lambda: self.store.release(claim, self.worker_id))  # which ends it, if need be

    def _function_of(self, claim: Claim) -> Function | CronJob | None:
        """None if arq's record is gone or unreadable, or names no function of ours."""
        if claim.arq_job is None:
            return None
        try:
            name, *_ = deserialize_job_raw(claim.arq_job, deserializer=parse_json)
        except (DeserializationError, TypeError):
            return None
        return self.functions.get(name)

    async def _give_up(self, claim: Claim) -> None:
        log.error("job_undeliverable", job=claim.job_id)
        error = ErrorMarker(ErrorCode.UNDELIVERABLE, "The request could not be delivered to a worker.")
        await insist(lambda: self.store.give_up(claim, self.worker_id, error))
        await insist(lambda: self.store.release(claim, self.worker_id))

    # -- stopping ------------------------------------------------------------------------------------------------------

    def _on_stop_order(self, job_id: str) -> None:
        if job_id in self.runs:
            self.runs[job_id].stop(Stop.ENDED_OUTSIDE)
        else:
            self._reconcile_at = 0  # held without knowing; it has to be released

    def _on_drain_order(self) -> None:
        """An operator's order does once what SIGTERM does: a second one is no haste."""
        if self._drain_task is None:
            self.handle_sig(Signals.SIGTERM)

    def _on_lease_lost(self) -> None:
        """Others have taken this worker for lost and gone on with its jobs, but not with what it claimed since."""
        self._reconcile_at = 0
        self._lease_lost_task = self.loop.create_task(insist(self._drop_ended_runs))

    async def _drop_ended_runs(self) -> None:
        """Stops the runs whose jobs were ended while no order could be heard."""
        for job_id, run in list(self.runs.items()):
            record = await self.store.record(job_id)
            if record is None or (record.status, record.worker, record.attempt) != (
                Status.RUNNING,
                self.worker_id,
                run.claim.attempt,
            ):
                run.stop(Stop.ENDED_OUTSIDE)

    def handle_sig(self, signum: Signals) -> None:
        """The first signal drains; the second one does not wait for the jobs any longer."""
        if self._drain_task is not None:
            self._stop_now.set()
            return
        log.info("worker_draining", worker=self.worker_id, signal=Signals(signum).name, running=len(self.runs))
        self.allow_pick_jobs = False
        self._changed.set()
        self._drain_task = self.loop.create_task(self._drain(Signals(signum)))

    async def _drain(self, signum: Signals) -> None:
        # Redis may not answer. What is not done then others recover when this worker has ended.
        try:
            async with asyncio.timeout(1):
                await self.store.tell_draining(self.worker_id)
        except FAILURES as error:
            log.warning("drain_not_told", worker=self.worker_id, reason=str(error))
        try:
            await self.store.stop_waiting()
            async with asyncio.timeout(1):
                await self._reconcile()  # a claim that waited for the bell may have been executed, and cut
        except FAILURES as error:
            log.warning("drain_did_not_look", worker=self.worker_id, reason=str(error))
        async with self._claiming:  # what a claim on its way brings is finished, too
            deadline = self.loop.time() + self.settings.drain_timeout_s
        stop_now = asyncio.create_task(self._stop_now.wait())
        while (unfinished := self._unfinished()) and not stop_now.done() and self.loop.time() < deadline:
            await asyncio.wait(
                {stop_now, *unfinished}, timeout=deadline - self.loop.time(), return_when=asyncio.FIRST_COMPLETED
            )
        stop_now.cancel()
        await self._stop_runs()
        if self.main_task is not None:
            await end_task(self.main_task)
        if self.on_stop is not None:
            self.on_stop(signum)

    async def _stop_runs(self) -> None:
        """Ends what still runs; each job gets its error marker."""
        if self._unfinished():
            log.warning("worker_stops_running_jobs", worker=self.worker_id, running=len(self._unfinished()))
        for run in self.runs.values():
            run.stop(Stop.DRAINED)
        if unfinished := self._unfinished():
            await asyncio.wait(unfinished, timeout=STOP_TIMEOUT_S)

    def _unfinished(self) -> set[asyncio.Task[Any]]:
        return {task for task in self.tasks.values() if not task.done()}
