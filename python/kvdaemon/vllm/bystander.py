"""The connector for a vLLM that kvd does not know its way around in: it says so once, and the engine computes everything itself.

It has an answer for every hook that vLLM calls: vLLM's own default where there is one, else "nothing". What is deliberately absent: any
call of kvd's native halves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from kvdaemon.vllm import capabilities

ANSWERS: dict[str, Any] = {
    "get_num_new_matched_tokens": (0, False),
    "request_finished": (False, None),
    "request_finished_all_groups": (False, None),
    "get_finished": (None, None),
    "reset_cache": True,
    "has_pending_push_work": False,
    "requires_kv_delivery": False,
}
"""Hooks that are asked something. All others are told something, and give nothing back."""

MAY_BE_GONE = (
    "on_new_request",
    "update_connector_output",
    "register_kv_caches",
    "handle_preemptions",
    "get_handshake_metadata",
    "build_connector_worker_meta",
    "bind_connector_metadata",
    "clear_connector_metadata",
    "shutdown",
)
"""What a vLLM may call by its name and no longer define, or the other way round."""


def sentence(reason: str) -> str:
    """The one line."""
    return (
        f"kvd: KV blocks are neither stored nor loaded: this vLLM ({capabilities.version()}) is not one that kvd can serve, because "
        f"{reason}; kvd is tested with vLLM {capabilities.TESTED}"
    )


def _base() -> Any:
    """vLLM's module of connector classes.

    Raises:
        ImportError: there is none, so no connector at all can be given to this vLLM.
    """
    try:
        module = importlib.import_module(capabilities.BASE)
        module.KVConnectorBase_V1  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"kvdaemon.vllm needs vLLM {capabilities.TESTED}; vLLM {capabilities.version()} has no KVConnectorBase_V1 in "
            f"{capabilities.BASE} ({error})"
        ) from error
    return module


def _constant(name: str, value: Any) -> Callable[..., Any]:
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        return value

    hook.__name__ = name
    hook.__doc__ = "Nothing to do."
    return hook


def _load_errors(self: Any) -> set[int]:
    """No block failed: none was loaded."""
    return set()


def _metadata() -> Callable[[], Any]:
    """What makes an empty metadata object that a worker of either kind takes."""
    try:
        from kvdaemon.vllm.connector import KvdMetadata

        return lambda: KvdMetadata(b"")
    except Exception:
        kind = getattr(importlib.import_module(capabilities.BASE), "KVConnectorMetadata", object)
        # Pickled on its way to the workers, so it must be found by name.
        globals()["Metadata"] = type("Metadata", (kind,), {"__module__": __name__})
        return globals()["Metadata"]


def make(reason: str) -> type:
    """A connector class for this vLLM that keeps nothing.

    Raises:
        ImportError: this vLLM has no connectors.
    """
    module = _base()
    base = module.KVConnectorBase_V1
    parents = tuple(one for one in (base, getattr(module, "SupportsHMA", None)) if one is not None)
    metadata = _metadata()

    def begin(self: Any, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        try:
            base.__init__(self, vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        except TypeError:  # before 0.21
            base.__init__(self, vllm_config=vllm_config, role=role)
        # Once an engine, not once a worker.
        if getattr(role, "name", "") == "SCHEDULER":
            say(reason)

    body: dict[str, Any] = {
        "__doc__": "Keeps nothing.",
        "__module__": __name__,
        "__init__": begin,
        "build_connector_meta": lambda self, *args, **kwargs: metadata(),
        "get_block_ids_with_load_errors": _load_errors,
        "debug_stats": lambda self: {"config_refusal": reason},
    }
    for name, value in ANSWERS.items():
        hook = _constant(name, value)
        body[name] = property(hook) if name == "requires_kv_delivery" else hook
    unfinished = {name for one in parents for name in getattr(one, "__abstractmethods__", ())}
    absent = {name for name in MAY_BE_GONE if not hasattr(base, name)}
    for name in (unfinished | absent) - set(body):
        body[name] = _constant(name, None)
    return type("KvdConnector", parents, body)


def say(reason: str) -> None:
    """Says it in vLLM's log."""
    try:
        from vllm.logger import init_logger

        init_logger("vllm.kvdaemon").warning("%s", sentence(reason))
    except Exception:
        import logging

        logging.getLogger("vllm.kvdaemon").warning("%s", sentence(reason))
