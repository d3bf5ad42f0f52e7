"""The models themselves: same recipe, same bytes; variants differ where they say, and keep size and edges."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import models
import pytest


@pytest.mark.parametrize("recipe", [models.gqa, models.qwen3, models.mla, models.gemma, models.gptoss, models.qwen3next, models.mtp, models.multimodal])
def test_same_recipe_same_bytes(recipe: Callable[[], models.Recipe], tmp_path: pathlib.Path) -> None:
    one = models.make(recipe(), tmp_path / "a") / "model.safetensors"
    two = models.make(recipe(), tmp_path / "b") / "model.safetensors"
    assert one.read_bytes() == two.read_bytes()


def test_middle_weights_differ_and_edges_do_not(tmp_path: pathlib.Path) -> None:
    one = (models.make(models.gqa(), tmp_path) / "model.safetensors").read_bytes()
    two = (models.make(models.gqa(middle_seed=2), tmp_path) / "model.safetensors").read_bytes()
    edge = 64 << 10
    assert len(one) == len(two)
    assert one != two
    assert one[:edge] == two[:edge]
    assert one[-edge:] == two[-edge:]


def test_lora_content_depends_on_the_seed_alone(tmp_path: pathlib.Path) -> None:
    where = tmp_path / "adapter"
    first = (models.make_lora(models.gqa(), where, 1) / "adapter_model.safetensors").read_bytes()
    other = (models.make_lora(models.gqa(), where, 2) / "adapter_model.safetensors").read_bytes()
    again = (models.make_lora(models.gqa(), where, 1) / "adapter_model.safetensors").read_bytes()
    assert len(first) == len(other)
    assert first != other
    assert first == again


def test_prompts_differ_early() -> None:
    assert models.prompt(1, 100) == models.prompt(1, 200)[:100]
    assert models.prompt(1, 8) != models.prompt(2, 8)
