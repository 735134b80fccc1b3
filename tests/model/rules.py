"""What must hold in every state, in every step, and at the end. A broken rule is one sentence."""

from __future__ import annotations

from dataclasses import dataclass

from shared.entries import BEGINNING, ErrorMarker, Kind, OkMarker, Tally
from shared.jobs import ErrorCode, Status
from tests.model.server import CLOCK, KEYS, Command, Job, View

# What stays without a time to live: three indices, the session state as the settings ask for it, and the model's clock.
_WITHOUT_TTL = {KEYS.queue, KEYS.deadlines, KEYS.workers, CLOCK}


def said(attempt: int, sequence: int) -> bytes:
    """What an agent says: no two entries are alike."""
    return b"%d.%d" % (attempt, sequence)


class BrokenRuleError(Exception):
    """The protocol does not keep a promise."""


def _must(holds: bool, rule: str) -> None:
    if not holds:
        raise BrokenRuleError(rule)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What depends on the size of the deployment."""

    max_attempts: int
    # Whether Redis may refuse an entry and take the next one of the same flush. Then readers see the hole, and there is
    # no ok.
    may_have_holes: bool


def check(before: View, command: Command, after: View, *, limits: Limits) -> None:
    """Raises BrokenRuleError."""
    try:
        check_step(before, command, after)
        if after is not before:
            check_state(after, limits)
    except BrokenRuleError as error:
        step = " ".join(filter(None, (command.name, command.by, command.job)))
        raise BrokenRuleError(f"{error} (after {step})") from None


# -- every state -------------------------------------------------------------------------------------------------------


def check_state(view: View, limits: Limits) -> None:
    for job_id, job in view.jobs.items():
        _check_stream(job_id, job, limits)
        _check_place(job_id, job, view)
    for session in {job.session for job in view.jobs.values()} - {""}:
        _check_session(session, view)
    forgotten = {name for name in view.names_without_ttl - _WITHOUT_TTL if not name.startswith(KEYS.session(""))}
    _must(not forgotten, f"{sorted(forgotten)} have no time to live")


def _check_stream(job_id: str, job: Job, limits: Limits) -> None:
    before, shown, openings, tally = BEGINNING, False, 0, Tally()
    for entry in job.entries:
        is_behind_hole = limits.may_have_holes and entry.id > before and not entry.is_marker
        _must(before.is_followed_by(entry.id) or is_behind_hole, f"{job_id}: {entry.id} follows {before}")
        _must(entry is job.entries[-1] or not entry.is_marker, f"{job_id}: something follows the marker {entry.id}")
        if entry.kind is Kind.OPEN:
            openings += 1
            _must(entry.id.sequence == 0, f"{job_id}: an opening at {entry.id}")
            _must(not shown, f"{job_id}: attempt {entry.id.attempt} opens after something was shown")
        elif not entry.is_marker:
            shown = True
            tally.add(entry.kind, entry.payload)
            _must(entry.payload == said(*entry.id), f"{job_id}: {entry.id} is {entry.payload!r}")
        before = entry.id
    _must(openings <= limits.max_attempts, f"{job_id} has {openings} attempts")
    marker = job.marker
    _must(job.is_terminal == (marker is not None), f"{job_id} is {job.status.value}, its last entry is {before}")
    if marker is not None:
        is_ok = marker.kind is Kind.OK
        _must(is_ok == (job.status is Status.SUCCEEDED), f"{job_id} is {job.status.value} with {marker.kind.value}")
        if is_ok:
            _must(OkMarker.parse(marker.payload).confirms(tally), f"{job_id}: the ok confirms something else")
        else:
            is_cancel = ErrorMarker.parse(marker.payload).code == ErrorCode.CANCELLED
            _must(is_cancel == (job.status is Status.CANCELLED), f"{job_id}: {marker.payload!r}, {job.status.value}")


def _check_place(job_id: str, job: Job, view: View) -> None:
    """Whoever has to move a job on finds it."""
    turns = view.turns(job.session) if job.session else [job_id]
    if not job.is_terminal:
        _must(job_id in view.deadlines, f"{job_id} is {job.status.value} and has no deadline")
        _must(job_id in turns, f"{job_id} is {job.status.value} and has no place in its session")
    if job.status is Status.RUNNING:
        _must(turns[0] == job_id, f"{job_id} runs out of turn")
        _must(job_id in view.held_by(job.worker), f"{job_id} is not held by {job.worker}, which executes it")
        _must(job.worker in view.leases, f"{job_id} is executed by {job.worker}, which nobody would miss")
    may_be_claimed = job.status is Status.QUEUED and turns[0] == job_id
    _must((job_id in view.queue) == may_be_claimed, f"{job_id} is {job.status.value}, the queue holds {view.queue}")


def _check_session(session: str, view: View) -> None:
    whole = [job_id for job_id, job in sorted(view.jobs.items()) if job.status is Status.SUCCEEDED]
    whole = [job_id for job_id in whole if view.jobs[job_id].session == session]
    state = view.session_state(session)
    _must(state == "".join(whole), f"the turns {whole} have succeeded, the session state is {state!r}")


# -- every step --------------------------------------------------------------------------------------------------------


def check_step(before: View, command: Command, after: View) -> None:
    for job_id, was in before.jobs.items():
        now = after.jobs[job_id]
        if was.is_terminal:
            _must(now == was, f"{command.name} changes {job_id}, which has ended")
        _must(now.entries[: len(was.entries)] == was.entries, f"{command.name} removes entries of {job_id}")
        if command.name in ("append", "finish", "abandon", "end", "release") and now[:2] + now[5:] != was[:2] + was[5:]:
            is_its_own = (command.job, command.by, command.attempt) == (job_id, was.worker, was.attempt)
            _must(is_its_own, f"{command.name} changes an attempt of {job_id} that is not its own")
        _must(was.attempt <= now.attempt, f"{command.name} takes {job_id} back to attempt {now.attempt}")
        if was.worker and _is_busy(job_id, was, before) and not _is_busy(job_id, was, after):
            _must(
                _may_free(job_id, was, before, command), f"{command.name} frees {job_id}, which may still be executed"
            )


def _is_busy(job_id: str, job: Job, view: View) -> bool:
    """Whether this execution of the job has a slot, and with it the session."""
    is_same = view.jobs[job_id].attempt == job.attempt
    has_turn = not job.session or job_id in view.turns(job.session)
    return is_same and has_turn and job_id in view.held_by(job.worker)


def _may_free(job_id: str, job: Job, view: View, command: Command) -> bool:
    """Only who executed it may say that it has stopped; the sweep, if that worker is lost or has had its time."""
    if command.name in ("finish", "release"):
        return (command.job, command.by, command.attempt) == (job_id, job.worker, job.attempt)
    if command.name == "retire":
        return command.by == job.worker
    is_lost = view.leases.get(job.worker, True)
    is_late = view.deadlines.get(job_id, True)
    return command.name == "settle" or (command.name == "sweep" and (is_lost or is_late))


# -- the end -----------------------------------------------------------------------------------------------------------


def _lasts_as_long_as_its_jobs(name: str) -> bool:
    """What finds ended jobs. What finds unfinished ones has to be gone with the last of them."""
    is_index = name.startswith(f"{KEYS.prefix}:index:")
    return is_index and not any(f":{status.value}:" in name for status in (Status.QUEUED, Status.RUNNING))


def check_end(view: View) -> None:
    """Nobody is alive but the sweep, and all deadlines have passed."""
    for job_id, job in view.jobs.items():
        _must(job.is_terminal, f"{job_id} is {job.status.value} for ever")
    left = {name for name in view.names if not name.endswith((":job", ":request", ":stream"))}
    left = {name for name in left if not name.startswith(KEYS.session("")) and name not in (KEYS.bell, CLOCK)}
    left = {name for name in left if not _lasts_as_long_as_its_jobs(name)}
    _must(not left, f"{sorted(left)} are left for ever")
