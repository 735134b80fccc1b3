"""The agents a worker can run, each behind the contract of `worker.agents.contract`."""
