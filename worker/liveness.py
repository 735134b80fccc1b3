"""Shows that this worker lives: renews its lease, and keeps a connection that Redis sees.

Both from a thread of its own, so that an agent that blocks the event loop for a moment does not cost the worker its
jobs.

Rule 1: a worker whose subscription is lost beats at once. Presence alone never tells a living worker from a dead one.
Rule 2: a worker whose event loop has been stuck for `stuck_after_s` beats no more. Others go on with its jobs.
Rule 3: a beat tells when each agent that runs will have been silent for too long: the sweep ends its job if this worker
        does not. What was told is told again when it has passed, and not before.
Rule 4: whenever the lease may have been lost, the event loop is told, to look for runs that are not its own any more.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import structlog

from shared import scripts
from shared.connection import FAILURES, connect_blocking
from shared.sentinel import Address, look_for_primary
from shared.store import IdleDeadline, JobStore

log = structlog.get_logger(__name__)

BEATS_PER_LEASE = 5
FIRST_RETRY_S, LAST_RETRY_S = 0.02, 0.5  # before a lost subscription is taken again
WAKE_S = 0.1  # how late the thread notices that it is to stop


class LoopWatch:
    """Asks the event loop now and then to answer, and knows since when it has not."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked_at: float | None = None  # time.monotonic() of the question that has no answer yet

    def ask(self) -> None:
        """From another thread."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._asked_at = None

    def stuck_for_s(self) -> float:
        """How long the loop has owed an answer; 0 if it owes none."""
        asked_at = self._asked_at
        return 0.0 if asked_at is None else time.monotonic() - asked_at


class Presence:
    """A subscription to the worker's channel that the heartbeat's thread holds. Whoever counts it sees it end."""

    def __init__(self, client: Any, channel: str) -> None:
        self._client = client  # a blocking redis.Redis, whose pub/sub has no types
        self._channel = channel
        self._pubsub: Any = None
        self._is_held = False

    def hold(self, for_s: float, stopping: threading.Event) -> bool:
        """Waits `for_s`; returns sooner when the subscription begins or is lost. Whether it stands."""
        deadline = time.monotonic() + for_s
        try:
            if self._pubsub is None:
                self._pubsub = self._client.pubsub()
                self._pubsub.execute_command("SUBSCRIBE", self._channel)
                self._is_held = _heard(self._pubsub, b"subscribe", deadline, stopping)
                return self._is_held or self._lost("no answer")
            self._pubsub.execute_command("PING")  # a connection that died in silence is found out before Redis does
            ponged = _heard(self._pubsub, b"pong", deadline, stopping)
            while not stopping.is_set() and (left_s := deadline - time.monotonic()) > 0:
                self._pubsub.parse_response(block=False, timeout=min(WAKE_S, left_s))  # orders are for somebody else
        except FAILURES as error:
            return self._lost(str(error))
        return ponged or stopping.is_set() or self._lost("no answer")

    def _lost(self, reason: str) -> bool:
        if self._is_held:
            log.warning("presence_lost", channel=self._channel, reason=reason)
        self.end()
        return False

    def end(self) -> None:
        self._is_held = False
        if self._pubsub is not None:
            self._pubsub.close()
            self._pubsub = None


def _heard(pubsub: Any, kind: bytes, deadline: float, stopping: threading.Event) -> bool:
    """Reads until something of this kind has come. False after the deadline."""
    while (left_s := deadline - time.monotonic()) > 0 and not stopping.is_set():
        response = pubsub.parse_response(block=False, timeout=min(WAKE_S, left_s))
        if response is not None and response[0] == kind:
            return True
    return False


class Heartbeat:
    """The heartbeat of one worker.

    `idle_deadlines` is called in its thread, `on_lease_lost` in that of the event loop.
    """

    def __init__(
        self,
        store: JobStore,
        worker_id: str,
        description: Mapping[str, str | int],
        idle_deadlines: Callable[[], Iterable[IdleDeadline]],
        *,
        on_lease_lost: Callable[[], None],
    ) -> None:
        self._store = store
        self._settings = store.settings
        self._worker_id = worker_id
        self._description = description
        self._idle_deadlines = idle_deadlines
        self._told: dict[tuple[str, int], float] = {}  # time.monotonic() of the idle deadlines that Redis knows
        self._on_lease_lost = on_lease_lost
        self._loop = asyncio.get_running_loop()
        self._loop_watch = LoopWatch(self._loop)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._redis = connect_blocking(store.settings)
        self._presence = Presence(self._redis, store.keys.worker_channel(worker_id))
        self._beat = self._redis.register_script(scripts.source("beat"))
        self._primary: Address | None = None  # which Sentinel named last
        self._answer_lost = False  # whether a beat may have told that the lease was lost, and was not heard
        self._is_stuck = False

    async def start(self) -> None:
        """Takes the lease, then keeps it. Raises one of FAILURES if it cannot be taken."""
        await asyncio.to_thread(self._beat_once)
        self._thread.start()

    async def stop(self) -> None:
        """Whoever executes something still has to stop before: the lease ends soon after."""
        self._stopping.set()
        await asyncio.to_thread(self._thread.join)
        self._redis.close()

    def _live(self) -> None:
        interval_s, retry_s, is_present = self._settings.lease_s / BEATS_PER_LEASE, FIRST_RETRY_S, True
        while not self._stopping.is_set() and not self._loop.is_closed():
            try:
                self._loop_watch.ask()
                self._follow_primary()
                self._beat_unless_stuck()
                if not is_present:
                    self._stopping.wait(retry_s)
                    retry_s = min(2 * retry_s, LAST_RETRY_S)
                is_present = self._presence.hold(interval_s, self._stopping)
            except Exception:  # a thread that ends would cost the worker its lease
                log.exception("heartbeat_broken", worker=self._worker_id)
                self._presence.end()
                self._stopping.wait(LAST_RETRY_S)
                is_present = False
            if is_present:
                retry_s = FIRST_RETRY_S
            else:
                self._told.clear()  # Redis may have been restarted, and have lost what it was told last
        self._presence.end()

    def _follow_primary(self) -> None:
        """A failover need not break the connection that shows presence: the old primary may live on, or hang."""
        before, self._primary = self._primary, look_for_primary(self._redis) or self._primary
        if before not in (None, self._primary):
            log.warning("presence_moves", worker=self._worker_id, primary=self._primary)
            self._presence.end()

    def _beat_unless_stuck(self) -> None:
        if self._loop_watch.stuck_for_s() >= self._settings.stuck_after_s:
            if not self._is_stuck:
                log.error("event_loop_stuck", worker=self._worker_id, for_s=self._settings.stuck_after_s)
            self._is_stuck = True
            return
        if self._is_stuck:
            log.warning("event_loop_turns_again", worker=self._worker_id)
            self._is_stuck = False
        try:
            kept = self._beat_once()
        except FAILURES as error:
            log.warning("heartbeat_failed", worker=self._worker_id, reason=str(error))
            self._answer_lost = True
            return
        if not kept:
            log.error("lease_lost", worker=self._worker_id)
        if not kept or self._answer_lost:
            self._answer_lost = False
            self._loop.call_soon_threadsafe(self._on_lease_lost)

    def _beat_once(self) -> bool:
        """Renews the lease; False if there was none to renew."""
        now = time.monotonic()
        told = {attempt: deadline for attempt, deadline in self._told.items() if deadline > now}
        new = [idle for idle in self._idle_deadlines() if (idle.job_id, idle.attempt) not in told]
        self._told = {}  # if the answer gets lost, nobody knows
        kept = bool(self._beat(*self._store.beat_args(self._worker_id, self._description, new)))
        self._told = told | {(idle.job_id, idle.attempt): now + idle.left_s for idle in new}
        return kept
