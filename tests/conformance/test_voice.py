"""worker/run.py: how the agents of a worker share its event loop while they speak."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from shared.entries import Kind
from shared.store import JobStore
from tests.jobs import entries_of, running
from worker.publisher import AttemptLog, Publisher
from worker.run import WORDS_AT_ONCE, StreamVoice

pytestmark = pytest.mark.parametrize("backend", ["valkey"], indirect=True)  # what is said goes over a wire


@pytest.fixture
async def attempts(store: JobStore) -> AsyncIterator[tuple[AttemptLog, AttemptLog]]:
    """Two of one worker's."""
    claims = [(await running(store)).claim for _ in range(2)]
    async with Publisher(store, "worker") as publisher:
        yield publisher.open(claims[0], lambda _: None), publisher.open(claims[1], lambda _: None)


def voice_of(attempt: AttemptLog) -> StreamVoice:
    return StreamVoice(attempt, max_bytes=1_000_000)


@pytest.mark.parametrize("say", [StreamVoice.text, StreamVoice.reasoning])
async def test_an_agent_that_never_waits_lets_the_others_go_on(
    attempts: tuple[AttemptLog, AttemptLog], say: Callable[[StreamVoice, str], Awaitable[None]]
) -> None:
    """Its model's answer may be there already, a thousand chunks in one read."""
    said: list[str] = []

    async def speak(name: str, attempt: AttemptLog) -> None:
        voice = voice_of(attempt)
        for _ in range(1000):
            said.append(name)
            await say(voice, "word ")

    await asyncio.gather(speak("a", attempts[0]), speak("b", attempts[1]))
    assert max(map(len, "".join(said).split("b"))) == WORDS_AT_ONCE


async def test_a_few_words_at_once_are_one_entry(store: JobStore, attempts: tuple[AttemptLog, AttemptLog]) -> None:
    """As of a model that makes several tokens in a step: none of them has to wait until the first has rested."""
    attempt, _ = attempts
    voice = voice_of(attempt)
    for _ in range(2):
        for _ in range(WORDS_AT_ONCE):
            await voice.text("word ")
        await attempt.flushed()
    entries = [entry.payload for entry in await entries_of(store, attempt.claim.job_id) if entry.kind is Kind.DELTA]
    assert entries == [b"word " * WORDS_AT_ONCE] * 2


async def test_an_agent_that_waits_by_itself_is_held_up_by_nothing(attempts: tuple[AttemptLog, AttemptLog]) -> None:
    voice, turns, done = voice_of(attempts[0]), 0, False

    def turn() -> None:
        nonlocal turns
        turns += 1
        if not done:
            asyncio.get_running_loop().call_soon(turn)

    turn()
    for _ in range(100):
        await voice.text("word ")
        await asyncio.sleep(0)
    done = True
    assert turns == 101
