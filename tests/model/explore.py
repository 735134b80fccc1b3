"""Visits every state that the processes can reach together, nearest first, and checks the rules in each."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from shared.entries import ErrorMarker
from tests.model import rules
from tests.model.processes import Processes, Size, State
from tests.model.rules import BrokenRuleError
from tests.model.server import ModelServer

_SWEEPS = 8  # that are enough to end everything: each attempt, each turn after it and each release takes one


@dataclass(frozen=True)
class Explored:
    """What there was."""

    states: int  # of Redis and all processes together
    transitions: int
    redis_states: int
    endings: frozenset[str]  # of jobs: the status, and the code of an error


class ViolationError(AssertionError):
    """A way into a state in which a rule is broken; the shortest one."""

    def __init__(self, rule: str, trace: list[str]) -> None:
        super().__init__("\n".join([rule, *trace]))
        self.rule = rule


def explore(size: Size, url: str, mutations: Mapping[str, tuple[str, str]] | None = None) -> Explored:
    """Raises ViolationError."""
    limits = rules.Limits(
        max_attempts=size.max_attempts, may_have_holes=any(size.refusals) and any(batch > 1 for batch in size.batches)
    )
    server = ModelServer(url, mutations or {}, partial(rules.check, limits=limits))
    try:
        return _Exploration(Processes(size, server), server).run()
    finally:
        server.close()


class _Exploration:
    def __init__(self, processes: Processes, server: ModelServer) -> None:
        self._processes = processes
        self._server = server
        self._came_from: dict[State, tuple[State, str] | None] = {}
        self._ends_well: set[int] = set()

    def run(self) -> Explored:
        start = self._processes.start()
        self._came_from[start] = None
        waiting = deque([start])
        transitions = 0
        while waiting:
            state = waiting.popleft()
            what = "nobody does anything any more"
            try:
                self._processes.prefetch(state.redis)
                self._check_that_it_ends(state.redis)
                for what, then in self._processes.steps(state):
                    transitions += 1
                    if then not in self._came_from:
                        self._came_from[then] = (state, what)
                        waiting.append(then)
            except BrokenRuleError as error:
                raise ViolationError(str(error), [*self._way_to(state), f"after {what!r}, or what follows"]) from error
        return Explored(len(self._came_from), transitions, len(self._server.views), self._endings())

    def _check_that_it_ends(self, redis: int) -> None:
        """Whoever is alive now is not any more: time and the sweep alone end all jobs and leave nothing behind."""
        if redis in self._ends_well:
            return
        last = redis
        for _ in range(_SWEEPS):
            view = self._server.views[last]
            if last in self._ends_well or (not view.deadlines and not view.leases):
                break
            last = self._processes.settled(last)
        if last not in self._ends_well:
            rules.check_end(self._server.views[last])
        self._ends_well.add(redis)

    def _way_to(self, state: State) -> list[str]:
        steps: list[str] = []
        while (came_from := self._came_from[state]) is not None:
            state, what = came_from
            steps.append(what)
        return steps[::-1]

    def _endings(self) -> frozenset[str]:
        endings = set()
        for view in self._server.views:
            for job in view.jobs.values():
                if job.marker is not None:
                    code = ErrorMarker.parse(job.marker.payload).code if job.marker.kind == "error" else "ok"
                    endings.add(f"{job.status.value} {code}")
        return frozenset(endings)
