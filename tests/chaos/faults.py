"""The schedule of a chaos run: which fault strikes when and whom. Made of a seed alone, so that it can be had again."""

from __future__ import annotations

import random
from dataclasses import dataclass

APIS = 2
WORKERS = 3
LEASE_S = 1.5


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; a method of `Cluster` bears its name."""

    at_s: float  # since the start of the load
    name: str
    target: int  # number of the process; for Redis 0
    lasts_s: float  # until it is undone; 0 if there is nothing to undo

    def __str__(self) -> str:
        return f"{self.at_s:7.2f} s  {self.name}({self.target}) for {self.lasts_s:.2f} s"


# Name, how many targets there are, how long it may last, and how often it is drawn.
_KINDS: tuple[tuple[str, int, tuple[float, float], int], ...] = (
    ("kill_worker", WORKERS, (0.1, 2.0), 4),
    ("pause_worker", WORKERS, (0.2, 0.7 * LEASE_S), 2),
    ("pause_worker", WORKERS, (1.3 * LEASE_S, 3 * LEASE_S), 3),
    ("stop_worker", WORKERS, (0.0, 0.5), 2),
    ("cut_off_worker", WORKERS, (0.3, 3 * LEASE_S), 2),
    ("kill_api", APIS, (0.1, 1.5), 2),
    ("stop_api", APIS, (0.0, 0.5), 1),
    ("cut_off_api", APIS, (0.3, 3.0), 2),
    ("kill_redis", 1, (0.1, 3.0), 3),
    ("pause_redis", 1, (0.2, 2.5), 1),
    ("kill_connections", 1, (0.0, 0.0), 3),
    ("cut_worker", WORKERS, (0.0, 0.0), 3),
    ("cut_api", APIS, (0.0, 0.0), 3),
    ("roll_workers", 1, (0.0, 0.0), 1),
)


def schedule(seed: int, seconds: float) -> list[Fault]:
    """The faults of the first `seconds`, in their order."""
    dice = random.Random(seed)
    faults: list[Fault] = []
    at_s = dice.uniform(0.3, 1.0)
    while at_s < seconds:
        name, targets, (shortest, longest), _ = dice.choices(_KINDS, weights=[kind[3] for kind in _KINDS])[0]
        faults.append(Fault(at_s, name, dice.randrange(targets), dice.uniform(shortest, longest)))
        # Now and then two at once.
        at_s += dice.uniform(0.0, 0.3) if dice.random() < 0.2 else dice.uniform(0.6, 2.5)
    return faults
