"""Entries of a job's stream: values, and their bytes. No Redis, no clock.

Rule 1: an entry's id is `attempt-sequence`. Sequence 0 opens the attempt; the next entries count 1, 2, 3, … gap-free.
Rule 2: an attempt is opened only while nothing of an earlier one has been shown, or to end the job.
Rule 3: the marker, `ok` or `error`, is the last entry. A job has exactly one.
Rule 4: `ok` carries the tally of its attempt: how many entries precede it, and a digest of them.

docs/protocol.md is the specification.
"""

from __future__ import annotations

from enum import StrEnum
from hashlib import blake2b
from typing import NamedTuple

import orjson

from shared.text import json_bytes, parse_json

MAX_ENTRY_BYTES = 256 * 1024  # a larger run of fragments becomes several entries; one larger fragment stays whole


class Kind(StrEnum):
    """What an entry is. The value is the entry's only field name in Redis."""

    OPEN = "open"  # an attempt begins; the payload is the worker's id
    DELTA = "delta"  # a fragment of the answer, UTF-8
    REASONING = "reasoning"  # a fragment of the model's reasoning, UTF-8
    TOOL_CALL = "tool_call"  # a fragment of a function call for the client, a JSON object
    TOOL = "tool"  # what one of the agent's own tools does, a JSON object
    OK = "ok"  # marker: the agent finished
    ERROR = "error"  # marker: it did not

    __hash__ = str.__hash__  # the enum's own is a function in Python, and asked for several times for every entry


MERGEABLE = frozenset({Kind.DELTA, Kind.REASONING})
MARKERS = frozenset({Kind.OK, Kind.ERROR})
SPOKEN = frozenset(Kind) - MARKERS - {Kind.OPEN}  # what the agent has said


class EntryId(NamedTuple):
    """An entry's id; ids order as Redis orders them."""

    attempt: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.sequence}"

    @classmethod
    def parse(cls, raw: bytes | str) -> EntryId:
        """Raises ValueError if `raw` is not `attempt-sequence`."""
        attempt, sequence = raw.split(b"-") if isinstance(raw, bytes) else raw.split("-")
        return cls(int(attempt), int(sequence))

    def is_followed_by(self, other: EntryId) -> bool:
        """Whether `other` may come right after this id: the next of the attempt, or the opening of a later one."""
        if other.attempt == self.attempt:
            return other.sequence == self.sequence + 1
        return other.attempt > self.attempt and other.sequence == 0


BEGINNING = EntryId(0, 0)  # the cursor of a reader that has seen nothing


class Entry(NamedTuple):
    id: EntryId
    kind: Kind
    payload: bytes

    @property
    def is_marker(self) -> bool:
        return self.kind in MARKERS


class UnreadableEntryError(Exception):
    """An entry does not follow the protocol: somebody else wrote to the stream, or it is from another version."""


_new = tuple.__new__
_NAMES = {kind: kind.value.encode() for kind in Kind}
_KINDS = {name: kind for kind, name in _NAMES.items()}


def entry_from_fields(raw_id: bytes, fields: list[bytes] | dict[bytes, bytes]) -> Entry:
    """An entry as XRANGE returns it. Raises UnreadableEntryError."""
    try:
        ((name, payload),) = fields.items() if isinstance(fields, dict) else [fields]
        return Entry(EntryId.parse(raw_id), _KINDS[name], payload)
    except (ValueError, KeyError) as error:
        raise UnreadableEntryError(f"entry {raw_id!r} is not readable") from error


def entry_to_message(entry: Entry) -> bytes:
    """An entry as it travels over pub/sub: `id kind payload`."""
    return b"%d-%d %b %b" % (*entry.id, entry.kind.encode(), entry.payload)


def entry_from_message(message: bytes) -> Entry:
    """The inverse of `entry_to_message`. Raises UnreadableEntryError."""
    try:
        raw_id, name, payload = message.split(b" ", 2)
        attempt, sequence = raw_id.split(b"-")
        # As `Entry(EntryId(...), ...)`, at half the price: every reader pays it for every token.
        return _new(Entry, (_new(EntryId, (int(attempt), int(sequence))), _KINDS[name], payload))
    except (ValueError, KeyError) as error:
        raise UnreadableEntryError("a pub/sub message is not an entry") from error


class Tally:
    """Counts the entries of one attempt after its opening and digests them; both ends keep one."""

    __slots__ = ("_hash", "count")

    def __init__(self) -> None:
        self.count = 0
        self._hash = blake2b(digest_size=16)

    def add(self, kind: Kind, payload: bytes) -> None:
        """Takes the next entry: its kind, the length of its payload and the payload."""
        self.count += 1
        self._hash.update(b"%b %d %b" % (_NAMES[kind], len(payload), payload))

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


class Usage(NamedTuple):
    """Tokens that a job cost, as its agent reported them."""

    prompt_tokens: int
    completion_tokens: int


class OkMarker(NamedTuple):
    """The agent finished, and this is the tally of what it said."""

    entries: int  # between the attempt's opening and this marker
    digest: str
    finish_reason: str
    usage: Usage | None
    finished_ms: int = 0  # when, on Redis's clock as far as the worker knows it

    def payload(self) -> bytes:
        return orjson.dumps(self._asdict() | {"usage": self.usage and self.usage._asdict()})

    @classmethod
    def parse(cls, payload: bytes) -> OkMarker:
        """Raises UnreadableEntryError."""
        try:
            fields = orjson.loads(payload)
            usage = fields["usage"]
            return cls(
                int(fields["entries"]),
                str(fields["digest"]),
                str(fields["finish_reason"]),
                Usage(int(usage["prompt_tokens"]), int(usage["completion_tokens"])) if usage else None,
                int(fields.get("finished_ms", 0)),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UnreadableEntryError("an ok marker is not readable") from error

    def confirms(self, tally: Tally) -> bool:
        """Whether a reader with this tally has received exactly what the agent said."""
        return self.entries == tally.count and self.digest == tally.digest


class ErrorMarker(NamedTuple):
    """The job ended without a whole answer. `message` is safe to show to the client."""

    code: str
    message: str

    def payload(self) -> bytes:
        return json_bytes(self._asdict())

    @classmethod
    def parse(cls, payload: bytes) -> ErrorMarker:
        """Raises UnreadableEntryError."""
        try:
            fields = parse_json(payload)
            return cls(str(fields["code"]), str(fields["message"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UnreadableEntryError("an error marker is not readable") from error


def merge(entries: list[tuple[Kind, bytes]]) -> list[tuple[Kind, bytes]]:
    """Joins neighbouring fragments of one kind, up to MAX_ENTRY_BYTES; order and bytes stay as they were said."""
    if len(entries) <= 1:
        return list(entries)
    if len({kind for kind, _ in entries}) == 1 and entries[0][0] in MERGEABLE:  # as nearly always
        whole = b"".join([payload for _, payload in entries])
        if len(whole) <= MAX_ENTRY_BYTES:
            return [(entries[0][0], whole)]
    merged: list[tuple[Kind, bytes]] = []
    run: list[bytes] = []
    run_kind: Kind | None = None
    run_bytes = 0

    def close_run() -> None:
        if run_kind is not None:
            merged.append((run_kind, b"".join(run)))
            run.clear()

    for kind, payload in entries:
        if kind is not run_kind or run_bytes + len(payload) > MAX_ENTRY_BYTES or kind not in MERGEABLE:
            close_run()
            run_kind, run_bytes = kind, 0
        run.append(payload)
        run_bytes += len(payload)
    close_run()
    return merged
