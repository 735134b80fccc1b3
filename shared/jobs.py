"""A job as a value: what was accepted, and what its record says."""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, NamedTuple

from shared.entries import ErrorMarker, Usage
from shared.settings import DEFAULT_TENANT
from shared.text import json_bytes, parse_json
from shared.tracing import CARRIED

ARQ_FUNCTION = "run_completion"  # the name under which arq finds the worker's function


class Status(StrEnum):
    """A job's states; the last three are terminal and never change again (docs/architecture.md has the diagram)."""

    QUEUED = "queued"  # accepted; waits for a worker, or for the turn before it
    RUNNING = "running"  # a worker executes an attempt
    SUCCEEDED = "succeeded"  # the stream ends in an `ok` marker
    FAILED = "failed"  # the stream ends in an `error` marker
    CANCELLED = "cancelled"  # the stream ends in an `error` marker, because somebody asked for it


TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED})


class ErrorCode(StrEnum):
    """Why a job ended without a whole answer; `error.code` on the wire."""

    AGENT_ERROR = "agent_error"  # the agent raised
    TIMEOUT = "timeout"  # the attempt ran longer than the run timeout, or said nothing for the idle timeout
    QUEUE_TIMEOUT = "queue_timeout"  # no worker had a free slot in time, or the turn before did not end in time
    NO_WORKER = "no_worker"  # no worker was alive when the queue timeout passed
    WORKER_LOST = "worker_lost"  # the worker died after the answer had begun, or died on every attempt
    WORKER_STOPPED = "worker_stopped"  # the worker was told to stop, and the job did not end within the drain timeout
    CANCELLED = "cancelled"  # the client went away, or asked for it
    STREAM_INCOMPLETE = "stream_incomplete"  # entries are missing, or do not match the marker
    STREAM_EXPIRED = "stream_expired"  # the stream is gone from Redis
    STREAM_INTERRUPTED = "stream_interrupted"  # the API process was stopped while it relayed the stream
    STREAM_UNREACHABLE = "stream_unreachable"  # Redis did not answer for too long while the stream was open
    UNDELIVERABLE = "undeliverable"  # arq could not deliver the job to a worker's function


def session_key(tenant: str, session_id: str) -> str:
    """The name of a session: `api:<id>`, as with nanobot, or `api@<tenant>:<id>`.

    A tenant's name holds neither `@` nor `:`, so no id that a client makes up names a session of another tenant.
    """
    return f"api:{session_id}" if tenant == DEFAULT_TENANT else f"api@{tenant}:{session_id}"


class JobKind(StrEnum):
    """By which API a job was asked for. The value begins its id."""

    CHAT = "chatcmpl"
    RESPONSE = "resp"


class Join(StrEnum):
    """When a request that may come twice joins the job of the one before."""

    ALWAYS = "always"  # the client says that it is the same: `Idempotency-Key`
    UNLESS_FAILED = "unless_failed"  # the SDK sends it again by itself
    NEVER = "never"  # it is the first one


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """What tells that two requests are one and the same."""

    name: str  # of a tenant: the key that its client chose, or what the SDK repeats
    body_digest: str  # of the body, which has to be the same, too
    join: Join


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookTarget:
    """Where a request wants its job's end to be told, instead of the deployment's own endpoint."""

    url: str  # checked by shared/destinations.py
    secret: str | None = field(default=None, repr=False)  # `whsec_…`; None: signed with the deployment's


class Attachment(NamedTuple):
    """What a stored request holds in the place of a file that came inside of it."""

    number: int  # its place among the attachments of the job, from 0
    media_type: str

    def to_json(self) -> dict[str, Any]:
        return {"attachment": self.number, "media_type": self.media_type}

    @classmethod
    def from_json(cls, value: object) -> Attachment | None:
        """None for what a client can have sent: it sends text there."""
        return cls(value["attachment"], value["media_type"]) if isinstance(value, dict) else None


def new_job_id(kind: JobKind = JobKind.CHAT) -> str:
    """The id that the client sees."""
    return f"{kind.value}{_ID_JOINTS[kind]}{secrets.token_hex(16)}"


_ID_JOINTS = {JobKind.CHAT: "-", JobKind.RESPONSE: "_"}  # as OpenAI writes them


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A validated request on its way into the queue."""

    job_id: str
    tenant: str = DEFAULT_TENANT  # whose key the request came with
    session: str  # session key whose turns run one at a time, or "" if the request belongs to none
    model: str
    messages: list[dict[str, Any]]  # OpenAI chat messages, validated; their files are attachments or have an id
    owns_history: bool  # `messages` is the whole history; otherwise the session's comes before it
    params: dict[str, Any] = field(default_factory=dict)  # other OpenAI fields that an agent may heed
    metadata: dict[str, str] = field(default_factory=dict)
    user: str = ""
    request_id: str = ""  # the `x-request-id` of the request that was accepted
    kind: JobKind = JobKind.CHAT
    store: bool = False  # the client may ask for the finished job
    background: bool = False  # a response that nobody has to wait for, and that anybody may cancel
    is_waited_for: bool = False  # by a client; the job is not started without one, and ends when it goes away
    patience_ms: int | None = None  # how long that client waits for the first byte of its answer; None: we do not know
    once: Once | None = None  # None: a request of its own
    webhook: WebhookTarget | None = None  # None: the deployment's endpoint, if there is one
    echo: dict[str, Any] = field(default_factory=dict)  # what the answer repeats of the request, as its API wants it
    retry_of: str = ""  # id of the job that this one asks for again; "" if none

    def request_bytes(self) -> bytes:
        """What the worker needs to run the job, as JSON."""
        return json_bytes(
            {
                "tenant": self.tenant,
                "session": self.session,
                "model": self.model,
                "messages": self.messages,
                "owns_history": self.owns_history,
                "params": self.params,
            }
        )

    def record_fields(self) -> dict[str, str | bytes]:
        """What the job record says beyond what the submit script sets itself."""
        fields: dict[str, str | bytes] = {
            "kind": self.kind.value,
            "tenant": self.tenant,
            "model": self.model,
            "metadata": json_bytes(self.metadata),
            "user": self.user,
            "store": "1" if self.store else "0",
            "request_id": self.request_id,
        }
        if self.echo:
            fields["echo"] = json_bytes(self.echo)
        if self.background:
            fields["background"] = "1"
        if self.is_waited_for:
            fields["waiters"] = "1"
        if self.metadata:
            fields["pairs"] = pairs_of(self.metadata)
        if self.retry_of:
            fields["retry_of"] = self.retry_of
        return fields


def pairs_of(metadata: Mapping[str, str]) -> str:
    """What the index knows of a job's metadata: a short digest of each pair, whatever its length, apart by spaces."""
    return " ".join(pair_digest(key, value) for key, value in metadata.items())


def pair_digest(key: str, value: str) -> str:
    """64 bits in 11 characters that need no escaping."""
    digest = blake2b(json_bytes([key, value]), digest_size=8).digest()
    return urlsafe_b64encode(digest).rstrip(b"=").decode()


class LostAttempt(NamedTuple):
    """An attempt that showed nothing before its worker was lost. Instants as in the record."""

    attempt: int
    worker: str
    started_ms: int
    lost_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """What Redis knows of a job. Instants are Redis's clock, ms since the epoch; None: not yet."""

    job_id: str
    kind: JobKind
    status: Status
    tenant: str
    session: str
    model: str
    user: str
    store: bool
    background: bool
    attempt: int  # 0 until a worker has claimed it
    worker: str  # who executes or executed the last attempt; "" if nobody has
    accepted_ms: int
    deadline_ms: int  # when the sweep ends the job unless it has moved on
    started_ms: int | None
    first_token_ms: int | None
    finished_ms: int | None
    entries: int | None  # of the last attempt, without opening and marker
    finish_reason: str | None
    usage: Usage | None
    error: ErrorMarker | None
    metadata: dict[str, str]
    promoted_ms: int | None  # when the turn before had ended; None: it waited for none
    last_token_ms: int | None
    tool_ms: int | None  # how long the agent's own tools ran, as far as it told; those at the same time count once each
    lost: list[LostAttempt]  # attempts whose worker was lost, so that the job ran again
    traceback: str  # of the agent's failure, for operators; "" if there is none
    retry_of: str  # id of the job that this one asks for again; "" if none
    trace: Mapping[str, str]  # the span of the request, see shared/tracing.py; empty if there was none

    @property
    def echo(self) -> dict[str, Any]:
        """What the answer repeats of the request, as its API wants it."""
        echo: dict[str, Any] = parse_json(self.echo_json) if self.echo_json else {}
        return echo

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    echo_json: bytes  # what the answer repeats of the request; lists leave it out, since it may be large

    @property
    def created_s(self) -> int:
        """What the client is told as `created`, in seconds since the epoch."""
        return self.accepted_ms // 1000

    @classmethod
    def from_hash(cls, job_id: str, fields: Mapping[bytes, bytes]) -> JobRecord:
        """Reads the hash that the scripts write."""

        def text(name: bytes) -> str:
            return fields.get(name, b"").decode()

        def number(name: bytes) -> int | None:
            return int(fields[name]) if fields.get(name) else None

        usage = parse_json(fields[b"usage"]) if fields.get(b"usage") else None
        return cls(
            job_id=job_id,
            kind=JobKind(text(b"kind")),
            status=Status(text(b"status")),
            tenant=text(b"tenant"),
            session=text(b"session"),
            model=text(b"model"),
            user=text(b"user"),
            store=text(b"store") == "1",
            background=text(b"background") == "1",
            attempt=number(b"attempt") or 0,
            worker=text(b"worker"),
            accepted_ms=number(b"accepted_ms") or 0,
            deadline_ms=number(b"deadline_ms") or 0,
            started_ms=number(b"started_ms"),
            first_token_ms=number(b"first_token_ms"),
            finished_ms=number(b"finished_ms"),
            entries=number(b"entries"),
            finish_reason=text(b"finish_reason") or None,
            usage=Usage(**usage) if usage else None,
            error=ErrorMarker.parse(fields[b"error"]) if fields.get(b"error") else None,
            metadata=parse_json(fields[b"metadata"]) if fields.get(b"metadata") else {},
            promoted_ms=number(b"promoted_ms"),
            last_token_ms=number(b"last_token_ms"),
            tool_ms=number(b"tool_ms"),
            lost=[LostAttempt(**lost) for lost in parse_json(fields.get(b"lost") or b"[]")],
            traceback=text(b"traceback"),
            retry_of=text(b"retry_of"),
            echo_json=fields.get(b"echo", b""),
            trace={name: text(name.encode()) for name in CARRIED if name.encode() in fields},
        )
