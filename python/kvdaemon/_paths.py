"""Where things are by default: the same rules as the daemon's."""

from __future__ import annotations

import os


def runtime_dir() -> str:
    """The directory under which the daemon puts its sockets."""
    if chosen := os.environ.get("KVD_RUNTIME_DIR"):
        return chosen
    if os.path.isabs(runtime := os.environ.get("XDG_RUNTIME_DIR", "")):
        return os.path.join(runtime, "kvd")
    if os.access("/run", os.W_OK):
        return "/run/kvd"
    return f"/tmp/kvd-{os.getuid()}"


def default_socket() -> str:
    """The default tenant's socket."""
    return os.path.join(runtime_dir(), "default", "kvd.sock")


def cache_dir() -> str:
    """Where digests of weight files are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "kvd")
