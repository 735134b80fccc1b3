"""`endmark worker`: one worker process."""

from __future__ import annotations

from shared import logs, metrics, tracing
from shared.settings import Settings
from worker.agents.load import load_agent
from worker.queue import QueueWorker


def run() -> None:
    """Runs a worker until it is told to stop: SIGTERM or SIGINT drains it, a second one stops it now.

    Raises AgentLoadError if the agent cannot be built, and one of shared.connection.FAILURES if Redis does not
    answer at the start.
    """
    settings = Settings()
    logs.configure(settings)
    tracing.configure("endmark-worker")
    worker = QueueWorker(settings, load_agent(settings))
    if settings.metrics_port:
        metrics.serve(settings.metrics_host, settings.metrics_port)
    try:
        worker.run()
    finally:
        tracing.flush()
