"""Decides what a client may believe: passes entries on, and lets an answer end well only if it is whole. No I/O.

Rule 1: only an `ok` marker that confirms the tally of what was passed on ends an answer well.
Rule 2: an attempt that begins after something of an earlier one was passed on makes the answer incomplete.
Rule 3: nothing is passed on after a marker.
"""

from __future__ import annotations

from shared.entries import SPOKEN, Entry, ErrorMarker, Kind, OkMarker, Tally, UnreadableEntryError
from shared.jobs import ErrorCode

INCOMPLETE = ErrorMarker(ErrorCode.STREAM_INCOMPLETE, "A part of the answer was lost.")

Ending = OkMarker | ErrorMarker


class Relay:
    """One reader's judgement of one job's stream, from its beginning."""

    __slots__ = ("_tally", "ending", "is_the_jobs")

    def __init__(self) -> None:
        self.ending: Ending | None = None  # set once; what the client is to be told
        self.is_the_jobs = False  # whether the job has ended so; otherwise it is only what this reader has found
        self._tally = Tally()

    def accept(self, entries: list[Entry]) -> list[Entry]:
        """Takes the next entries in order; returns those to pass on, with openings, without markers.

        `ending` is set when there are no more.
        """
        if len(entries) == 1 and entries[0].kind in SPOKEN and self.ending is None:  # the commonest by far
            self._tally.add(entries[0].kind, entries[0].payload)
            return entries
        passed_on: list[Entry] = []
        for entry in entries:
            if self.ending is not None:
                break
            kind = entry.kind
            if kind in SPOKEN:
                self._tally.add(kind, entry.payload)
                passed_on.append(entry)
            elif kind is Kind.OPEN:
                if self._tally.count:
                    self.ending = INCOMPLETE
                else:
                    passed_on.append(entry)
            else:
                self.ending = self._judge(entry)
        return passed_on

    def _judge(self, marker: Entry) -> Ending:
        try:
            if marker.kind is Kind.ERROR:
                error = ErrorMarker.parse(marker.payload)
                self.is_the_jobs = True
                return error
            ok = OkMarker.parse(marker.payload)
        except UnreadableEntryError:
            return INCOMPLETE
        self.is_the_jobs = ok.confirms(self._tally)
        return ok if self.is_the_jobs else INCOMPLETE
