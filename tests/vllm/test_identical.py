"""A load through the daemon gives tokens and logprobs bit-equal to vLLM's own local prefix hit of the same length.

For GQA, MLA and fp8 KV, in the engine that stored, and in a second process after the first has exited. Across parallel degrees the
bytes are equal after mapping heads to ranks, and logprobs agree within TOLERANCE: matrix products of other shapes round differently.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import models
import pytest
from checks import attached, full_blocks, patient, largest_gap, merged, wait_stored
from conftest import Engines
from daemon import Daemon
from engine import Engine, EngineError

pytestmark = [pytest.mark.engine, pytest.mark.plugin]
Model = Callable[[models.Recipe], pathlib.Path]

# Largest difference of a logprob across parallel degrees. bfloat16 keeps 8 bits and logits are about 4 in size; measured 0.05 (GQA). In
# the MLA model a rounding can also choose another expert; measured 0.22.
TOLERANCE = {"gqa": 0.1, "mla": 0.5}

KINDS: dict[str, tuple[Callable[[], models.Recipe], dict[str, Any]]] = {
    "gqa": (models.gqa, {}),
    "mla": (models.mla, {"mla_prefix_caching": True}),  # of 16 or 32 tokens a block: vLLM chooses by the CPU
    "fp8": (models.gqa, {"kv_cache_dtype": "fp8"}),
}


def start_or_skip(engines: Engines, path: pathlib.Path, **options: Any) -> Engine:
    try:
        return engines.start(path, **options)
    except EngineError:
        if "FP8 KV cache on CPU requires" in engines.last_log():
            pytest.skip("fp8 KV: vLLM needs AVX-512 or AMX for it, and this CPU has neither")
        raise


@pytest.mark.parametrize("kind", list(KINDS))
def test_load_is_bit_equal_to_a_local_hit(kind: str, engines: Engines, daemon: Daemon, model: Model) -> None:
    recipe, options = KINDS[kind]
    first = start_or_skip(engines, model(recipe()), connector=patient(daemon.socket), **options)
    block = first.facts["block_size"]
    attached(first, daemon)
    base = daemon.resident()
    # One prompt ends within a block; of the other the last block is full, and its last token must be computed again.
    prompts = [models.prompt(1, 700), models.prompt(2, 640)]
    lengths = [full_blocks(len(p), block) * block for p in prompts]
    for p in prompts:
        assert first.ask(p).cached == 0
    wait_stored(daemon, base + sum(full_blocks(len(p) + 8, block) for p in prompts))
    hits = [first.ask(p) for p in prompts]
    assert [h.cached for h in hits] == lengths
    first.reset_local()
    for p, hit, length in zip(prompts, hits, lengths):
        batch = first.batch([p])
        assert (batch.external, batch.answers[0].cached) == (length, length)
        assert batch.answers[0].bits == hit.bits
    first.exit()
    second = engines.start(model(recipe()), connector=patient(daemon.socket), **options)
    attached(second, daemon)
    for p, hit, length in zip(prompts, hits, lengths):
        batch = second.batch([p])
        assert batch.external == length
        assert batch.answers[0].bits == hit.bits


def test_mla_as_vllm_configures_it_on_a_cpu(engines: Engines, daemon: Daemon, model: Model) -> None:
    """Without AMX vLLM switches its own prefix cache off. Loading gives what its prefix hit would give if it were on."""
    path = model(models.mla())
    reference = engines.start(path, in_process=True, mla_prefix_caching=True)
    prompt = models.prompt(1, 700)
    reference.ask(prompt)
    hit = reference.ask(prompt)
    reference.exit()
    engine = engines.start(path, connector=patient(daemon.socket))
    if engine.facts["prefix_caching"]:
        pytest.skip("vLLM keeps its prefix cache with this CPU's MLA backend: nothing differs from the other tests")
    attached(engine, daemon)
    base = daemon.resident()
    engine.ask(prompt)
    block = engine.facts["block_size"]
    wait_stored(daemon, base + full_blocks(708, block))
    batch = engine.batch([prompt])
    assert batch.external == hit.cached == full_blocks(700, block) * block
    assert batch.answers[0].bits == hit.bits


@pytest.mark.parametrize(("stored_at", "loaded_at"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_any_tensor_parallel_degree_loads_what_any_other_stored(kind: str, stored_at: int, loaded_at: int, engines: Engines, daemon: Daemon, model: Model) -> None:
    recipe, options = KINDS[kind]
    prompt = models.prompt(1, 700)

    def start(degree: int) -> Engine:
        one = engines.start(model(recipe()), connector=patient(daemon.socket), tensor_parallel_size=degree, threads=2 // degree, **options)
        attached(one, daemon)
        return one

    first = start(stored_at)
    block = first.facts["block_size"]
    blocks = 700 // block
    base = daemon.resident()
    stored = first.batch([prompt], dump=blocks)
    assert stored.external == 0
    wait_stored(daemon, base + full_blocks(764, block))
    first.exit()
    second = start(loaded_at)
    loaded = second.batch([prompt], dump=blocks)
    assert loaded.external == blocks * block
    if kind == "gqa":
        assert merged(loaded.dumps[0]) == merged(stored.dumps[0])
    else:  # one latent head, the same on every rank
        want = stored.dumps[0][0]["layers"]
        assert all(rank["layers"] == want for rank in stored.dumps[0] + loaded.dumps[0])
    # Against its own local hit, after computing everything itself.
    second.reset_local()
    alone = engines.start(model(recipe()), tensor_parallel_size=loaded_at, threads=2 // loaded_at, **options)
    alone.ask(prompt)
    gap = largest_gap(loaded.answers[0], alone.ask(prompt))
    print(f"\n{kind} TP={stored_at} -> TP={loaded_at}: largest logprob difference {gap:.4f}")
    assert gap <= TOLERANCE[kind]


def test_two_engines_alive_share(engines: Engines, daemon: Daemon, model: Model) -> None:
    path = model(models.gqa())
    one = engines.start(path, connector=patient(daemon.socket), in_process=True)
    two = engines.start(path, connector=patient(daemon.socket), own_process=True, spawn=True)  # started as vLLM starts it
    attached(one, daemon)
    attached(two, daemon)
    base = daemon.resident()
    prompt = models.prompt(5, 300)
    answer = one.ask(prompt, max_tokens=60)
    one.reset_local()  # steps the engine in process until its stores are over
    wait_stored(daemon, base + full_blocks(360))
    # The second turn of the conversation goes to the other engine: what the first generated is there, too.
    turn = prompt + answer.tokens + models.prompt(6, 40)
    batch = two.batch([turn], max_tokens=8)
    assert batch.external == full_blocks(360) * 32
    wait_stored(daemon, base + full_blocks(len(turn) + 8))
    back = one.batch([turn + batch.answers[0].tokens], max_tokens=4)
    assert back.external == full_blocks(len(turn) + 8) * 32


def test_samples_salt_and_refusal_to_read(engines: Engines, daemon: Daemon, model: Model) -> None:
    """n > 1 stores and loads like anything else; another salt is another prompt; requests for prompt logprobs read no cache."""
    engine = engines.start(model(models.gqa()), connector=patient(daemon.socket))
    attached(engine, daemon)
    base = daemon.resident()
    prompt = models.prompt(8, 320)
    engine.ask(prompt, n=3, temperature=1.0, seed=1)
    engine.reset_local()
    assert daemon.resident() > base
    several = engine.batch([prompt], n=3, temperature=1.0, seed=1)
    assert several.external >= full_blocks(320) * 32
    engine.reset_local()
    assert engine.batch([prompt], salt="tenant-a").external == 0
    engine.reset_local()
    assert engine.batch([prompt], salt="tenant-b").external == 0
    engine.reset_local()
    assert engine.batch([prompt], salt="tenant-a").external == full_blocks(320) * 32
    engine.reset_local()
    assert engine.batch([prompt], prompt_logprobs=1).external == 0
