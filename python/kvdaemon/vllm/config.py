"""The keys of ``kv_connector_extra_config``. An unknown key is an error that lists the known ones."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from kvdaemon._paths import default_socket

LAYOUTS = ("LBHNC", "BLHNC")


@dataclass(frozen=True)
class Place:
    """Where the daemon is, and who asks: of everything that attaches for an engine."""

    socket: str = ""
    """Path of the daemon's socket for this tenant; empty: where ``kvd serve`` puts it by default."""
    tenant: str = "default"
    """Name of the tenant that the socket belongs to."""
    weights_id: str = ""
    """Names the weights, where kvd can't find out what they are (dummy, streamed, unknown loaders)."""
    label: str = ""
    """Shown by ``kvd status``."""

    @property
    def socket_path(self) -> str:
        """The socket to use."""
        return self.socket or default_socket()


@dataclass(frozen=True)
class Config(Place):
    """What can be chosen. Times in milliseconds."""

    layout: str = "LBHNC"
    """KV-cache layout to ask vLLM for; ``BLHNC`` makes a block one piece where the attention backend can."""
    lookup_deadline_ms: int = 20
    """How long a request may wait for the answer to its lookup."""
    startup_deadline_ms: int = 1000
    """How long the first requests may wait until all workers have said what they hold."""
    share_deadline_ms: int = 10_000
    """How long a request may wait for another request's load of the same blocks."""
    hold_deadline_ms: int = 1000
    """How long the blocks of a finished request may be held until their slots are there."""
    load_deadline_ms: int = 2000
    """How long the daemon may take to begin or to go on with a load before the rest of it is recomputed."""
    lease_ms: int = 10_000
    """How long the daemon keeps for a waiting request what its lookup found."""
    copy_threads: int = 2
    """Threads of each worker that copy out, and as many that copy in."""
    max_in_flight: int = 4096
    """Most blocks reserved or being copied out at a time."""

    @staticmethod
    def parse(extra: dict[str, Any]) -> Config:
        """Checks names and types.

        Raises:
            ValueError: a key or a value is not right; the text says what would be.
        """
        config = Config(**checked(Config, extra, "kv_connector_extra_config", "KvdConnector"))
        if config.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {config.layout!r}")
        return config


def checked(kind: type, given: dict[str, Any], where: str, who: str) -> dict[str, Any]:
    """Values for the fields of the dataclass `kind`, all of which have defaults: texts and positive numbers.

    Raises:
        ValueError: a key or a value is not right; the text says what would be.
    """
    known = {field.name: type(field.default) for field in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{where} has the unknown key {name!r}; {who} knows {', '.join(sorted(known))}")
        wanted = known[name]
        if wanted is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if type(value) is not wanted:
            raise ValueError(f"{where}[{name!r}] must be a {wanted.__name__}, not {value!r}")
        if wanted is int and value <= 0:
            raise ValueError(f"{where}[{name!r}] must be positive, not {value}")
        values[name] = value
    return values
