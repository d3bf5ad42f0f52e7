"""Tensors on a GPU: copies see them as torch does, and come after what torch has been asked. Needs an NVIDIA GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

import importlib.util  # noqa: E402
import pathlib  # noqa: E402
import sys  # noqa: E402
import types  # noqa: E402

import kvdaemon  # noqa: E402
from kvdaemon._native import KvCache, KvdError, canary_block  # noqa: E402

if importlib.util.find_spec("vllm") is None:  # the package's door needs it; what is tested here does not
    door = types.ModuleType("kvdaemon.vllm")
    door.__path__ = [str(pathlib.Path(kvdaemon.__file__).parent / "vllm")]
    sys.modules["kvdaemon.vllm"] = door

from kvdaemon.vllm import caches, canary  # noqa: E402

LAYERS, BLOCKS, HEADS, TOKENS, WIDTH = 3, 9, 4, 16, 64


def share(by_token: bool, dtype=torch.bfloat16) -> caches.Share:
    """Tensors ``[block, head, token, cell]`` in one of the orders that engines use."""
    tensors = []
    for _ in range(LAYERS):
        if by_token:
            tensor = torch.zeros(BLOCKS, TOKENS, HEADS, WIDTH, dtype=dtype, device="cuda").permute(0, 2, 1, 3)
        else:
            tensor = torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH, dtype=dtype, device="cuda")
        tensors.append(tensor)
    return caches.Share(
        layers=[caches._layer(tensor) for tensor in tensors], tensors=tensors, layer_names=[], kind="full", head_first=0,
        heads=HEADS, heads_total=HEADS, block_tokens=TOKENS, page_tokens=TOKENS, cell_bytes=WIDTH * tensors[0].element_size(),
        encoding="", scales="", blocks=BLOCKS, device=caches._device(tensors[0].device),
    )


def cache(share: caches.Share) -> KvCache:
    return KvCache(
        share.layers, heads=HEADS, block_tokens=TOKENS, page_tokens=TOKENS, cell_bytes=share.cell_bytes, device=share.device
    )


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_the_canary_lives(by_token, dtype):
    one = share(by_token, dtype)
    canary.check(one, cache(one))
    assert not any(tensor.any() for tensor in one.tensors), "put back"


def test_copies_come_after_the_streams_work():
    one = share(True)
    copies, stream = cache(one), torch.cuda.Stream()
    for turn in range(20):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(3_000_000)  # a millisecond or more
            for tensor in one.tensors:
                tensor.fill_(turn + 1)
            packed = copies.pack(3, caches.stream(one))
        assert caches.stream(one) == torch.cuda.current_stream().cuda_stream
        values = torch.frombuffer(bytearray(packed), dtype=torch.bfloat16)
        assert (values == turn + 1).all(), f"turn {turn}"
        block = canary_block(turn, LAYERS, HEADS, TOKENS, one.cell_bytes)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(3_000_000)
            for tensor in one.tensors:
                tensor.fill_(0)
            copies.unpack(4, block, caches.stream(one))
        stream.synchronize()  # or what is filled later is not seen
        assert copies.pack(4) == block, f"turn {turn}"


def test_devices_that_are_not_there():
    one = share(False)
    for name, kind in (("cuda:99", "unavailable"), ("xpu:0", "unsupported"), ("cuda:x", "unsupported")):
        with pytest.raises(KvdError) as failed:
            KvCache(one.layers, heads=HEADS, block_tokens=TOKENS, page_tokens=TOKENS, cell_bytes=one.cell_bytes, device=name)
        assert failed.value.kind == kind, str(failed.value)
