"""Three conversations at once: the turns of one session run one at a time, those of different sessions side by side.

export OPENAI_BASE_URL=http://127.0.0.1:8900/v1 OPENAI_API_KEY=not-needed
.venv/bin/python examples/stream_async.py
"""

import asyncio

from openai import AsyncOpenAI


async def ask(client: AsyncOpenAI, session_id: str, text: str) -> str:
    stream = await client.chat.completions.create(
        model="endmark",
        messages=[{"role": "user", "content": text}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"session_id": session_id},  # ours; the SDK passes it through
    )
    answer, tokens = "", 0
    async for chunk in stream:
        if chunk.usage is not None:  # the last chunk; it has no choices
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            answer += choice.delta.content or ""
    return f"{session_id}: {answer} ({tokens} tokens)"


async def main() -> None:
    async with AsyncOpenAI() as client:
        for line in await asyncio.gather(*(ask(client, name, f"Hello {name}") for name in ("anna", "ben", "cleo"))):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
