"""Models whose KV lies in several groups: a load gives tokens and logprobs bit-equal to vLLM's own local hit of the same length.

Sliding windows and full attention (Gemma-3-like, gpt-oss-like), recurrent states and full attention (Qwen3-Next-like): for hits that end
with the prompt, in the middle of it, within a window, in another process, and where the daemon lacks some group's blocks.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import models
import pytest
from checks import attached, largest_gap, loads, patient
from conftest import Engines
from daemon import Daemon
from engine import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.plugin]
Model = Callable[[models.Recipe], pathlib.Path]

# vLLM's own cache keeps windows and states only where the same prompt would ask for them again, unless it is told to keep more; states
# also only where a step ended.
KINDS: dict[str, tuple[Callable[[], models.Recipe], dict[str, Any]]] = {
    "qwen3": (models.qwen3, {}),
    "gemma": (models.gemma, {"prefix_cache_retention_interval": 32}),
    "gemma-odd": (lambda: models.gemma(window=200), {"prefix_cache_retention_interval": 32}),  # no multiple of the block
    "gptoss": (models.gptoss, {"prefix_cache_retention_interval": 32}),
    "qwen3next": (models.qwen3next, {"prefix_cache_retention_interval": 96, "max_num_batched_tokens": 512}),
}


LONG = models.prompt(1, 1500)


def settled(daemon: Daemon) -> None:
    """Until no store is under way, and twice the same is there."""
    seen: list[int] = []

    def still() -> bool:
        seen.append(daemon.resident())
        return len(seen) > 3 and len(set(seen[-3:])) == 1

    wait_until("the daemon holds still", still, every_s=0.1)


@pytest.mark.parametrize("kind", list(KINDS))
def test_load_is_bit_equal_to_a_local_hit(kind: str, engines: Engines, daemon: Daemon, model: Model) -> None:
    recipe, options = KINDS[kind]
    path = model(recipe())
    long = LONG
    # The same prompt, one that goes on after it, and one that leaves it within a window's reach.
    asked = [long, long + models.prompt(2, 300), long[:900] + models.prompt(3, 60)]
    alone = engines.start(path, in_process=True, **options)
    alone.ask(long)
    hits = [alone.ask(p) for p in asked]
    assert all(hit.cached > 0 for hit in hits), [hit.cached for hit in hits]
    alone.exit()
    first = engines.start(path, connector=patient(daemon.socket), in_process=True, **options)
    attached(first, daemon)
    assert first.ask(long).cached == 0
    first.reset_local()
    settled(daemon)
    again = first.batch([long])
    assert again.external == hits[0].cached
    assert again.answers[0].bits == hits[0].bits
    first.exit()
    second = engines.start(path, connector=patient(daemon.socket), **options)
    attached(second, daemon)
    for p, hit in zip(asked, hits):
        batch = second.batch([p])
        print(f"{kind}: local hit {hit.cached}, external {batch.external}")
        assert (batch.external, batch.answers[0].cached) == (hit.cached, hit.cached)
        assert batch.answers[0].bits == hit.bits
        second.reset_local()


@pytest.mark.parametrize("kind", ["gemma", "qwen3next"])
def test_a_daemon_that_lacks_some_blocks_gives_what_all_groups_have(kind: str, engines: Engines, model: Model, tmp_path: pathlib.Path) -> None:
    """Host memory for less than the prompt's blocks: windows that were left behind go first. Whatever hit is left is worth the same as
    vLLM's own of that length."""
    recipe, options = KINDS[kind]
    path = model(recipe())
    with Daemon(tmp_path, "6MiB") as small:
        first = engines.start(path, connector=patient(small.socket), in_process=True, **options)
        attached(first, small)
        lengths = set()
        for round in range(3):
            first.ask(LONG)
            first.reset_local()
            settled(small)
            first.ask(models.prompt(10 + round, 300 + 800 * round))
            first.reset_local()
            settled(small)
            batch = first.batch([LONG])
            lengths.add(batch.external)
            assert batch.answers[0].cached == batch.external
            first.reset_local()
            if batch.external:
                # vLLM's own hit of that length: the daemon is asked for nothing (salted), and the prompt's head is computed first.
                first.ask(LONG[: batch.external + 1], salt=f"own-{round}", max_tokens=1)
                own = first.batch([LONG], salt=f"own-{round}")
                assert own.answers[0].cached == batch.external, (own.answers[0].cached, batch.external)
                assert own.answers[0].bits == batch.answers[0].bits
                first.reset_local()
        print(f"{kind}: hits of {sorted(lengths)} tokens")
        assert min(lengths) < 1472


@pytest.mark.parametrize("kind", ["gemma", "qwen3next"])
def test_damage_in_any_group_is_caught_and_recomputed(kind: str, engines: Engines, daemon: Daemon, model: Model) -> None:
    recipe, options = KINDS[kind]
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


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_preempted_request_goes_on_from_what_was_stored(kind: str, engines: Engines, daemon: Daemon, model: Model) -> None:
    """In mid-answer vLLM takes all blocks away and forgets its cache. What the rest of the answer is computed from is worth the same as
    vLLM's own hit of that length."""
    recipe, options = KINDS[kind]
    path = model(recipe())
    engine = engines.start(path, connector=patient(daemon.socket), in_process=True, **options)
    attached(engine, daemon)
    batch = engine.batch([LONG], max_tokens=60, preempt_after=40)
    (tokens,) = (answer.tokens for answer in batch.answers)
    at = batch.preempted_at
    came_back = engine.call("stats")["loaded_tokens"]
    print(f"{kind}: preempted after {at} tokens, {came_back} tokens came back")
    assert at > 0
    assert came_back > 900
    alone = engines.start(path, in_process=True, **options)
    # Token by token, as the first engine came to them: a prompt of the same tokens would be computed in another order of rounding.
    assert alone.ask(LONG, max_tokens=60).tokens[:at] == tokens[:at]
    own = alone.ask(LONG + tokens[:at], max_tokens=60 - at)
    assert own.cached == came_back
    assert own.samples[0].tokens == tokens[at:]
    assert own.samples[0].logprobs == batch.answers[0].samples[0].logprobs[at:]


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


@pytest.mark.parametrize("kind", ["gqa", "gemma"])
def test_one_rank_alone_fails_a_load(kind: str, engines: Engines, daemon: Daemon, model: Model) -> None:
    """A byte of one rank's part is wrong: both compute anew, from that block on where blocks have names (one cache group), else all."""
    recipe, options = KINDS.get(kind, (models.gqa, {}))
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
    options = KINDS["qwen3next"][1]
    two = engines.start(path, connector=patient(daemon.socket), tensor_parallel_size=2, threads=1, **options)
    attached(two, daemon)
    two.ask(LONG)
    hit = two.ask(LONG)
    two.reset_local()
    settled(daemon)
    batch = two.batch([LONG])
    assert batch.external == hit.cached > 0
    assert batch.answers[0].bits == hit.bits
    two.exit()
    one = engines.start(path, connector=patient(daemon.socket), **options)
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
