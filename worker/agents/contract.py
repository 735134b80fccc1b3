"""What a worker asks of an agent, and what an agent may say.

    Agent.run(turn, voice) -> Outcome        one turn; raises to fail it

Rule 1: an agent that returns has finished. An agent that could not finish raises; it never returns half an answer.
Rule 2: what is said is final. `voice` has no way to take a fragment back.
Rule 3: what a session has to remember travels in `session_state`: it is given to the turn, returned with the outcome,
        and kept only if the turn ends well. The next turn may run elsewhere, so an agent keeps nothing to itself.
Rule 4: `asyncio.CancelledError` means that nobody wants the answer any more; clean up and re-raise it.

Errors:
    AgentError            the agent failed, and `public_message` may be shown to the client
    (anything else)       the agent failed; the client is told so, the text of the exception is only logged
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
ToolStatus = Literal["started", "completed", "failed"]


class AgentError(Exception):
    """The agent failed in a way that the client may be told about.

    `public_message` is sent to the client: one sentence, no secrets, no text of an upstream's exception.
    """

    public_message = "The agent failed."  # of a subclass that does not call `__init__`

    def __init__(self, public_message: str) -> None:
        if not isinstance(public_message, str):
            raise TypeError("an AgentError takes the sentence that the client may read")
        super().__init__(public_message)
        self.public_message = public_message


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens that one turn cost, as the model's provider counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request, validated, as an agent sees it."""

    job_id: str
    attempt: int  # 1 for the first execution of the job
    messages: Sequence[Mapping[str, Any]]  # OpenAI chat messages; the last `user` one is the question
    session_key: str  # "api:<session id>", "api@<tenant>:<session id>", or a key used by this job alone
    owns_history: bool  # True: `messages` is the whole history; False: the session's own history comes before it
    tenant: str = "default"  # whose key the request came with
    model: str  # the model name that the client asked for
    session_state: bytes | None = None  # what this agent left in the session's last whole turn; None: a new session
    params: Mapping[str, Any] = field(default_factory=dict)  # other OpenAI request fields (temperature, tools, …)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a finished turn ended."""

    finish_reason: FinishReason = "stop"
    usage: Usage | None = None  # None: the agent does not know
    text: str | None = None  # the whole answer; delivered only if the voice said no text
    session_state: bytes | None = None  # for the session's next turn, on whatever worker; None: as it was


class Voice(Protocol):
    """How an agent speaks. Calls keep their order; each may wait when the agent outruns Redis."""

    async def text(self, fragment: str) -> None:
        """A fragment of the answer. An empty one is ignored."""

    async def reasoning(self, fragment: str) -> None:
        """A fragment of the model's reasoning."""

    async def tool_call(self, delta: Mapping[str, Any]) -> None:
        """A fragment of a function call that the *client* is to execute: an OpenAI `tool_calls` delta with `index`."""

    async def tool(
        self, name: str, status: ToolStatus, *, call_id: str | None = None, detail: str | None = None
    ) -> None:
        """What one of the agent's own tools is doing. Returns once Redis has it, so call it before the tool runs."""


@runtime_checkable
class Agent(Protocol):
    """An agent, built once for each worker process and run concurrently for many jobs."""

    name: str  # short, for logs and start-up messages

    async def run(self, turn: Turn, voice: Voice) -> Outcome:
        """Run one turn to its end. Raises `AgentError`, or anything, to fail it."""

    async def aclose(self) -> None:
        """Release what the agent holds; called once, after its last turn."""
