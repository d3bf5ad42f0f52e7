"""What may stand beside ``type`` and ``module_path`` in the configuration of a tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvdaemon.vllm.config import Place, checked


@dataclass(frozen=True)
class Options(Place):
    """What can be chosen. Times in milliseconds."""

    lookup_deadline_ms: int = 20
    """How long a lookup may be answered "ask again" before it counts as a miss."""
    load_deadline_ms: int = 2000
    """How long a load or a store may wait for its turn, and each of its calls for the daemon, before what is left of it fails."""
    threads: int = 2
    """Threads that copy, each over a session of its own."""

    @staticmethod
    def parse(given: dict[str, Any]) -> Options:
        """Checks names and types.

        Raises:
            ValueError: a key or a value is not right; the text says what would be.
        """
        return Options(**checked(Options, given, "the configuration of the secondary tier", "KvdSecondaryTier"))
