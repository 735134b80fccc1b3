"""The processes as step functions. One step sends one Redis command, in the order in which the product sends them.

A process that is never chosen again has crashed or is frozen; one that is chosen late is a zombie. So each step may be
the last one of its process. Beside that, a connection may be cut: what was sent and not executed may be executed later,
at any time or never (a straggler), and its sender goes on without an answer.

What a worker does is that of worker/run.py, worker/publisher.py and worker/queue.py. Not modelled: arq's own reads, the
bell, pub/sub (an order is a look at the record, at any time), presence (a lease may end at any time), attachments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from shared.jobs import Status
from tests.model.commands import Commands
from tests.model.server import Command, ModelServer, View


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything there may be."""

    sessions: tuple[str, ...]  # of the jobs, in the order in which they are submitted
    batches: tuple[int, ...] = (1,)  # how many entries an attempt says, flush by flush; the last brings the marker
    max_attempts: int = 2  # of each job
    submits: int = 1  # of each job: how often its API process may send it
    cancels: tuple[int, ...] = ()  # jobs whose clients may go away
    cuts: tuple[int, ...] = (0, 0)  # of each worker's connection
    refusals: tuple[int, ...] = (0, 0)  # of each worker's appends, because Redis is out of memory
    endings: tuple[str, ...] = ("ok",)  # of an agent: "ok", "failure", "stubborn" (it does not stop when it should)
    retires: bool = False  # whether a worker may leave in good order
    tells_silence: bool = False  # whether beats tell the idle deadline of what runs


class Run(NamedTuple):
    """An attempt in the hands of its worker."""

    attempt: int
    phase: str  # "begin" in a session whose state has to be asked for, then "flush", "ask", perhaps "end" and "release"
    batch: int = 0
    landed: int = 0  # entries that Redis is known to have
    sent: int = 0  # commands of the flush that have been executed
    asked: bool = False  # what landed was asked for just before this flush
    refused: bool = False  # an entry of this flush: it is there already, came too late, or there is no memory
    ending: str = "ok"  # how the agent ends
    state: str | None = None  # the session state as it began
    next_attempt: int = 0  # that the same worker has claimed meanwhile
    next_state: str | None = None  # which that claim has brought


class Worker(NamedTuple):
    runs: tuple[Run | None, ...]  # by job
    cuts: int
    refusals: int
    stragglers: tuple[Command, ...] = ()  # in the order in which they were sent
    must_reconcile: bool = False  # the answer to a claim was lost
    held: tuple[str, ...] = ()  # jobs that it still has to look at
    has_left: bool = False


class Client(NamedTuple):
    """The API process of one job."""

    submits: int  # left
    cancels: int  # left


class State(NamedTuple):
    redis: int
    clients: tuple[Client, ...]
    workers: tuple[Worker, ...]


class Processes:
    """All steps of all processes."""

    def __init__(self, size: Size, server: ModelServer) -> None:
        self.size = size
        self._server = server
        self._commands = Commands(server.shas, size.max_attempts)
        self._jobs = tuple(f"j{number}" for number in range(1, len(size.sessions) + 1))
        self._workers = tuple(f"w{number}" for number in range(1, len(size.cuts) + 1))
        self._said_until = tuple(sum(size.batches[: number + 1]) for number in range(len(size.batches)))

    def start(self) -> State:
        nothing = (None,) * len(self._jobs)
        workers = tuple(
            Worker(nothing, cuts, refusals) for cuts, refusals in zip(self.size.cuts, self.size.refusals, strict=True)
        )
        clients = tuple(Client(self.size.submits, int(job in self.size.cancels)) for job in range(len(self._jobs)))
        return State(self._server.empty, clients, workers)

    def settled(self, redis: int) -> int:
        """When everything has passed that is known now, and the sweep has seen it."""
        return self._sent(redis, self._commands.settle())[0]

    def prefetch(self, redis: int) -> None:
        """What somebody does in almost every state."""
        commands, view = self._commands, self._view(redis)
        often = [commands.sweep(), commands.settle()]
        often += [commands.pass_lease(worker) for worker, has_passed in view.leases.items() if not has_passed]
        often += [commands.pass_deadline(job) for job, has_passed in view.deadlines.items() if not has_passed]
        if not self.size.tells_silence:
            often += [commands.beat(name, None) for name in self._workers]
        often += [commands.claim(name, len(self._jobs) + 1) for name in self._workers]
        self._server.prefetch(redis, often)

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """Every step that a process may take: who does what, and what is then."""
        yield from self._steps_of_clients(state)
        yield from self._steps_of_time(state)
        for number, worker in enumerate(state.workers):
            name = self._workers[number]
            for what, redis, then in self._steps_of_worker(name, worker, state.redis):
                workers = (*state.workers[:number], then, *state.workers[number + 1 :])
                yield f"{name} {what}", State(redis, state.clients, workers)

    # -- API, sweep, time

    def _steps_of_clients(self, state: State) -> Iterator[tuple[str, State]]:
        for number, client in enumerate(state.clients):
            job, is_new = self._jobs[number], client.submits == self.size.submits
            follows_another = number > 0 and state.clients[number - 1].submits == self.size.submits
            if client.submits and not (is_new and follows_another):
                command = self._commands.submit(job, self.size.sessions[number])
                then = client._replace(submits=client.submits - 1)
                yield f"client submits {job}", self._client_did(state, number, then, command)
            if client.cancels and not is_new:
                command = self._commands.cancel(job)
                then = client._replace(cancels=client.cancels - 1)
                yield f"client cancels {job}", self._client_did(state, number, then, command)

    def _client_did(self, state: State, number: int, then: Client, command: Command) -> State:
        redis, _ = self._sent(state.redis, command)
        clients = (*state.clients[:number], then, *state.clients[number + 1 :])
        return state._replace(redis=redis, clients=clients)

    def _steps_of_time(self, state: State) -> Iterator[tuple[str, State]]:
        command = self._commands.sweep()
        yield "sweep", state._replace(redis=self._sent(state.redis, command)[0])
        view = self._view(state.redis)
        for worker, has_passed in view.leases.items():
            if not has_passed:
                command = self._commands.pass_lease(worker)
                yield f"the lease of {worker} passes", state._replace(redis=self._sent(state.redis, command)[0])
        for job, has_passed in view.deadlines.items():
            if not has_passed:
                command = self._commands.pass_deadline(job)
                yield f"the deadline of {job} passes", state._replace(redis=self._sent(state.redis, command)[0])

    # -- a worker

    def _steps_of_worker(self, name: str, worker: Worker, redis: int) -> Iterator[tuple[str, int, Worker]]:
        if worker.stragglers:
            command, *rest = worker.stragglers
            then, _ = self._sent(redis, command)
            yield f"straggler: {command.name}", then, worker._replace(stragglers=tuple(rest))
        if worker.has_left:
            return
        yield from self._beats(name, worker, redis)
        for number, run in enumerate(worker.runs):
            if run is None:
                continue
            for what, then, changed in self._steps_of_run(name, number, run, worker, redis):
                yield f"{what} {self._jobs[number]}.{run.attempt}", then, changed
        yield from self._looks_for_jobs(name, worker, redis)

    def _beats(self, name: str, worker: Worker, redis: int) -> Iterator[tuple[str, int, Worker]]:
        silent = None
        if self.size.tells_silence:
            running = ((job, run) for job, run in zip(self._jobs, worker.runs, strict=True) if run is not None)
            silent = next(((job, run.attempt) for job, run in running), None)
        command = self._commands.beat(name, silent)
        yield "beats", self._sent(redis, command)[0], worker  # what it hears makes it look, see _looks

    def _looks_for_jobs(self, name: str, worker: Worker, redis: int) -> Iterator[tuple[str, int, Worker]]:
        """Claims, reconciles, leaves."""
        if worker.held:
            yield self._looks_at_held(name, worker, redis)
            return
        is_idle = all(run is None for run in worker.runs)
        view = self._view(redis)
        known = {job for job, run in zip(self._jobs, worker.runs, strict=True) if run is not None}
        if worker.must_reconcile or set(view.held_by(name)) - known:
            yield "reconciles", redis, worker._replace(held=tuple(view.held_by(name)), must_reconcile=False)
        if not worker.must_reconcile:
            command = self._commands.claim(name, len(self._jobs) + 1)  # a slot is free in any case
            then, claims = self._sent(redis, command)
            started = worker
            for job, attempt, *rest in claims:
                state = rest[6].decode() if len(rest) > 6 else None
                started = self._starts(name, started, self._jobs.index(job.decode()), int(attempt), state)
            yield "claims", then, started
            if worker.cuts and not worker.stragglers:
                cut = worker._replace(cuts=worker.cuts - 1, stragglers=(command,), must_reconcile=True)
                yield "is cut off while it claims", redis, cut
        if self.size.retires and is_idle:
            command = self._commands.retire(name)
            yield "leaves", self._sent(redis, command)[0], worker._replace(has_left=True)

    def _looks_at_held(self, name: str, worker: Worker, redis: int) -> tuple[str, int, Worker]:
        job, *rest = worker.held
        number = self._jobs.index(job)
        status, holder, attempt = self._view(redis).record(job)
        worker = worker._replace(held=tuple(rest))
        known = worker.runs[number]
        if holder == name and (known is None or known.attempt != attempt):
            worker = self._starts(name, worker, number, attempt, is_running=status is Status.RUNNING)
        return f"looks at {job}, which it holds", redis, worker

    def _starts(
        self,
        name: str,
        worker: Worker,
        number: int,
        attempt: int,
        state: str | None = None,
        *,
        is_running: bool = True,
    ) -> Worker:
        """An earlier attempt of the job on this worker is stopped and released first.

        `state`: the session's, if the claim has brought it.
        """
        earlier = worker.runs[number]
        if earlier is None:
            begun = self._begun(number, attempt, state) if is_running else Run(attempt, "release")
            return _with_run(worker, number, begun)
        if not is_running:
            return worker
        on_their_way = self._pipeline(name, number, earlier)[earlier.sent :] if earlier.sent else []
        return _stopped(worker, number, earlier._replace(next_attempt=attempt, next_state=state), on_their_way)

    # -- a run

    def _steps_of_run(
        self, name: str, number: int, run: Run, worker: Worker, redis: int
    ) -> Iterator[tuple[str, int, Worker]]:
        job = self._jobs[number]
        match run.phase:
            case "begin":
                yield self._begins(number, run, worker, redis)
            case "flush":
                yield from self._flushes(name, number, run, worker, redis)
            case "ask":
                yield self._asks(number, run, worker, redis)
            case "end":
                command = self._commands.incomplete(name, job, run.attempt)
                then, _ = self._sent(redis, command)
                yield "ends", then, _with_run(worker, number, run._replace(phase="release"))
            case "release":
                yield from self._releases(name, number, run, worker, redis)
        if run.phase in ("begin", "flush", "ask") and not (run.sent and worker.stragglers):
            yield from self._looks(name, number, run, worker, redis)

    def _begins(self, number: int, run: Run, worker: Worker, redis: int) -> tuple[str, int, Worker]:
        session = self.size.sessions[number]
        begun = run._replace(phase="flush", state=self._view(redis).session_state(session))
        return "reads the session for", redis, _with_run(worker, number, begun)

    def _looks(self, name: str, number: int, run: Run, worker: Worker, redis: int) -> Iterator[tuple[str, int, Worker]]:
        """An order, a beat without a lease or a new connection makes it look at the record, and stop what has ended."""
        if self._view(redis).record(self._jobs[number]) != (Status.RUNNING, name, run.attempt):
            yield "stops", redis, _stopped(worker, number, run, self._pipeline(name, number, run)[run.sent :])

    def _pipeline(self, name: str, number: int, run: Run) -> list[Command]:
        """What this flush sends."""
        job, until = self._jobs[number], self._said_until[run.batch]
        flush = [
            self._commands.entry(name, job, run.attempt, sequence) for sequence in range(run.landed + 1, until + 1)
        ]
        if run.batch == len(self.size.batches) - 1:
            if run.ending == "ok":
                flush.append(self._commands.ok(name, job, run.attempt, until, run.state))
            else:
                stopped = run.ending == "failure"
                flush.append(self._commands.failure(name, job, run.attempt, until, agent_stopped=stopped))
        return flush

    def _flushes(
        self, name: str, number: int, run: Run, worker: Worker, redis: int
    ) -> Iterator[tuple[str, int, Worker]]:
        is_last = run.batch == len(self.size.batches) - 1
        endings = self.size.endings if is_last and not run.sent and not run.asked else (run.ending,)
        for ending in endings:
            flush = self._pipeline(name, number, run._replace(ending=ending))
            yield from self._flush_step(number, run._replace(ending=ending), worker, redis, flush)

    def _flush_step(
        self, number: int, run: Run, worker: Worker, redis: int, flush: list[Command]
    ) -> Iterator[tuple[str, int, Worker]]:
        command = flush[run.sent]
        then, answer = self._sent(redis, command)
        refused = run.refused or (command.name == "append" and isinstance(answer, ResponseError))
        went = run._replace(sent=run.sent + 1, refused=refused)
        if went.sent < len(flush):
            yield f"sends {command.name} of", then, _with_run(worker, number, went)
        else:
            ending = None if command.name == "append" else answer
            after = self._after_flush(worker, number, went, ending)
            yield f"sends {command.name} of", then, after
        if command.name == "append" and worker.refusals:
            poorer = worker._replace(refusals=worker.refusals - 1)
            full = run._replace(sent=run.sent + 1, refused=True)
            if full.sent < len(flush):
                yield "is refused an append of", redis, _with_run(poorer, number, full)
            else:
                yield "is refused an append of", redis, self._after_flush(poorer, number, full, None)
        if worker.cuts and not worker.stragglers:
            asking = run._replace(phase="ask", sent=0, refused=False)
            cut = worker._replace(cuts=worker.cuts - 1, stragglers=tuple(flush[run.sent :]))
            yield "is cut off in the flush of", redis, _with_run(cut, number, asking)

    def _after_flush(self, worker: Worker, number: int, run: Run, ending: object) -> Worker:
        """Publisher._flush, when all have answered; then Run._end."""
        if run.refused:
            return _with_run(worker, number, run._replace(phase="ask", sent=0, refused=False))
        if ending == b"incomplete":
            return _with_run(worker, number, run._replace(phase="end", sent=0, refused=False))
        landed = self._said_until[run.batch]
        if ending is None:
            return _with_run(
                worker, number, run._replace(batch=run.batch + 1, landed=landed, sent=0, asked=False, phase="flush")
            )
        if ending == b"done" and run.ending != "stubborn":
            return self._without(worker, number, run)
        return _with_run(worker, number, run._replace(phase="release", sent=0))

    def _asks(self, number: int, run: Run, worker: Worker, redis: int) -> tuple[str, int, Worker]:
        """Publisher._ask_what_landed."""
        last = self._view(redis).last_id(self._jobs[number])
        until = self._said_until[run.batch]
        if last.attempt > run.attempt:
            run = run._replace(phase="release")
        elif last.sequence == until + 1:  # its own marker
            run = run._replace(phase="release")
            if run.ending != "stubborn":
                return "finds its marker of", redis, self._without(worker, number, run)
        else:
            run = run._replace(phase="flush", asked=True, landed=last.sequence)
            if last.sequence == until and run.batch < len(self.size.batches) - 1:
                run = run._replace(batch=run.batch + 1, asked=False)
        return "asks what landed of", redis, _with_run(worker, number, run)

    def _releases(
        self, name: str, number: int, run: Run, worker: Worker, redis: int
    ) -> Iterator[tuple[str, int, Worker]]:
        command = self._commands.release(name, self._jobs[number], run.attempt)
        then, _ = self._sent(redis, command)
        yield "releases", then, self._without(worker, number, run)
        if worker.cuts and not worker.stragglers:
            cut = worker._replace(cuts=worker.cuts - 1, stragglers=(command,))
            yield "is cut off while it releases", redis, cut

    # --

    def _begun(self, number: int, attempt: int, state: str | None) -> Run:
        must_ask = bool(self.size.sessions[number]) and state is None
        return Run(attempt, "begin" if must_ask else "flush", state=state)

    def _without(self, worker: Worker, number: int, run: Run) -> Worker:
        """The run is over; what the worker has claimed meanwhile begins."""
        next_run = self._begun(number, run.next_attempt, run.next_state) if run.next_attempt else None
        return _with_run(worker, number, next_run)

    def _view(self, redis: int) -> View:
        return self._server.views[redis]

    def _sent(self, redis: int, command: Command) -> tuple[int, Any]:
        return self._server.apply(redis, command)


def _with_run(worker: Worker, number: int, run: Run | None) -> Worker:
    return worker._replace(runs=(*worker.runs[:number], run, *worker.runs[number + 1 :]))


def _stopped(worker: Worker, number: int, run: Run, on_their_way: list[Command]) -> Worker:
    """It says no more; what is on its way stays on its way."""
    if run.sent:
        worker = worker._replace(stragglers=(*worker.stragglers, *on_their_way))
    return _with_run(worker, number, run._replace(phase="release", sent=0, refused=False))
