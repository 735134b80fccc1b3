"""The echo agent."""

from __future__ import annotations

from tests.speaking import RecordingVoice, a_turn
from worker.agents.contract import Agent, Outcome, Usage
from worker.agents.echo import EchoAgent


async def test_it_says_the_question_word_by_word() -> None:
    voice = RecordingVoice()
    outcome = await EchoAgent(delay_per_word_s=0).run(a_turn("two  words\nmore"), voice)
    assert voice.whole_text == "two  words\nmore"
    assert len(voice.said) == 3
    assert outcome == Outcome(usage=Usage(prompt_tokens=3, completion_tokens=3))


async def test_it_says_what_came_with_the_question() -> None:
    voice = RecordingVoice()
    parts = [{"type": "text", "text": "look"}, {"type": "image_url"}, {"type": "image_url"}, {"type": "file"}]
    await EchoAgent(delay_per_word_s=0).run(a_turn(parts), voice)
    assert voice.whole_text == "look (2 images, 1 file)"


async def test_the_same_turn_gives_the_same_fragments() -> None:
    first, second = RecordingVoice(), RecordingVoice()
    agent: Agent = EchoAgent(delay_per_word_s=0)
    for voice in (first, second):
        await agent.run(a_turn("a b c"), voice)
    assert first.said == second.said
