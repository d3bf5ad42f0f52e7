"""The canary: proves, once, before the first request, that copies see a block as the framework does.

A block of the KV cache (never block 0) is filled through the framework's own ``[block, head, token, cell]`` indexing, packed
by the copy engine and compared with bytes computed elsewhere; then the other way round. The block is restored. What it
proves are strides and order; that the bytes mean the same to two engines is what the namespace is for.
"""

from __future__ import annotations

import torch

from kvdaemon._native import KvCache, canary_block
from kvdaemon.vllm.caches import Refusal, Share, stream


def _pattern(seed: int, layer: int, share: Share, width: int) -> torch.Tensor:
    """What ``kvd_connectors::canary::byte`` says, computed by the framework: ``[head, token, byte]``."""
    head = torch.arange(share.heads, dtype=torch.int64).view(-1, 1, 1)
    token = torch.arange(share.cells, dtype=torch.int64).view(1, -1, 1)
    at = torch.arange(width, dtype=torch.int64).view(1, 1, -1)
    value = seed + layer * 131 + head * 37 + token * 11 + at * 3
    value = value + (token * at + layer * head) % 17
    return (value % 251).to(torch.uint8)


def _pages(share: Share, block: int) -> range:
    each = share.cells // share.page_tokens
    return range(block * each, (block + 1) * each)


def _write(share: Share, layer: int, block: int, whole: torch.Tensor) -> None:
    tensor = share.tensors[layer]
    for number, page in enumerate(_pages(share, block)):
        tokens = whole[:, number * share.page_tokens : (number + 1) * share.page_tokens, :]
        tensor[page, :, :, :] = tokens.contiguous().view(tensor.dtype).to(tensor.device)


def _read(share: Share, layer: int, block: int) -> torch.Tensor:
    tensor = share.tensors[layer]
    pages = [tensor[page, :, :, :].contiguous().cpu().view(torch.uint8) for page in _pages(share, block)]
    return torch.cat(pages, dim=1)


def check(share: Share, cache: KvCache) -> None:
    """Runs the canary.

    Raises:
        Refusal: copies do not see blocks as the framework does.
    """
    block = share.blocks - 1
    if block < 1 or cache.blocks() < share.blocks:
        raise Refusal(f"a KV cache of {share.blocks} blocks has no room for a check of its layout")
    layers = range(len(share.tensors))
    kept = [_read(share, layer, block) for layer in layers]
    try:
        _check_pack(share, cache, block)
        _check_unpack(share, cache, block)
    finally:
        for layer in layers:
            _write(share, layer, block, kept[layer])


def _sizes(share: Share) -> tuple[int, int, int, int]:
    return len(share.tensors), share.heads, share.cells, share.cell_bytes


def _check_pack(share: Share, cache: KvCache, block: int) -> None:
    seed = 7
    for layer in range(len(share.tensors)):
        _write(share, layer, block, _pattern(seed, layer, share, share.cell_bytes))
    if cache.pack(block, stream(share)) != canary_block(seed, *_sizes(share)):
        raise Refusal("the layout of the KV cache is not what its strides say: a packed block came out wrong")


def _check_unpack(share: Share, cache: KvCache, block: int) -> None:
    seed = 101
    before = _read(share, 0, block - 1) if block > 1 else None
    cache.unpack(block, canary_block(seed, *_sizes(share)), stream(share))
    for layer in range(len(share.tensors)):
        if not torch.equal(_read(share, layer, block), _pattern(seed, layer, share, share.cell_bytes)):
            raise Refusal("the layout of the KV cache is not what its strides say: an unpacked block came out wrong")
    if before is not None and not torch.equal(before, _read(share, 0, block - 1)):
        raise Refusal("the layout of the KV cache is not what its strides say: a copy reached another block")
