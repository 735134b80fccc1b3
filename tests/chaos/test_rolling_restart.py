"""Every process is restarted, one after the other, under load: nobody notices whose answers fit into the drain time."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.chaos.cluster import Cluster
from tests.chaos.faults import APIS, WORKERS
from tests.chaos.load import Load, Told
from tests.chaos.oracle import Oracle

CLIENTS = 12
ANSWER = {"fragments": 10, "every_s": 0.1, "size": 100}


async def test_a_rolling_restart_costs_nobody_an_answer(tmp_path: Path) -> None:
    async with Cluster(tmp_path, appendfsync="everysec") as cluster:
        load = Load(cluster, seed=1)
        restarted = asyncio.Event()
        async with asyncio.TaskGroup() as clients:
            answers = [clients.create_task(_ask_until(restarted, load, number)) for number in range(CLIENTS)]
            for number in range(WORKERS):
                await cluster.stop_worker(number, 0)
            for number in range(APIS):
                await cluster.stop_api(number, 0)
            restarted.set()
        told = [one for answer in answers for one in answer.result()]
        assert len(told) > 3 * CLIENTS
        assert [one for one in told if one.outcome != "success"] == []
        assert Oracle(cluster, load.told, durable=True).broken_rules() == []


async def _ask_until(restarted: asyncio.Event, load: Load, number: int) -> list[Told]:
    """Asks whichever API is up, in a session of its own; what each request came to."""
    answers: list[Told] = []
    while not restarted.is_set():
        label = f"c{number}.{len(answers)}"
        for api in (number % APIS, (number + 1) % APIS):
            told = await load.ask(load.stream_by_sdk, label, api, f"session-{number}", ANSWER)
            if told.outcome != "connection" or told.headed:
                break
        answers.append(told)
    return answers
