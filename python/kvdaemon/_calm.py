"""Threads that don't push others aside.

A woken thread may take the CPU from the one that woke it: the engine's scheduler thread, in the middle of a hook. Linux does
not do that for threads of the batch policy; they run as soon as a CPU is free, and get the same share of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def calm_threads() -> Iterator[None]:
    """Threads started inside inherit the batch policy. Where that is not possible they are ordinary ones."""
    try:
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        if before[0] != os.SCHED_OTHER:
            raise OSError("not an ordinary thread")
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError):
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)
