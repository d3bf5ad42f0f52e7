"""Which class vLLM gets: the connector, where this vLLM has all that it hangs on, else a bystander.

The connector's class is made, and its objects too, only through here, so that a vLLM which is too new or too old costs one line in
the log and never an engine.
"""

from __future__ import annotations

from typing import Any

from kvdaemon.vllm import bystander, capabilities

FOREIGN = (AttributeError, ImportError, LookupError, NotImplementedError, TypeError)
"""What it looks like when vLLM's objects are not what they were. Wrong settings are ValueErrors and stay errors."""


def choose() -> type:
    """The class for `KvdConnector`.

    Raises:
        ImportError: this vLLM has no connectors, so there is no class to give to it.
    """
    reason = capabilities.lacking()
    if reason is not None:
        return bystander.make(reason)
    try:
        from kvdaemon.vllm import connector
    except FOREIGN as error:
        return bystander.make(f"the connector can't be loaded with it ({type(error).__name__}: {error})")
    reason = capabilities.misfit(connector.KvdConnector)
    return bystander.make(reason) if reason is not None else _careful(connector.KvdConnector)


def name_to_vllm() -> None:
    """A MultiConnector looks up the class of its children's stats by name alone."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        KVConnectorFactory.register_connector("KvdConnector", "kvdaemon.vllm", "KvdConnector")
    except (*FOREIGN, ValueError):  # there already; or there are no such names, and then no stats are shown
        pass


def _careful(real: Any) -> type:
    """The connector, whose objects become bystanders when they can't be made."""

    class KvdConnector(real):  # type: ignore[misc]
        __doc__ = real.__doc__

        def __new__(cls, vllm_config: Any, role: Any, kv_cache_config: Any) -> Any:
            try:
                # Not an object of this class, so that Python does not call __init__ again.
                return real(vllm_config, role, kv_cache_config)
            except FOREIGN as error:
                reason = f"the connector can't be made with it ({type(error).__name__}: {error})"
                return bystander.make(reason)(vllm_config, role, kv_cache_config)

    KvdConnector.__module__ = real.__module__
    KvdConnector.__qualname__ = real.__qualname__
    return KvdConnector
