"""What a worker holds: the tensors of its KV cache as addresses and strides, its share of every block, and what the bytes
of a cell mean. Nothing is assumed: whatever this module does not know how to read becomes a refusal with a reason."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvdaemon._native import KvCache
from kvdaemon.vllm import capabilities

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


PLAIN = ("auto", "bfloat16", "float16", "float32")
"""KV dtypes without scales."""

OWN_SCALES = ("DeepseekV32IndexerCache",)
"""Layers whose cells hold their scales, whatever the KV dtype of the others."""
HEADS_OF_A_LAYER = re.compile(r"(kv|key_value)_heads|heads_in_group")
"""What configurations of models call their KV heads, of all layers or of some."""


class Refusal(Exception):
    """Why this worker neither stores nor loads."""


@dataclass
class Rule:
    """What a hit needs of a KV-cache group of ours; known in the scheduler and in the workers alike."""

    kind: str
    """``full``, ``sliding_window`` or ``state``."""
    block_tokens: int
    """Tokens that a block spans."""
    window: int = 0
    """Tokens that a token looks at, itself included; 0: no window."""
    offered: bool = False
    """vLLM offers the blocks one by one: their place in a request's list says nothing."""
    of: int = 0
    """vLLM's number of the group. Where its layers differ in size, it is several of ours: see `_alike`."""

    @property
    def outgrown(self) -> bool:
        """Whether a running request gives up blocks that it needs no more."""
        return self.kind != "full"


@dataclass
class Share:
    """What one worker holds of each block of a KV-cache group."""

    layers: list[tuple[int, int, int, int, int]]
    """Per layer: address, length, and strides from page to page, head to head, token to token, in bytes."""
    tensors: list[torch.Tensor]
    layer_names: list[str]
    kind: str
    head_first: int
    heads: int
    heads_total: int
    block_tokens: int
    """Tokens that a block spans."""
    cells: int
    """Cells of a head in a block: one a token, or a single one for a state."""
    page_tokens: int
    """Of those, how many a page of the tensor has."""
    cell_bytes: int
    window: int
    encoding: str
    scales: str
    blocks: int = 0
    device: str = "cpu"
    """Where the tensors are: ``cpu`` or ``cuda:N``."""
    cache: KvCache | None = None


def refuse_config(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Why a configuration as a whole is not served; known in the scheduler and in the workers alike."""
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"context parallelism ({name}) is not supported"
    try:
        if not rules(kv_cache_config):
            return "the model has no KV cache"
    except Refusal as refusal:
        return str(refusal)
    if not getattr(vllm_config.cache_config, "enable_prefix_caching", True) and len(kv_cache_config.kv_cache_groups) > 1:
        return "models with several KV-cache groups are supported only with vLLM's prefix caching"
    if getattr(vllm_config.model_config, "enable_sleep_mode", False) and not capabilities.found().sleep_hooks:
        return "sleep mode is not supported with this vLLM: it does not say when the KV cache goes (0.33 does)"
    return refuse_wrong_kv(vllm_config, kv_cache_config)


def as_scheduled(kv_cache_config: KVCacheConfig) -> KVCacheConfig:
    """What vLLM tells the scheduler of a worker's KV cache: of each group one layer's spec."""
    groups = [replace(group, kv_cache_spec=inner_specs(group.kv_cache_spec)[0]) for group in kv_cache_config.kv_cache_groups]
    return replace(kv_cache_config, kv_cache_groups=groups)


def refuse_wrong_kv(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None) -> str | None:
    """Why what an engine computes must not be kept for others, however it is laid out. (A tier may not find the configuration of the KV cache.)"""
    return (
        refuse_hits_within_blocks(vllm_config, kv_cache_config)
        or refuse_drafts_beyond_blocks(vllm_config, kv_cache_config)
        or refuse_scales(vllm_config)
    )


def refuse_hits_within_blocks(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None) -> str | None:
    """Why the KV of an engine must not be kept where vLLM lets a prompt go on from within a block of states: it copies that block for
    each such request, all copies of a step at once (`copy_kv_cache_blocks_inplace`, 0.32), and one that is copied on in the step in
    which it is filled is read before. What is computed from it is wrong, with and without a connector."""
    chosen = getattr(vllm_config.cache_config, "prefix_match_unit", None)
    spread = getattr(vllm_config.parallel_config, "decode_context_parallel_size", 1) > 1
    if kv_cache_config is None:
        within = chosen is not None and getattr(vllm_config.cache_config, "mamba_cache_mode", "none") == "align"
    else:
        states = _state_blocks(kv_cache_config)
        within = bool(states) and (spread or capabilities.hit_tokens(vllm_config, kv_cache_config) < max(states))
    if not within:
        return None
    cause = "context parallelism does that" if spread else "its KV-cache groups have blocks of different sizes"
    cause = "unset prefix_match_unit" if chosen is not None else cause
    return f"vLLM goes on from within blocks of recurrent states, and copies wrong ones where several requests do so in one step: {cause}"


def refuse_drafts_beyond_blocks(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None) -> str | None:
    """Why the states of an engine must not be kept whose steps may pass a whole block: a block of drafts that vLLM moves to the end of its
    list is still in its old place in the workers', which copy a state there that belongs to another token (0.32; no step with
    drafts does where they are fewer than a block's tokens)."""
    cache = vllm_config.cache_config
    if kv_cache_config is None:
        aligned = getattr(cache, "mamba_cache_mode", "none") == "align"
        blocks = [getattr(cache, "mamba_block_size", None) or 0] if aligned else []
    else:
        blocks = _state_blocks(kv_cache_config)
    drafts = getattr(getattr(vllm_config, "speculative_config", None), "num_speculative_tokens", None) or 0
    if not blocks or not 0 < min(blocks) <= drafts:
        return None
    return (
        f"vLLM mixes up recurrent states where a step has as many drafts ({drafts}) as their blocks have tokens ({min(blocks)}): "
        "set num_speculative_tokens to less"
    )


def refuse_scales(vllm_config: VllmConfig) -> str | None:
    """Why KV that is scaled by what was served so far must not be kept."""
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "KV scales that are computed while serving (calculate_kv_scales) are not supported"
    return None


def inner_specs(spec: Any) -> list[Any]:
    """The specs of a group's layers, where they differ in size; else the one of all."""
    return list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]


def _specs(kv_cache_config: KVCacheConfig) -> list[Any]:
    return [one for group in kv_cache_config.kv_cache_groups for one in inner_specs(group.kv_cache_spec)]


def _state_blocks(kv_cache_config: KVCacheConfig) -> list[int]:
    """How many tokens a block has, of each layer whose recurrent states are kept at the ends of blocks."""
    return [one.block_size for one in _specs(kv_cache_config) if getattr(one, "mamba_cache_mode", None) == "align"]


def kv_dtype(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """How the KV cache keeps numbers: what was chosen, and what is stored."""
    stored = next((str(one.dtype) for one in _specs(kv_cache_config) if hasattr(one, "dtype")), "-").removeprefix("torch.")
    chosen = str(vllm_config.cache_config.cache_dtype)
    return stored if chosen == "auto" else f"{chosen}/{stored}"


def rules(kv_cache_config: KVCacheConfig) -> list[Rule]:
    """What a hit needs of each group.

    Raises:
        Refusal: vLLM keeps something in a way that this module does not know.
    """
    numbered = enumerate(kv_cache_config.kv_cache_groups)
    return [replace(_rule(group.kv_cache_spec), of=number) for number, group in numbered for _ in _alike(kv_cache_config, group)[0]]


def _alike(kv_cache_config: KVCacheConfig, group: Any) -> tuple[list[list[str]], list[str]]:
    """The layers of one of vLLM's groups that have pages of one size, together, by number; those with the first layer first. Each lot is a
    group of ours: they share blocks and hashes. And the layers that have no place in the KV cache: what they use is another's.

    Sizes are told apart by where vLLM places layers, which it tells the scheduler and the workers; their specs it tells only the latter.

    Raises:
        Refusal: it has no layers here, so that groups would be numbered otherwise than by others.
    """
    if not group.layer_names:
        raise Refusal("a KV-cache group has no layers in one of the pipeline stages")
    placed = {
        name: (tensor.layer_stride, tensor.block_stride)
        for tensor in getattr(kv_cache_config, "kv_cache_tensors", ())
        for name in getattr(tensor, "layers", ())
    }
    lots: dict[Any, list[str]] = {}
    for name in sorted(set(group.layer_names), key=_number):
        lots.setdefault(placed.get(name), []).append(name)
    others = lots.pop(None, []) if len(lots) > 1 else []
    return list(lots.values()), others


def _number(name: str) -> tuple[list[int], str]:
    """Orders layers by number."""
    return [int(digits) for digits in re.findall(r"\d+", name)], name


def _rule(spec: Any) -> Rule:
    inner = inner_specs(spec)
    kind = capabilities.spec_kind(inner)
    if kind == "full":
        return Rule("full", spec.block_size)
    if kind == "sliding_window":
        windows = {one.sliding_window + getattr(one, "extra_retained_tokens", 0) for one in inner}
        if len(windows) == 1:
            return Rule("sliding_window", spec.block_size, windows.pop())
    if kind == "state":
        modes = {getattr(one, "mamba_cache_mode", "none") for one in inner}
        if modes == {"all"} or modes == {"align"}:
            return Rule("state", spec.block_size, offered=modes == {"align"})
        raise Refusal(f"recurrent states are kept only at the end of a request (mamba_cache_mode {'/'.join(sorted(modes))})")
    unknown = [one for one in inner if capabilities.spec_kind([one]) is None]
    kinds = sorted({type(one).__name__ for one in unknown or inner})
    raise Refusal(f"KV caches of the kind {' beside '.join(kinds)} are not supported yet")


def read(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kv_caches: dict[str, torch.Tensor]
) -> list[Share]:
    """What this worker holds of each group.

    Raises:
        Refusal: something about it is not understood.
    """
    missing = [name for group in kv_cache_config.kv_cache_groups for name in group.layer_names if name not in kv_caches]
    if missing:
        raise Refusal(f"layer {missing[0]} has no KV cache in this worker")
    shares = []
    for group in kv_cache_config.kv_cache_groups:
        lots, others = _alike(kv_cache_config, group)
        known = {kv_caches[name].data_ptr() for lot in lots for name in lot}
        for name in others:
            if kv_caches[name].data_ptr() not in known:
                raise Refusal(f"vLLM does not say where the KV cache of layer {name} is placed")
        shares += [_share(vllm_config, kv_cache_config, group.kv_cache_spec, lot, kv_caches) for lot in lots]
    return shares


def _share(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, spec: Any, lot: list[str], kv_caches: dict[str, torch.Tensor]
) -> Share:
    names = _without_shared(lot, kv_caches)
    tensors = [kv_caches[name] for name in names]
    blocks = kv_cache_config.num_blocks
    rule = _rule(spec)
    first = tensors[0]
    for name, tensor in zip(names, tensors):
        _check(name, tensor, first)
    of_layers = getattr(spec, "kv_cache_specs", {})
    specs = [of_layers.get(name, spec) for name in names]
    state = rule.kind == "state"
    cells = 1 if state else rule.block_tokens
    pages, heads, page_tokens, _ = first.shape
    if pages % blocks or (pages // blocks) * page_tokens != cells:
        raise Refusal(
            f"{pages} pages of {page_tokens} tokens do not make {blocks} blocks of {cells} tokens"
        )
    head_first, heads_total = (_states if state else _heads)(vllm_config, specs, heads)
    return Share(
        layers=[_layer(tensor) for tensor in tensors],
        tensors=tensors,
        layer_names=names,
        kind=rule.kind,
        head_first=head_first,
        heads=heads,
        heads_total=heads_total,
        block_tokens=rule.block_tokens,
        cells=cells,
        page_tokens=page_tokens,
        cell_bytes=first.shape[3] * first.element_size(),
        window=rule.window,
        encoding=_encoding(vllm_config, names, page_tokens, specs),
        scales="" if state else _scales(vllm_config, names),
        blocks=blocks,
        device=_device(first.device),
    )


def encoding(shares: list[Share]) -> str:
    """The cell encoding of all groups: one name if they agree."""
    names = [share.encoding for share in shares]
    if len(set(names)) == 1:
        return names[0]
    return ";".join(f"{number}={name}" for number, name in enumerate(names))


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


def _without_shared(names: list[str], kv_caches: dict[str, torch.Tensor]) -> list[str]:
    """Without layers that only share another's cache."""
    first: dict[int, str] = {}
    for name in names:
        first.setdefault(kv_caches[name].data_ptr(), name)
    return list(first.values())


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


def _states(vllm_config: VllmConfig, specs: list[Any], heads: int) -> tuple[int, int]:
    """First head of this worker, and all heads, for recurrent states. Nobody can cut one, so that each worker's is a head of its own, unless all have the same."""
    if heads != 1:
        raise Refusal(f"recurrent states in {heads} parts are not supported")
    rank, size = _tensor_rank(vllm_config)
    if size == 1 or all(getattr(one, "tp_replicated", False) for one in specs):
        return 0, 1
    return rank, size


def _heads(vllm_config: VllmConfig, specs: list[Any], heads: int) -> tuple[int, int]:
    """First KV head of this worker, and all KV heads of a layer."""
    rank, size = _tensor_rank(vllm_config)
    if size == 1 or all(capabilities.is_latent(one) for one in specs):
        return 0, heads
    if _parts(specs):
        return rank * heads, size * heads
    totals = _totals(vllm_config)
    if len(totals) == 1:
        (total,) = totals
        if heads * size == total:
            return rank * heads, total
        if heads == 1 and size % total == 0:
            return rank // (size // total), total
    # How many this layer has is not known, or how they are spread: each worker's count as its own. Where there are no fewer heads than
    # workers they are that; else only engines of this degree share them.
    return rank * heads, size * heads


def _parts(specs: list[Any]) -> bool:
    """Whether the parts of a page are something else than KV heads: K of all heads, then V of all, say. Those of two workers side by side
    are not what one worker of both has."""
    return any(getattr(one, "num_head_slots", None) is not None for one in specs)


def _totals(vllm_config: VllmConfig) -> set[int]:
    """How many KV heads all workers together may have of a layer: what vLLM says of the model, and of one that guesses for it, and all
    that their configurations call so, for some models' layers differ."""
    models = [vllm_config.model_config, getattr(vllm_config.speculative_config, "draft_model_config", None)]
    totals: set[int] = set()

    def look(value: Any, named: bool) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                look(inner, HEADS_OF_A_LAYER.search(str(key)) is not None)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                look(inner, named)
        elif named and type(value) is int:
            totals.add(value)

    for model in models:
        if model is not None:
            look(model.hf_text_config.to_dict(), False)
            totals.add(model.get_total_num_kv_heads())
    return totals - {0}  # a drafter without attention has none


def _tensor_rank(vllm_config: VllmConfig) -> tuple[int, int]:
    """Of this worker among those that share heads, and how many they are."""
    from vllm.distributed import get_tensor_model_parallel_rank

    size = int(vllm_config.parallel_config.tensor_parallel_size)
    return (get_tensor_model_parallel_rank() if size > 1 else 0), size


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


def _encoding(vllm_config: VllmConfig, names: list[str], page_tokens: int, specs: list[Any]) -> str:
    """What the bytes of a page mean. Two encodings that may differ in any way have different names."""
    if capabilities.spec_kind(specs) == "state":
        # Convolution and recurrent states side by side, laid out as the layer's kernels like.
        kinds = {
            f"{getattr(one, 'mamba_type', '?')}:{one.shapes}:{one.dtypes}".replace(" ", "").replace("torch.", "")
            for one in specs
        }
        return f"opaque:state:{'+'.join(sorted(kinds))}:vllm={_version()}:{_machine()}"
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
    parts = f":parts:tp={vllm_config.parallel_config.tensor_parallel_size}" if _parts(specs) else ""
    return f"opaque:{backend}:vllm={_version()}:{_machine()}:page={page_tokens}{parts}"


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
        if type(layer).__name__ in OWN_SCALES:
            continue
        key, value = (getattr(layer, f"_{which}_scale_float", None) for which in "kv")
        if key is None or value is None:
            raise Refusal(f"the KV scales of layer {name} are not known")
        lines.append(f"{name}={float(key)!r},{float(value)!r}")
    return ";".join(lines)
