"""The yardstick itself, with plain vLLM and no daemon: a local prefix hit is the same bit for bit every time it happens, also after
the prefix cache was forgotten and filled again. So a load through the daemon can be held against it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import models
import pytest
from conftest import Engines

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("recipe", "options"), [(models.gqa, {}), (models.mla, {"mla_prefix_caching": True})], ids=["gqa", "mla"])
def test_local_hit_is_repeatable(
    recipe: Callable[[], models.Recipe], options: dict, engines: Engines, model: Callable[[models.Recipe], pathlib.Path]
) -> None:
    engine = engines.start(model(recipe()), in_process=True, **options)
    prompt = models.prompt(1, 700)
    cold = engine.ask(prompt)
    hit = engine.ask(prompt)
    assert cold.cached == 0
    block = engine.facts["block_size"]  # for MLA vLLM chooses it by the CPU
    assert hit.cached == (700 - 1) // block * block
    assert engine.ask(prompt).bits == hit.bits
    engine.reset_local()
    assert engine.ask(prompt).bits == cold.bits
    assert engine.ask(prompt).bits == hit.bits
