"""nanobot's sessions, each held in memory for one turn and nowhere longer. Importing this module imports nanobot.

Rule 1: a turn sees its own session and no other one. Which turn asks is told by the context (contextvars), which the
        tasks and threads that a turn starts inherit, not by the session's key.
Rule 2: nanobot saves with synchronous calls on the event loop, so a save does no I/O and encodes nothing: it only
        remembers what to keep. The worker writes that together with the ok marker, or never.
Rule 3: nothing outlasts a turn. The next one starts from the record that comes with its claim, which the session's
        turns on other workers have written, too.
Rule 4: a turn waits for what it started. What escapes that works on a session that nobody will ever read again.

The record is JSON, `{"version": 1, "session": {...}}`. It is encoded and decoded on the event loop: 1 ms and 4 ms for
1 MB, and a thread would not help, since orjson keeps the interpreter's lock (docs/decisions/0011-nanobot-sessions.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from copy import deepcopy
from datetime import datetime
from typing import Any, Final

import structlog
from nanobot.agent.loop import AgentLoop
from nanobot.providers.base import ProviderConversationState
from nanobot.session.manager import Session, SessionManager

from shared.text import json_bytes, parse_json
from worker.agents.contract import AgentError

log = structlog.get_logger(__name__)

RECORD_VERSION: Final = 1

NEWER: Final = "The session was last continued by a newer version of the service, and cannot be continued by this one."
UNREADABLE: Final = "The stored session cannot be read. Start a new one."


class TurnSession:
    """The session of one running turn. Made by `turn_session`."""

    def __init__(self, key: str, saved: Session | None) -> None:
        self.key = key
        self.saved = saved  # as nanobot last saved it, or as it came with the turn; None: a new session
        self.live: Session | None = None  # what nanobot works on
        self._background: list[asyncio.Task[Any]] = []

    def record(self) -> bytes | None:
        """What the next turn is to get. Take it when the turn has done everything; None if it never saved."""
        return None if self.saved is None else encode(self.saved)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Starts something that nanobot does not wait for, but the turn does."""
        self._background.append(asyncio.create_task(work))

    async def background(self) -> None:
        """Returns when everything spawned has ended. Raises what it raised."""
        await asyncio.gather(*self._background)

    async def end(self) -> None:
        """Stops what still runs."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)


_current: ContextVar[TurnSession | None] = ContextVar("endmark_nanobot_session", default=None)


@asynccontextmanager
async def turn_session(key: str, state: bytes | None) -> AsyncIterator[TurnSession]:
    """Gives nanobot a session for the length of the block, in this task and in what it starts.

    `state` is what `TurnSession.record` gave at the end of the session's turn before. Raises AgentError if it cannot be
    read.
    """
    turn = TurnSession(key, None if state is None else decode(key, state))
    token = _current.set(turn)
    try:
        yield turn
    finally:
        await turn.end()
        _current.reset(token)


def _session_of_turn(key: str) -> TurnSession | None:
    """The session of the turn that asks, if it asks for its own."""
    turn = _current.get()
    return turn if turn is not None and turn.key == key else None


# -- the record --------------------------------------------------------------------------------------------------------


def encode(session: Session) -> bytes:
    """A session as a record."""
    state = session.provider_state
    return json_bytes(
        {
            "version": RECORD_VERSION,
            "session": {
                "created_at": session.created_at.isoformat(),
                "updated_at": session.updated_at.isoformat(),
                "metadata": session.metadata,
                "messages": session.messages,
                "last_consolidated": session.last_consolidated,
                "provider_state": None if state is None else state.to_private_record(),
            },
        }
    )


def decode(key: str, record: bytes) -> Session:
    """The inverse of `encode`. Raises AgentError, for a newer version as for anything that `encode` never makes."""
    try:
        document = parse_json(record)
        version = document["version"]
        if isinstance(version, int) and version > RECORD_VERSION:
            raise AgentError(NEWER)
        if version != RECORD_VERSION:
            raise ValueError(f"version {version!r}")
        return _session(key, document["session"])
    except (ValueError, KeyError, TypeError) as error:
        raise AgentError(UNREADABLE) from error


def _session(key: str, fields: Any) -> Session:
    """Raises ValueError, KeyError or TypeError. nanobot's own class would quietly replace what does not fit."""
    messages, metadata, consolidated = fields["messages"], fields["metadata"], fields["last_consolidated"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and "role" in message for message in messages
    ):
        raise ValueError("messages")
    if not isinstance(metadata, dict):
        raise TypeError("metadata")
    if not isinstance(consolidated, int) or not 0 <= consolidated <= len(messages):
        raise ValueError("last_consolidated")
    state = fields["provider_state"]
    provider_state = ProviderConversationState.from_private_record(state)
    if state is not None and provider_state is None:
        raise ValueError("provider_state")
    return Session(
        key=key,
        messages=messages,
        created_at=datetime.fromisoformat(fields["created_at"]),
        updated_at=datetime.fromisoformat(fields["updated_at"]),
        metadata=metadata,
        last_consolidated=consolidated,
        provider_state=provider_state,
    )


# -- for nanobot -------------------------------------------------------------------------------------------------------


class TurnSessionStore:
    """nanobot's `SessionStore`: what it finds and keeps is the session of the turn that asks."""

    def load(self, key: str) -> Session | None:
        turn = _session_of_turn(key)
        return turn and turn.saved

    def save(self, session: Session, *, fsync: bool = False) -> None:  # noqa: ARG002 - their signature
        turn = _session_of_turn(session.key)
        if turn is None:
            log.debug("session_not_kept")  # one that nanobot has started for itself
        else:
            turn.saved = session

    def delete(self, key: str) -> bool:
        """A deleted session is an empty one to the next turn."""
        turn = _session_of_turn(key)
        if turn is None or turn.saved is None:
            return False
        turn.saved = Session(key=key)
        return True

    def read(self, key: str) -> dict[str, Any] | None:
        turn = _session_of_turn(key)
        if turn is None or turn.saved is None:
            return None
        return {**_heading(turn.saved), "messages": deepcopy(turn.saved.messages)}

    def read_metadata(self, key: str) -> dict[str, Any] | None:
        turn = _session_of_turn(key)
        return None if turn is None or turn.saved is None else _heading(turn.saved)

    def update_metadata(self, key: str, updates: dict[str, Any], *, fsync: bool = False) -> bool:  # noqa: ARG002
        turn = _session_of_turn(key)
        if turn is None or turn.saved is None:
            return False
        turn.saved.metadata.update(deepcopy(updates))
        return True

    def list_sessions(self) -> list[dict[str, Any]]:
        turn = _current.get()
        if turn is None or turn.saved is None:
            return []
        heading = _heading(turn.saved)
        title = heading.pop("metadata").get("title")
        return [{**heading, "title": title if isinstance(title, str) else "", "preview": "", "path": ""}]


def _heading(session: Session) -> dict[str, Any]:
    return {
        "key": session.key,
        "created_at": session.created_at.isoformat(),
        "updated_at": session.updated_at.isoformat(),
        "metadata": deepcopy(session.metadata),
    }


class TurnSessions(SessionManager):  # type: ignore[misc] # nanobot ships no types
    """nanobot's manager with the turn for a cache: its own one is shared by all turns of the process and outlives them.

    Overrides three methods of 0.3.5, two of them private; the version is pinned.
    """

    def _cached(self, key: str) -> Session | None:
        turn = _session_of_turn(key)
        return turn and turn.live

    def _remember(self, session: Session) -> None:
        turn = _session_of_turn(session.key)
        if turn is not None:
            turn.live = session

    def invalidate(self, key: str) -> None:
        turn = _session_of_turn(key)
        if turn is not None:
            turn.live = None


class TurnLoop(AgentLoop):  # type: ignore[misc] # nanobot ships no types
    """nanobot's loop, whose turns wait for what they started: `/new` has the conversation summarised, for example."""

    def schedule_background(self, coro: Coroutine[Any, Any, Any]) -> None:
        turn = _current.get()
        if turn is None:
            super().schedule_background(coro)
        else:
            turn.spawn(coro)
