"""The worker as arq's own command line starts it: `arq worker.settings.WorkerSettings`.

That command line always builds `arq.worker.Worker` and has no option for another class, so importing this module puts
ours in its place. `endmark worker` builds the same worker without the detour (worker/main.py). `arq --check` gets our
connections, too: arq's own know fewer URLs.
"""

from __future__ import annotations

import arq.worker
from arq.connections import ArqRedis
from arq.worker import func

from shared import logs, metrics, tracing
from shared.connection import connect
from shared.jobs import ARQ_FUNCTION
from shared.keys import Keys
from shared.settings import Settings
from worker.agents.load import load_agent
from worker.queue import QueueWorker, health_check_key, run_completion

_settings = Settings()


class WorkerSettings:
    """What arq's command line reads. All of it follows from the environment (docs/settings.md)."""

    functions = (func(run_completion, name=ARQ_FUNCTION),)
    queue_name = Keys(_settings.prefix).queue
    health_check_key = health_check_key(_settings)


class _ArqCommandLineWorker(QueueWorker):
    """Takes what arq's command line passes: `--burst`, and the attributes above, which follow from the environment."""

    def __init__(
        self,
        *,
        functions: object,  # noqa: ARG002  # arq passes only what the signature names, and `arq --check` needs it passed
        queue_name: object,  # noqa: ARG002
        health_check_key: object,  # noqa: ARG002
        burst: bool = False,
    ) -> None:
        logs.configure(_settings)
        tracing.configure("endmark-worker")
        if _settings.metrics_port:
            metrics.serve(_settings.metrics_host, _settings.metrics_port)
        super().__init__(_settings, load_agent(_settings), burst=burst)


async def _create_pool(_: object) -> ArqRedis:
    return connect(_settings)


arq.worker.create_pool = _create_pool  # type: ignore[assignment,attr-defined]  # see the module's docstring
arq.worker.Worker = _ArqCommandLineWorker  # type: ignore[assignment,misc]  # see the module's docstring
