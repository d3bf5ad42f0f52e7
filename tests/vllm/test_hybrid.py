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
from checks import attached, patient
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
    long = models.prompt(1, 1500)
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
