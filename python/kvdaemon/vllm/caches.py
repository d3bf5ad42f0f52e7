"""What a worker holds: the tensors of its KV cache as addresses and strides, its share of every block, and what the bytes
of a cell mean. Nothing is assumed: whatever this module does not know how to read becomes a refusal with a reason."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


PLAIN = ("auto", "bfloat16", "float16", "float32")
"""KV dtypes without scales."""


class Refusal(Exception):
    """Why this worker neither stores nor loads."""


@dataclass
class Share:
    """What one worker holds of each block of its one KV-cache group."""

    layers: list[tuple[int, int, int, int, int]]
    """Per layer: address, length, and strides from page to page, head to head, token to token, in bytes."""
    tensors: list[torch.Tensor]
    layer_names: list[str]
    kind: str
    head_first: int
    heads: int
    heads_total: int
    block_tokens: int
    page_tokens: int
    cell_bytes: int
    encoding: str
    scales: str
    blocks: int = 0
    device: str = "cpu"
    """Where the tensors are: ``cpu`` or ``cuda:N``."""
    extra: dict[str, Any] = field(default_factory=dict)


def refuse_config(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Why a configuration as a whole is not served; known in the scheduler and in the workers alike."""
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"context parallelism ({name}) is not supported"
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"models with {len(groups)} KV-cache groups are not supported yet"
    kind = _kind(groups[0].kv_cache_spec)
    if kind != "full":
        return f"KV caches of the kind {type(groups[0].kv_cache_spec).__name__} are not supported yet"
    if getattr(vllm_config.model_config, "enable_sleep_mode", False) and not _says_when_it_sleeps():
        return "sleep mode is not supported with this vLLM: it does not say when the KV cache goes (0.33 does)"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "KV scales that are computed while serving (calculate_kv_scales) are not supported"
    return None


def _says_when_it_sleeps() -> bool:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    return hasattr(KVConnectorBase_V1, "unregister_kv_caches")


def _kind(spec: Any) -> str:
    """`full`, or the name of what it is instead."""
    from vllm.v1 import kv_cache_interface as kvi

    inner = list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]
    full = getattr(kvi, "FullAttentionSpec")
    odd = tuple(
        getattr(kvi, name)
        for name in ("SinkFullAttentionSpec", "RSWASpec", "HiddenStateCacheSpec")
        if hasattr(kvi, name)
    )
    if all(isinstance(one, full) and not isinstance(one, odd) for one in inner):
        return "full"
    return type(inner[0]).__name__


def read(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kv_caches: dict[str, torch.Tensor]
) -> Share:
    """What this worker holds.

    Raises:
        Refusal: something about it is not understood.
    """
    group = kv_cache_config.kv_cache_groups[0]
    names = _layer_order(group.layer_names, kv_caches)
    tensors = [kv_caches[name] for name in names]
    blocks = kv_cache_config.num_blocks
    spec = group.kv_cache_spec
    block_tokens = spec.block_size
    first = tensors[0]
    for name, tensor in zip(names, tensors):
        _check(name, tensor, first)
    pages, heads, page_tokens, _ = first.shape
    if pages % blocks or (pages // blocks) * page_tokens != block_tokens:
        raise Refusal(
            f"{pages} pages of {page_tokens} tokens do not make {blocks} blocks of {block_tokens} tokens"
        )
    head_first, heads_total = _heads(vllm_config, kv_cache_config, heads)
    return Share(
        layers=[_layer(tensor) for tensor in tensors],
        tensors=tensors,
        layer_names=names,
        kind="full",
        head_first=head_first,
        heads=heads,
        heads_total=heads_total,
        block_tokens=block_tokens,
        page_tokens=page_tokens,
        cell_bytes=first.shape[3] * first.element_size(),
        encoding=_encoding(vllm_config, names, page_tokens),
        scales=_scales(vllm_config, names),
        blocks=blocks,
        device=_device(first.device),
    )


def _device(device: torch.device) -> str:
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type


def stream_of(share: Share) -> Callable[[], int] | None:
    """What gives the handle of the stream that the framework computes on now; nothing where it has none."""
    if not share.device.startswith("cuda"):
        return None
    device = torch.device(share.device)
    return lambda: torch.cuda.current_stream(device).cuda_stream


def stream(share: Share) -> int:
    """That handle; 0 where there is none."""
    handle = stream_of(share)
    return handle() if handle else 0


def _layer_order(names: list[str], kv_caches: dict[str, torch.Tensor]) -> list[str]:
    """The group's layers by number, without those that only share another layer's cache."""
    missing = [name for name in names if name not in kv_caches]
    if missing:
        raise Refusal(f"layer {missing[0]} has no KV cache in this worker")

    def number(name: str) -> tuple[list[int], str]:
        return [int(digits) for digits in re.findall(r"\d+", name)], name

    seen: set[int] = set()
    kept = []
    for name in sorted(set(names), key=number):
        address = kv_caches[name].data_ptr()
        if address not in seen:
            seen.add(address)
            kept.append(name)
    return kept


def _check(name: str, tensor: torch.Tensor, first: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
        raise Refusal(f"the KV cache of layer {name} is no tensor of [block, head, token, cell]")
    if tensor.shape != first.shape or tensor.dtype != first.dtype:
        raise Refusal(f"the KV cache of layer {name} differs in shape from that of the first layer")
    if tensor.stride(3) != 1:
        raise Refusal(f"the cells of layer {name} are not contiguous")
    if tensor.device != first.device:
        raise Refusal(f"the KV cache of layer {name} is on {tensor.device}, that of the first layer on {first.device}")
    if tensor.device.type not in ("cpu", "cuda") or torch.version.hip:
        raise Refusal(f"KV caches on {tensor.device.type}{' (ROCm)' if torch.version.hip else ''} are not supported yet")


def _layer(tensor: torch.Tensor) -> tuple[int, int, int, int, int]:
    size = tensor.element_size()
    length = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) + 1
    block, head, token, _ = (stride * size for stride in tensor.stride())
    return tensor.data_ptr(), length * size, block, head, token


def _heads(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, heads: int) -> tuple[int, int]:
    """First KV head of this worker, and all KV heads of a layer."""
    from vllm.distributed import get_tensor_model_parallel_rank

    size = vllm_config.parallel_config.tensor_parallel_size
    rank = get_tensor_model_parallel_rank() if size > 1 else 0
    if getattr(vllm_config.model_config, "use_mla", False):
        return 0, heads
    total = vllm_config.model_config.get_total_num_kv_heads()
    if size == 1:
        if heads != total:
            raise Refusal(f"the KV cache has {heads} heads and the model {total}")
        return 0, heads
    if total >= size:
        if total % size or heads != total // size:
            raise Refusal(f"{total} KV heads on {size} workers do not make {heads} each")
        return rank * heads, total
    if size % total or heads != 1:
        raise Refusal(f"{total} KV heads on {size} workers do not make replicas of one head")
    return rank // (size // total), total


def _layer_object(vllm_config: VllmConfig, name: str) -> Any:
    return vllm_config.compilation_config.static_forward_context.get(name)


def _backend(vllm_config: VllmConfig, name: str) -> str:
    layer = _layer_object(vllm_config, name)
    for attribute in ("get_attn_backend", "attn_backend"):
        backend = getattr(layer, attribute, None)
        if backend is None:
            continue
        if attribute == "get_attn_backend":
            backend = backend()
        return str(backend.get_name())
    raise Refusal(f"the attention backend of layer {name} is not known")


def _encoding(vllm_config: VllmConfig, names: list[str], page_tokens: int) -> str:
    """What the bytes of a page mean. Two encodings that may differ in any way have different names."""
    backends = {_backend(vllm_config, name) for name in names}
    if len(backends) != 1:
        raise Refusal(f"layers with different attention backends: {', '.join(sorted(backends))}")
    (backend,) = backends
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if backend == "CPU_ATTN":
        # Pages of K rows, then V rows; K packed for the kernel that the ISA selects.
        isas = {str(getattr(_layer_object(vllm_config, name), "isa", "?")) for name in names}
        return f"cpu_attn:1:isa={'+'.join(sorted(isas))}:{_vectors()}:{dtype}:page={page_tokens}"
    if backend == "CPU_MLA":
        return "mla:1:latent+rope"
    if backend == "FLASH_ATTN":
        return "kv:1:k|v"
    return f"opaque:{backend}:vllm={_version()}:{_machine()}:page={page_tokens}"


def machine_id() -> str:
    """Names this boot of this machine: workers with different ones share no daemon."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _vectors() -> str:
    """The vector unit that the packing may depend on."""
    machine = platform.machine()
    if machine != "x86_64":
        return machine
    wide = torch.cpu._is_avx512_supported()
    return "x86-avx512" if wide else "x86-avx2"


def _machine() -> str:
    return f"{platform.machine()}/{platform.processor() or '-'}"


def _version() -> str:
    import vllm

    return str(getattr(vllm, "__version__", "?"))


def _scales(vllm_config: VllmConfig, names: list[str]) -> str:
    """The KV scales of each layer, as text; empty where the KV cache is not quantised."""
    if str(vllm_config.cache_config.cache_dtype) in PLAIN:
        return ""
    lines = []
    for name in names:
        layer = _layer_object(vllm_config, name)
        key, value = (getattr(layer, f"_{which}_scale_float", None) for which in "kv")
        if key is None or value is None:
            raise Refusal(f"the KV scales of layer {name} are not known")
        lines.append(f"{name}={float(key)!r},{float(value)!r}")
    return ";".join(lines)
