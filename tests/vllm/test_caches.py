"""What a worker finds out about its KV cache, for models that no engine runs here: latent attention with an indexer, heads in all numbers."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import models  # noqa: E402
import torch  # noqa: E402
from daemon import Daemon  # noqa: E402
from engine import patient  # noqa: E402
from harness import ScriptedEngine, Shape, make_config  # noqa: E402
from scripted import planning  # noqa: E402
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, MLAAttentionSpec  # noqa: E402
from vllm.v1.worker.utils import allocate_kv_cache  # noqa: E402

pytestmark = pytest.mark.plugin
Model = Callable[[models.Recipe], pathlib.Path]
SPARSE = Shape("sparse", block=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetfulAttentionSpec(FullAttentionSpec):
    """Of a layer of which kvd knows nothing."""


class Mixed(Shape):
    """Layers of full attention, and last one that is not what it looks like."""

    def layers(self, spec_tokens: int = 0) -> dict[str, KVCacheSpec]:
        odd = ForgetfulAttentionSpec(block_size=self.block, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
        return super().layers(spec_tokens) | {"model.layers.9.self_attn.attn": odd}


MIXED = Mixed("mixed")


class DeepseekV32IndexerCache:
    """A fake, of vLLM's class by name: as much of it as the connector asks for. Its keys carry their scales with them."""

    @staticmethod
    def get_attn_backend() -> Any:
        return SimpleNamespace(get_name=lambda: "DEEPSEEK_V32_INDEXER")


class LatentLayer(DeepseekV32IndexerCache):
    """A fake, of a layer of latent attention."""

    _k_scale_float, _v_scale_float = 0.5, 1.0

    @staticmethod
    def get_attn_backend() -> Any:
        return SimpleNamespace(get_name=lambda: "FLASHMLA_SPARSE")


def sparse(config: Any) -> KVCacheConfig:
    """As DeepSeek-V3.2: beside each layer's latent cache one of keys that choose tokens. vLLM keeps all in one group."""
    common = {"block_size": 64, "num_kv_heads": 1}
    specs, layers = {}, config.compilation_config.static_forward_context
    for number in range(3):
        latent, keys = f"model.layers.{number}.self_attn.attn", f"model.layers.{number}.self_attn.indexer.k_cache"
        specs[latent] = MLAAttentionSpec(head_size=576, dtype=torch.bfloat16, **common)
        specs[keys] = MLAAttentionSpec(head_size=132, dtype=torch.uint8, **common)
        layers |= {latent: LatentLayer(), keys: DeepseekV32IndexerCache()}
    groups = planning.get_kv_cache_groups(config, specs)
    assert len(groups) == 1
    return planning.get_kv_cache_config_from_groups(config, groups, 1 << 30)


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_latent_attention_with_an_indexer(dtype: str, model: Model) -> None:
    from kvdaemon._native import KvCache
    from kvdaemon.vllm import caches, canary

    config = make_config(model(models.gqa()), None, async_scheduling=False, shape=SPARSE)
    kv = sparse(config)
    config.cache_config.cache_dtype = dtype
    tensors = allocate_kv_cache(kv, torch.device("cpu"), config.cache_config.get_resolved_kv_cache_layout())
    shares = caches.read(config, kv, tensors)
    found = [(share.kind, len(share.layers), share.heads, share.block_tokens, share.cell_bytes) for share in shares]
    assert found == [("full", 3, 1, 64, 1152), ("full", 3, 1, 64, 132)]
    assert [rule.of for rule in caches.rules(kv)] == [0, 0]
    assert caches.rules(kv_cache_utils.generate_scheduler_kv_cache_config([kv])) == caches.rules(kv), "the scheduler sees fewer specs"
    assert "0=opaque:FLASHMLA_SPARSE:" in caches.encoding(shares)
    assert ";1=opaque:DEEPSEEK_V32_INDEXER:" in caches.encoding(shares)
    assert [share.scales.count("=0.5,1.0") for share in shares] == ([3, 0] if dtype == "fp8" else [0, 0])
    for share in shares:
        sizes = {"heads": share.heads, "block_tokens": share.cells, "page_tokens": share.page_tokens, "cell_bytes": share.cell_bytes}
        canary.check(share, KvCache(share.layers, device=share.device, **sizes))


def test_a_layer_without_a_place_must_be_another_s(model: Model) -> None:
    """Gemma-3n's last layers read what others wrote: vLLM adds them to a group, and gives them the others' memory."""
    from kvdaemon.vllm import caches

    config = make_config(model(models.gqa()), None, async_scheduling=False, shape=SPARSE)
    kv = sparse(config)
    tensors = allocate_kv_cache(kv, torch.device("cpu"), config.cache_config.get_resolved_kv_cache_layout())
    kv.kv_cache_groups[0].layer_names.append("model.layers.9.self_attn.attn")
    with pytest.raises(caches.Refusal, match=r"layers\.9.* has no KV cache"):
        caches.read(config, kv, tensors)
    tensors["model.layers.9.self_attn.attn"] = tensors["model.layers.1.self_attn.attn"]
    assert [len(share.layers) for share in caches.read(config, kv, tensors)] == [3, 3]
    tensors["model.layers.9.self_attn.attn"] = torch.zeros_like(tensors["model.layers.1.self_attn.attn"])
    with pytest.raises(caches.Refusal, match="does not say where"):
        caches.read(config, kv, tensors)


def test_a_group_without_layers_is_refused(model: Model) -> None:
    """Of a pipeline stage: its groups would not be those of the others."""
    from kvdaemon.vllm import caches

    config = make_config(model(models.gqa()), None, async_scheduling=False, shape=SPARSE)
    kv = sparse(config)
    kv.kv_cache_groups[0].layer_names.clear()
    assert "no layers" in (caches.refuse_config(config, kv) or "")


def test_what_only_workers_see_is_told(model: Model, module_daemon: Daemon) -> None:
    """The scheduler knows one layer of a group; a worker refuses for another's sake, and nobody waits for it."""
    engine = ScriptedEngine(make_config(model(models.gqa()), patient(module_daemon.socket), async_scheduling=False, shape=MIXED), shape=MIXED)
    try:
        engine.ask(models.prompt(1, 100), 4)
        assert "ForgetfulAttentionSpec" in str(engine.connector.debug_stats()["refusal"])
        assert engine.connector.debug_stats()["asked_to_wait"] == 0
    finally:
        engine.close()


def test_pages_of_other_parts_than_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """K and then V of all heads, say: those of two workers side by side are not what one has, so that only engines of one degree share them."""
    from kvdaemon.vllm import caches

    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(caches, "_backend", lambda *_: "FLASHINFER")
    spec = FullAttentionSpec(block_size=32, num_kv_heads=4, head_size=64, dtype=torch.bfloat16, num_head_slots=8)
    named = set()
    for size, expected in ((1, (0, 8)), (2, (8, 16)), (4, (8, 32))):
        engine = _engine(size, 4 * size, {}, None)
        engine.model_config.dtype = torch.bfloat16
        assert caches._heads(engine, [spec], 8) == expected
        named.add(caches._encoding(engine, ["layer"], 32, [spec]))
    assert len(named) == 3, named
    plain = FullAttentionSpec(block_size=32, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)
    assert ":parts:" not in caches._encoding(engine, ["layer"], 32, [plain])


def _engine(size: int, total: int, config: dict[str, Any], drafter: int | None) -> Any:
    def of(heads: int, named: dict[str, Any]) -> Any:
        return SimpleNamespace(get_total_num_kv_heads=lambda: heads, hf_text_config=SimpleNamespace(to_dict=lambda: named))

    draft = None if drafter is None else SimpleNamespace(draft_model_config=of(drafter, {"num_key_value_heads": drafter}))
    return SimpleNamespace(model_config=of(total, config), speculative_config=draft, parallel_config=SimpleNamespace(tensor_parallel_size=size))


@pytest.mark.parametrize(
    ("size", "heads", "total", "config", "drafter", "expected"),
    [
        (1, 8, 8, {}, None, [(0, 8)]),
        (4, 2, 8, {"num_key_value_heads": 8}, None, [(0, 8), (2, 8), (4, 8), (6, 8)]),
        (4, 1, 2, {"num_key_value_heads": 2}, None, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        # Another number for a drafter, or for some layers: those of a worker are its own, though they may be another's, too.
        (4, 1, 2, {"num_key_value_heads": 2}, 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (4, 2, 8, {"num_key_value_heads": 8}, 4, [(0, 8), (2, 8), (4, 8), (6, 8)]),
        (4, 1, 2, {"num_key_value_heads": 2, "num_global_key_value_heads": 4}, None, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (2, 1, 1, {"block_configs": [{"attention": {"n_heads_in_group": 8}}, {"attention": {"n_heads_in_group": 4}}]}, None, [(0, 2), (1, 2)]),
        (2, 3, 5, {"num_key_value_heads": 5}, None, [(0, 6), (3, 6)]),
    ],
)
def test_whose_heads(
    size: int, heads: int, total: int, config: dict[str, Any], drafter: int | None, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvdaemon.vllm import caches

    spec = FullAttentionSpec(block_size=32, num_kv_heads=heads, head_size=64, dtype=torch.bfloat16)
    latent = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    engine = _engine(size, total, config, drafter)
    found = []
    for rank in range(size):
        monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda rank=rank: rank)
        found.append(caches._heads(engine, [spec], heads))
        assert caches._heads(engine, [latent], 1) == (0, 1), "every worker has all of it"
    assert found == expected
