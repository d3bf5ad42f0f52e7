"""What the installed vLLM offers to a connector: found by looking, never by comparing version numbers.

Two questions. What must be there for kvd to keep anything (`lacking` before the connector is imported, `misfit` once its class
exists), and what may be there (`found`). An answer to the first is a sentence; with it the engine is served by a bystander.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from typing import Any

TESTED = "0.30 to 0.33"
"""Versions that the conformance suite ran with. For people to read; nothing is decided by it."""

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
SPECS = "vllm.v1.kv_cache_interface"

NAMES: dict[str, tuple[str, ...]] = {
    BASE: (
        "KVConnectorBase_V1",
        "KVConnectorHandshakeMetadata",
        "KVConnectorMetadata",
        "KVConnectorRole",
        "KVConnectorTransferResults",
        "KVConnectorWorkerMetadata",
        "SupportsHMA",
    ),
    SPECS: ("FullAttentionSpec", "KVCacheConfig"),
    "vllm.v1.core.kv_cache_utils": ("make_block_hash_with_group_id",),
}
"""Modules, and names in them, that the connector is built from."""

FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": ("scheduled_new_reqs", "scheduled_cached_reqs", "preempted_req_ids", "num_scheduled_tokens"),
        "NewRequestData": ("req_id", "num_computed_tokens"),
        "CachedRequestData": ("req_ids", "num_computed_tokens"),
    },
    "vllm.v1.outputs": {
        "KVConnectorOutput": (
            "finished_sending",
            "finished_recving",
            "failed_recving",
            "invalid_block_ids",
            "kv_connector_worker_meta",
        ),
    },
    SPECS: {"KVCacheConfig": ("num_blocks", "kv_cache_groups"), "KVCacheGroupSpec": ("layer_names", "kv_cache_spec")},
    "vllm.v1.core.block_pool": {"BlockPool": ("blocks", "num_gpu_blocks", "touch", "free_blocks")},
    "vllm.v1.core.kv_cache_utils": {"KVCacheBlock": ("block_hash", "block_id")},
    "vllm.v1.core.kv_cache_manager": {"KVCacheManager": ("get_blocks",)},
    "vllm.v1.request": {
        "Request": ("request_id", "block_hashes", "num_tokens", "num_computed_tokens", "lora_request"),
    },
}
"""What the connector reads of the objects that vLLM hands to it."""

HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "reset_cache",
    "has_pending_push_work",
    "bind_gpu_block_pool",
    "register_kv_caches",
    "handle_preemptions",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_save",
    "get_transfer_results",
    "get_finished",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
)
"""Hooks without which blocks would be kept wrongly, or not at all: vLLM must know them by these names."""

PLAIN_SPECS = {
    "full": ("FullAttentionSpec", "MLAAttentionSpec"),
    "sliding_window": ("SlidingWindowSpec",),
    "state": ("MambaSpec",),
}
"""Classes of KV caches by what a hit needs of them. Others are derived from these, and their cells mean something else."""


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What may be there."""

    sleep_hooks: bool
    """vLLM says when the KV cache goes and comes back, so that sleep mode can be served."""
    named_layouts: bool
    """KV-cache layouts have names for five dimensions; before, one of two orders was asked for."""
    block_state: bool
    """The scheduler's output tells which blocks a running request has."""
    public_hash_seed: bool
    """The seed of block hashes can be told before the first request."""
    stated_hash_size: bool
    """The KV-cache configuration says how many tokens a block hash covers."""
    hash_lookahead: bool
    """Block hashes may cover tokens after their block."""
    eagle_block_drop: bool
    """The speculative configuration says whether the last block of a hit must be dropped."""
    states_offered: bool
    """The scheduler's output offers recurrent states that a step leaves in blocks of their own."""
    cache_hit_sources: bool
    """Hits are counted by where they came from."""


def version() -> str:
    """For messages only."""
    try:
        import vllm

        return str(getattr(vllm, "__version__", "of an unknown version"))
    except Exception:
        return "of an unknown version"


@functools.cache
def found() -> Capabilities:
    """What may be there, of this vLLM."""
    base = _get(BASE, "KVConnectorBase_V1")
    return Capabilities(
        sleep_hooks=hasattr(base, "unregister_kv_caches") and hasattr(base, "restore_kv_caches"),
        named_layouts=_get(SPECS, "KVCacheLayout") is not None,
        block_state=has_field(_get("vllm.v1.core.sched.output", "SchedulerOutput"), "kv_connector_block_state"),
        public_hash_seed=_get("vllm.v1.core.kv_cache_utils", "resolve_none_hash_seed") is not None,
        stated_hash_size=has_field(_get(SPECS, "KVCacheConfig"), "hash_block_size"),
        hash_lookahead=has_field(_get("vllm.config", "VllmConfig"), "num_hash_lookahead_tokens"),
        eagle_block_drop=has_field(_get("vllm.config", "SpeculativeConfig"), "use_eagle_block_drop"),
        states_offered=has_field(_get("vllm.v1.core.sched.output", "KVConnectorBlockState"), "boundary_state_offloads"),
        cache_hit_sources=hasattr(base, "get_external_cache_hit_sources"),
    )


def drops_last(vllm_config: Any) -> bool:
    """Whether the last block of a hit depends on the token after it: drafters with KV of their own read one ahead, and
    hashes that cover that token (0.33) make up for it."""
    if getattr(vllm_config, "num_hash_lookahead_tokens", 0):
        return False
    speculative = getattr(vllm_config, "speculative_config", None)
    for name in ("use_eagle_block_drop", "use_eagle"):
        if (ask := getattr(speculative, name, None)) is not None:
            return bool(ask())
    return False


def none_hash(vllm_config: Any) -> bytes | None:
    """The hash that begins every chain, once vLLM has chosen it, or before if it is no secret."""
    from vllm.v1.core import kv_cache_utils

    if (known := getattr(kv_cache_utils, "NONE_HASH", None)) is not None:
        return bytes(known)
    resolve = getattr(kv_cache_utils, "resolve_none_hash_seed", None)
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if resolve is None or not algorithm.startswith("sha256"):
        return None
    from vllm.utils.hashing import get_hash_fn_by_name

    function = get_hash_fn_by_name(algorithm)
    return bytes(function(resolve(function)))


def is_alone(connector: Any) -> bool:
    """Whether vLLM talks to this connector itself. A MultiConnector gives one child's handshake metadata to all, and
    others refuse what is not theirs; the same is said with the first step's report then."""
    from vllm.distributed import kv_transfer

    has = getattr(kv_transfer, "has_kv_transfer_group", None)
    return has is None or not has() or kv_transfer.get_kv_transfer_group() is connector


def spec_kind(specs: list[Any]) -> str | None:
    """What a hit needs of the layers with these specs; None where that is not known of one of them, or not the same for all."""
    for kind, names in PLAIN_SPECS.items():
        classes = [_get(SPECS, name) for name in names]
        if specs and all(type(one) in classes for one in specs):
            return kind
    return None


def is_latent(spec: Any) -> bool:
    """Whether the layer keeps what all heads share (MLA, and the keys of an indexer beside it): every worker has all of it."""
    return type(spec) is _get(SPECS, "MLAAttentionSpec")


def hash_tokens(vllm_config: Any, kv_cache_config: Any) -> int | None:
    """How many tokens a block hash covers: what the configuration says, else (before 0.32) what vLLM itself would work out from it.
    With several KV-cache groups that is not always what their block sizes have in common."""
    stated = getattr(kv_cache_config, "hash_block_size", None)
    if stated:
        return int(stated)
    resolve = _get("vllm.v1.core.kv_cache_utils", "resolve_kv_cache_block_sizes")
    return int(resolve(kv_cache_config, vllm_config)[1]) if resolve is not None else None


def hit_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    """Hits of vLLM's own cache are multiples of so many tokens: what the configuration says (0.32), else as little as a hash covers."""
    return int(getattr(kv_cache_config, "cache_hit_alignment_tokens", None) or hash_tokens(vllm_config, kv_cache_config) or 1)


def lacking() -> str | None:
    """What is not there that the connector can't do without; before it is imported."""
    for module, names in NAMES.items():
        for name in names:
            if _get(module, name) is None:
                return f"it has no {name} in {module}"
    for module, classes in FIELDS.items():
        for name, fields in classes.items():
            kind = _get(module, name)
            if kind is None:
                return f"it has no {name} in {module}"
            for field in fields:
                if not has_field(kind, field):
                    return f"its {name} has no {field}"
    output, base = _get("vllm.v1.core.sched.output", "SchedulerOutput"), _get(BASE, "KVConnectorBase_V1")
    if not has_field(output, "kv_connector_block_state") and not hasattr(base, "bind_kv_cache_manager"):
        return "it does not tell which blocks a running request has"
    return None


def misfit(connector: type) -> str | None:
    """Why vLLM could not work with this class of connector."""
    base = _get(BASE, "KVConnectorBase_V1")
    for hook in HOOKS:
        if not hasattr(base, hook):
            return f"its connectors have no hook {hook}"
    unknown = sorted(getattr(connector, "__abstractmethods__", ()))
    if unknown:
        return f"it asks for hooks that kvd does not know: {', '.join(unknown)}"
    for name, ours in vars(connector).items():
        theirs = getattr(base, name, None)
        if name == "__init__" or not name.startswith("_"):
            if inspect.isfunction(ours) and inspect.isfunction(theirs) and not _takes(ours, theirs):
                return f"its hook {name} takes {_names(theirs)}, not {_names(ours)}"
    return None


def _get(module: str, name: str) -> Any:
    """The thing, or None. What breaks while a module is imported is as good as absent."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:
        return None


def has_field(kind: Any, name: str) -> bool:
    """Whether objects of a class have this attribute: declared, defined, or set when they are made."""
    if kind is None:
        return False
    for one in getattr(kind, "__mro__", ()):
        if name in vars(one) or name in vars(one).get("__annotations__", {}):
            return True
        code = getattr(vars(one).get("__init__"), "__code__", None)
        if code is not None and name in code.co_names:
            return True
    return False


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[1:]


def _names(function: Any) -> str:
    return f"({', '.join(str(one).split(':')[0].split('=')[0].strip() for one in _parameters(function))})"


def _takes(ours: Any, theirs: Any) -> bool:
    """Whether whoever calls `theirs` may call `ours`: the same parameters in the same places, none missing."""
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    mine = _parameters(ours)
    plain = [one for one in mine if one.kind not in many]
    extra = len(mine) > len(plain)
    asked = [one for one in _parameters(theirs) if one.kind not in many]
    if [one.name for one in asked[: len(plain)]] != [one.name for one in plain[: len(asked)]]:
        return False
    if len(asked) > len(plain):
        return extra
    return all(one.default is not inspect.Parameter.empty for one in plain[len(asked) :])
