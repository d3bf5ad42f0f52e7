"""Models whose KV lies in several groups, where something fails or differs: damage, ranks that hold parts, images.

That what is loaded is right, whatever the shape and the hit, is shown by test_shapes.py.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import models
import pytest
from checks import attached, largest_gap, loads, patient, settled
from conftest import Engines
from daemon import Daemon
from engine import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.plugin]
Model = Callable[[models.Recipe], pathlib.Path]

WINDOWS: dict[str, Any] = {"prefix_cache_retention_interval": 32}
STATES: dict[str, Any] = {"prefix_cache_retention_interval": 96, "max_num_batched_tokens": 512}
LONG = models.prompt(1, 1500)


@pytest.mark.parametrize(("recipe", "options"), [(models.gemma, WINDOWS), (models.qwen3next, STATES)], ids=["gemma", "qwen3next"])
def test_damage_in_any_group_is_caught_and_recomputed(
    recipe: Callable[[], models.Recipe], options: dict[str, Any], engines: Engines, daemon: Daemon, model: Model
) -> None:
    engine = engines.start(model(recipe()), connector=patient(daemon.socket), **options)
    attached(engine, daemon)
    right = engine.ask(LONG)  # the same as after a hit: the models' choices are not close
    engine.reset_local()
    settled(daemon)
    before = loads(daemon).get("failed crc", 0)
    for skip in (3, 100, 300):
        daemon.flip_byte(skip)
    daemon.punch_hole(0, 2 << 20)
    batch = engine.batch([LONG])
    assert batch.answers[0].tokens == right.tokens
    assert loads(daemon).get("failed crc", 0) > before

    def whole() -> bool:
        engine.reset_local()
        batch = engine.batch([LONG])
        assert batch.answers[0].tokens == right.tokens
        return batch.external > 1400

    wait_until("the prompt comes from the daemon again", whole, 60.0)


def test_tensor_parallel_ranks_of_a_hybrid_model(engines: Engines, daemon: Daemon, model: Model) -> None:
    """Two ranks load what one stored: attention is cut by heads, whatever the group."""
    path = model(models.gemma())
    first = engines.start(path, connector=patient(daemon.socket), in_process=True)
    attached(first, daemon)
    alone = first.ask(LONG)
    first.reset_local()
    settled(daemon)
    first.exit()
    second = engines.start(path, connector=patient(daemon.socket), tensor_parallel_size=2, threads=1)
    attached(second, daemon)
    batch = second.batch([LONG])
    assert batch.external == 1472
    gap = largest_gap(batch.answers[0], alone)
    print(f"gemma TP=1 -> TP=2: largest logprob difference {gap:.4f}")
    assert gap <= 0.2


@pytest.mark.parametrize(("heads", "guessing"), [(2, 4), (1, 2)])
def test_two_ranks_with_a_drafter_of_other_heads(heads: int, guessing: int, engines: Engines, daemon: Daemon, model: Model) -> None:
    """Two and four heads: each rank has its part of both, and one rank alone loads them. One and two: vLLM keeps layers alike that are not,
    for the ranks' blocks are the same in the target's and differ in the drafter's. Nobody else loads what they store."""
    drafter = {"method": "draft_model", "model": str(model(models.gqa(kv_heads=guessing))), "num_speculative_tokens": 2}
    path, blocks = model(models.gqa(kv_heads=heads)), 45
    two = engines.start(path, connector=patient(daemon.socket), tensor_parallel_size=2, threads=1, speculative_config=drafter)
    attached(two, daemon)
    stored = two.batch([LONG], dump=blocks)
    two.reset_local()
    settled(daemon)
    loaded = two.batch([LONG], dump=blocks)
    assert loaded.external >= blocks * 32
    ((first, second),) = loaded.dumps
    assert len(first["layers"]) == len(second["layers"]) == 8
    assert first != second
    assert loaded.dumps == stored.dumps
    two.exit()
    one = engines.start(path, connector=patient(daemon.socket), in_process=True, speculative_config=drafter)
    attached(one, daemon)
    batch = one.batch([LONG])
    assert batch.external == (1472 if heads == 2 else 0)
    if batch.external:
        assert largest_gap(batch.answers[0], loaded.answers[0]) <= 0.2


@pytest.mark.parametrize(("recipe", "options"), [(models.gqa, {}), (models.gemma, WINDOWS)], ids=["gqa", "gemma"])
def test_one_rank_alone_fails_a_load(
    recipe: Callable[[], models.Recipe], options: dict[str, Any], engines: Engines, daemon: Daemon, model: Model
) -> None:
    """A byte of one rank's part is wrong: both compute anew, from that block on where blocks have names (one cache group), else all."""
    engine = engines.start(model(recipe()), connector=patient(daemon.socket), tensor_parallel_size=2, threads=1, **options)
    attached(engine, daemon)
    engine.ask(LONG)
    hit = engine.ask(LONG)
    engine.reset_local()
    settled(daemon)
    assert engine.batch([LONG]).answers[0].bits == hit.bits
    before = loads(daemon).get("failed crc", 0)
    for round in range(6):
        # One byte, in one rank's part of one block: now in that of one rank, now of the other, early in blocks and late.
        daemon.flip_byte(skip=5 + 37 * round)
        engine.reset_local()
        answer = engine.batch([LONG]).answers[0]
        assert answer.tokens == hit.tokens
        engine.reset_local()
        settled(daemon)
        caught = loads(daemon).get("failed crc", 0) - before
        assert caught <= round + 1, "a byte counts once"
    assert caught > 0
    batch = engine.batch([LONG])
    assert batch.external == hit.cached
    assert batch.answers[0].bits == hit.bits, "what was computed anew was stored anew"


def test_recurrent_states_of_two_ranks_are_theirs_alone(engines: Engines, daemon: Daemon, model: Model) -> None:
    path = model(models.qwen3next())
    two = engines.start(path, connector=patient(daemon.socket), tensor_parallel_size=2, threads=1, **STATES)
    attached(two, daemon)
    two.ask(LONG)
    hit = two.ask(LONG)
    two.reset_local()
    settled(daemon)
    batch = two.batch([LONG])
    assert batch.external == hit.cached > 0
    assert batch.answers[0].bits == hit.bits
    two.exit()
    one = engines.start(path, connector=patient(daemon.socket), **STATES)
    attached(one, daemon)
    assert one.batch([LONG]).external == 0, "nobody can cut a state"


def test_images_are_part_of_the_prompt(engines: Engines, daemon: Daemon, model: Model) -> None:
    engine = engines.start(model(models.multimodal()), connector=patient(daemon.socket), skip_tokenizer_init=False)
    attached(engine, daemon)
    prompt = models.prompt(1, 100) + [models.IMAGE_TOKEN] + models.prompt(2, 300)
    engine.ask(prompt, images=[1])
    hit = engine.ask(prompt, images=[1])
    other = engine.ask(prompt, images=[2])
    engine.reset_local()
    settled(daemon)
    batch = engine.batch([prompt], images=[1])
    assert batch.external == hit.cached > 200
    assert batch.answers[0].bits == hit.bits
    engine.reset_local()
    batch = engine.batch([prompt], images=[3])
    assert batch.external == 96, "what comes before the image is shared, what comes after is not"
    engine.reset_local()
    assert engine.batch([prompt], images=[2]).answers[0].tokens == other.tokens
    two = models.prompt(1, 100) + [models.IMAGE_TOKEN] + models.prompt(4, 100) + [models.IMAGE_TOKEN] + models.prompt(5, 100)
    engine.ask(two, images=[4, 5])
    engine.reset_local()
    settled(daemon)
    assert engine.batch([two], images=[5, 4]).external == 96, "the same images in another order"
    engine.reset_local()
    assert engine.batch([two], images=[4, 6]).external == 192, "the first is shared: 100 tokens, 16 of the image, and of what follows"
    engine.reset_local()
    assert engine.batch([two], images=[4, 5]).external == 320
