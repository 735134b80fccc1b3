"""One client's way through one job's stream, on whatever route: follow, verify, and know how it ended."""

from __future__ import annotations

import asyncio

import structlog
from starlette.requests import Request
from starlette.types import Receive, Scope

from api.departures import Departure
from api.errors import ClientGoneError, JobFailedError
from api.observe import AnswerObservation
from api.protocol import connection_of
from api.relay import INCOMPLETE, Relay
from api.services import Services
from api.submit import submit
from api.tail import Push, StreamExpiredError, StreamUnreachableError, Tail, TailError
from shared.entries import Entry, ErrorMarker, OkMarker
from shared.jobs import ErrorCode, Submission
from shared.store import Accepted

log = structlog.get_logger(__name__)

INTERRUPTED = ErrorMarker(ErrorCode.STREAM_INTERRUPTED, "The server was stopped before the answer was complete.")


async def submit_and_listen(
    services: Services, job: Submission, attachments: list[bytes], *, waits: bool, comes_back_within_s: float
) -> tuple[Accepted, Answer]:
    """Queues a job, or joins that of the same request before it; and the answer, which has to be followed.

    A new job is listened to from before its beginning, so that nobody has to read its stream. To follow the answer ends
    that: let nothing come in between that may fail or wait. Raises as `submit`.
    """
    tail = services.switchboard.follow(job.job_id)
    tail.begin(before_job=True)
    try:
        accepted = await submit(services, job, attachments)
    except BaseException:
        tail.end()
        raise
    waiter = job.job_id if waits else None
    answer = Answer(services, accepted.job_id, waiter=waiter, comes_back_within_s=comes_back_within_s)
    if accepted.is_new:
        answer.listen_by(tail)
    else:
        tail.end()
    return accepted, answer


class Answer:
    """What one client gets of a job. Made for each request; not for concurrent use."""

    __slots__ = (
        "_comes_back_within_s",
        "_is_client_gone",
        "_last",
        "_push",
        "_relay",
        "_services",
        "_tail",
        "_waiter",
        "has_been_told",
        "job_id",
        "settings",
    )

    def __init__(
        self, services: Services, job_id: str, *, waiter: str | None = None, comes_back_within_s: float = 0.0
    ) -> None:
        """`waiter`: the id of the submission by which the client is one of those that the job runs for: without the
        last of them it is cancelled. None: the job runs on without it.

        `comes_back_within_s`: when a client that goes away with nothing in its hands will have sent its request again;
        0 if it will not.
        """
        self.job_id = job_id
        self.settings = services.settings
        self.has_been_told = False  # whether anything of the answer was sent
        self._services = services
        self._waiter = waiter
        self._comes_back_within_s = comes_back_within_s
        self._relay = Relay()
        self._is_client_gone = False
        self._push: Push | None = None
        self._last: list[Entry] = []  # that came together with the marker
        self._tail: Tail | None = None  # that listens already

    def listen_by(self, tail: Tail) -> None:
        """`follow` goes on with this tail, which has begun, and ends it."""
        self._tail = tail

    async def entries(self, tail: Tail, timeout_s: float, push: Push | None = None) -> list[Entry]:
        """The next entries to pass on, the last ones with `ending`; none after the timeout. Raises ClientGoneError.

        With `push`, those that it would have to wait for are given to it instead, see `Tail.next`; but for the last
        ones, if they come together with the ending.
        """
        self._push = push
        try:
            entries = await tail.next(timeout_s, self._push_accepted if push is not None else None)
        except TailError as error:
            self._relay.ending = _explain(error)
            log.warning("relay_failed", job=self.job_id, code=self._relay.ending.code, reason=repr(error))
            return []
        if self._is_client_gone:
            raise ClientGoneError
        return self._relay.accept(entries) if entries else self._last

    def _push_accepted(self, entries: list[Entry]) -> bool:
        accepted = self._relay.accept(entries)
        if self._relay.ending is not None:
            self._last = accepted
            return False
        return not accepted or self._push(accepted)  # type: ignore[misc]  # it is not None

    async def sleep(self, tail: Tail, seconds: float) -> None:
        """Raises ClientGoneError as soon as the client is gone."""
        await tail.sleep(seconds)
        if self._is_client_gone:
            raise ClientGoneError

    @property
    def ending(self) -> OkMarker | ErrorMarker | None:
        return self._relay.ending

    @property
    def is_the_jobs(self) -> bool:
        """Whether the job itself has ended so; otherwise its stream cannot be followed any further."""
        return self._relay.is_the_jobs

    def has_ended(self) -> bool:
        return self._relay.ending is not None

    def follow(self, scope: Scope, receive: Receive) -> Following:
        """Begins to follow the job's stream, and to watch the client; ends with the block."""
        tail, self._tail = self._tail, None
        if tail is None:
            tail = self._services.switchboard.follow(self.job_id)
            tail.begin()
        try:
            return Following(self, tail, scope, receive)
        except BaseException:
            tail.end()
            raise

    def client_left(self, tail: Tail) -> None:
        """Whoever waits for entries is told at once."""
        self._is_client_gone = True
        tail.interrupt()

    async def leave_for(self, error: BaseException | None) -> None:
        """This client waits no longer, if that is what the error says."""
        if isinstance(error, asyncio.CancelledError):
            await asyncio.shield(self._leave("The server was stopped while the client waited."))
        elif isinstance(error, (ClientGoneError, OSError)):
            within_s = 0.0 if self.has_been_told else self._comes_back_within_s
            await self._leave("The client went away.", comes_back_within_s=within_s)

    async def _leave(self, why: str, *, comes_back_within_s: float = 0.0) -> None:
        if self._waiter is not None and self.ending is None:
            departure = Departure(self.job_id, self._waiter, why)
            await self._services.departures.tell(departure, comes_back_within_s=comes_back_within_s)

    async def whole(self, request: Request) -> tuple[list[Entry], OkMarker]:
        """All of it. Raises JobFailedError for every ending but a verified `ok`, or ClientGoneError."""
        try:
            entries, ending = await self.to_its_end(request)
        except asyncio.CancelledError as stopped:  # the server stops, and has waited long enough
            raise JobFailedError(INTERRUPTED) from stopped
        if not isinstance(ending, OkMarker):
            raise JobFailedError(ending)
        return entries, ending

    async def to_its_end(self, request: Request) -> tuple[list[Entry], OkMarker | ErrorMarker]:
        """What was said, and how it ended, whatever that is. Raises ClientGoneError."""
        entries: list[Entry] = []
        async with self.follow(request.scope, request.receive) as tail:
            while not self.has_ended():
                entries += await self.entries(tail, self.settings.ping_interval_s)
        return entries, self.ending or INCOMPLETE


class Following:
    """The job's tail, watched over: if the client goes away before the ending, it waits for the job no longer.

    An async context manager that has begun when it is made, so that another function may end it, in the same task. Not
    a generator: an open stream would hold it, too.
    """

    __slots__ = ("_answer", "_connection", "_observation", "_watch", "tail")

    def __init__(self, answer: Answer, tail: Tail, scope: Scope, receive: Receive) -> None:
        self.tail = tail
        self._answer = answer
        self._observation = AnswerObservation(answer.job_id)
        self._connection = connection_of(scope)
        self._watch: asyncio.Task[None] | None = None
        if self._connection is not None:
            self._connection.watch(self._client_left)
        else:  # ASGI tells it to whoever waits for it
            self._watch = asyncio.create_task(self._wait_for_disconnect(receive))

    async def __aenter__(self) -> Tail:
        return self.tail

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            await self._answer.leave_for(error)
        finally:
            if self._connection is not None:
                self._connection.watch_no_longer(self._client_left)
            if self._watch is not None:
                self._watch.cancel()
            self.tail.end()
            self._observation.end(self._answer.ending, error)

    def _client_left(self) -> None:
        self._answer.client_left(self.tail)

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_left()


def _explain(error: TailError) -> ErrorMarker:
    """What the client may know of why its stream cannot be followed."""
    if isinstance(error, StreamExpiredError):
        return ErrorMarker(ErrorCode.STREAM_EXPIRED, "The stream of the answer has expired.")
    if isinstance(error, StreamUnreachableError):
        return ErrorMarker(ErrorCode.STREAM_UNREACHABLE, "The stream of the answer cannot be reached.")
    return INCOMPLETE
