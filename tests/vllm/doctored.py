"""A vLLM that is not what it is: `apply` changes the installed one's connector interface as other versions might have it.

Also a connector module to name in `kv_connector_module_path`: it applies what KVD_TEST_DOCTOR names (in the engine's own process), then
gives vLLM our connector as a user would have got it.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable
from typing import Any

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"


def _base() -> Any:
    import importlib

    return importlib.import_module(BASE)


def _hook_renamed(put: Callable[..., None]) -> None:
    """What workers report their finished transfers with has another name."""
    kind = _base().KVConnectorBase_V1
    put(kind, "get_finished_requests", kind.get_finished)
    put(kind, "get_finished")


def _hook_takes_more(put: Callable[..., None]) -> None:
    def update_state_after_alloc(self: Any, request: Any, blocks: Any, num_external_tokens: int, group: int) -> None: ...

    put(_base().KVConnectorBase_V1, "update_state_after_alloc", update_state_after_alloc)


def _hook_asked_for(put: Callable[..., None]) -> None:
    """One more that every connector must have."""

    @abc.abstractmethod
    def announce(self: Any) -> None: ...

    kind = _base().KVConnectorBase_V1
    put(kind, "announce", announce)
    put(kind, "__abstractmethods__", kind.__abstractmethods__ | {"announce"})


def _class_gone(put: Callable[..., None]) -> None:
    """As before 0.18."""
    put(_base(), "KVConnectorWorkerMetadata")


def _field_gone(put: Callable[..., None]) -> None:
    from vllm.v1.core.sched import output

    put(output, "CachedRequestData", type("CachedRequestData", (), {"__annotations__": {"req_ids": "list[str]"}}))


CHANGES: dict[str, tuple[Callable[..., None], str]] = {
    "hook renamed": (_hook_renamed, "no hook get_finished"),
    "hook takes more": (_hook_takes_more, "its hook update_state_after_alloc takes"),
    "hook asked for": (_hook_asked_for, "announce"),
    "class gone": (_class_gone, "no KVConnectorWorkerMetadata"),
    "field gone": (_field_gone, "CachedRequestData has no num_computed_tokens"),
}
"""Name, what it does, and what the one line must say."""


def _put(owner: Any, name: str, *value: Any) -> None:
    if value:
        setattr(owner, name, value[0])
    else:
        delattr(owner, name)


if __name__ == "doctored":
    chosen = os.environ.get("KVD_TEST_DOCTOR")
    if chosen:
        CHANGES[chosen][0](_put)
        from kvdaemon.vllm import KvdConnector  # noqa: F401
