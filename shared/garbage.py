"""How often Python looks for garbage in a process that holds many streams."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 10_000  # Python's default is 700, which is what a few streams allocate and drop again in a moment


def collect_less() -> None:
    """Called once, when all is loaded: what is there stays, and the collector does not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
