"""A pydantic-ai agent with a tool.

    make install EXTRA=pydantic-ai
    ENDMARK_AGENT=examples.pydantic_agent:agent make run

EXAMPLE_MODEL names its model, such as openai:gpt-5-mini. Without it pydantic-ai's test model calls the tool once, with
a made-up argument, and answers with the result.
"""

import os

from pydantic_ai import Agent

POPULATION = {"Oslo": 717_710, "Bergen": 291_940}

agent = Agent(os.environ.get("EXAMPLE_MODEL", "test"), instructions="You know the cities of Norway. Be brief.")


@agent.tool_plain
async def population(city: str) -> str:
    """How many people live in a city."""
    return f"{POPULATION[city]:,}" if city in POPULATION else "unknown"
