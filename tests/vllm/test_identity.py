"""What must not be shared is not: other weights of equal size and edges, other dtype, rope, hash seed, adapter content. And the daemon
says by which field two namespaces differ. Models that can't be kept yet run, store nothing, and say so in one line."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import models
import pytest
from checks import attached, differences, full_blocks, patient, settled, wait_stored
from conftest import Engines
from daemon import Daemon
from engine import Engine, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.plugin]
Model = Callable[[models.Recipe], pathlib.Path]
PROMPT = models.prompt(1, 700)


@pytest.fixture(scope="module")
def stored(module_engines: Engines, module_daemon: Daemon, model: Model) -> Daemon:
    """A daemon that holds PROMPT of the plain model."""
    engine = module_engines.start(model(models.gqa()), connector=patient(module_daemon.socket), in_process=True)
    attached(engine, module_daemon)
    base = module_daemon.resident()
    engine.ask(PROMPT)
    engine.reset_local()
    wait_stored(module_daemon, base + full_blocks(708))
    engine.exit()
    return module_daemon


ROPE = {"rope_theta": 20000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}

# Recipe, engine options, and the fields that must differ, none of the others.
VARIANTS: dict[str, tuple[models.Recipe, dict[str, Any], list[set[str]]]] = {
    "weights": (models.gqa(middle_seed=2), {}, [{"weights"}]),
    "dtype": (models.gqa(), {"dtype": "float16"}, [{"compute_dtype", "kv_dtype", "cell_encoding"}, {"compute_dtype", "kv_dtype"}]),
    "rope": (models.gqa(), {"hf_overrides": ROPE}, [{"rope"}, {"overrides"}, {"rope", "overrides"}]),
    "block size": (models.gqa(), {"block_size": 64}, [{"block_tokens", "cell_encoding"}]),
    "hash seed": (models.gqa(), {"env": {"PYTHONHASHSEED": "7"}}, [{"hash"}]),
}


@pytest.mark.parametrize("what", list(VARIANTS))
def test_never_shared(what: str, stored: Daemon, engines: Engines, model: Model) -> None:
    recipe, options, fields = VARIANTS[what]
    engine = engines.start(model(recipe), connector=patient(stored.socket), in_process=True, **options)
    attached(engine, stored)
    before = stored.resident()
    assert engine.batch([PROMPT]).external == 0
    engine.reset_local()
    assert stored.resident() > before, "it stores its own"
    # The models lie in directories of their own, whose names are in the record, too.
    said = [d - {"model"} for d in differences(stored)]
    assert any(f in said for f in fields), said


def test_the_same_model_elsewhere_is_shared(stored: Daemon, engines: Engines, tmp_path: pathlib.Path) -> None:
    """The counterpart: weights are known by content, so another copy of the same files shares."""
    engine = engines.start(models.make(models.gqa(), tmp_path), connector=patient(stored.socket, **{}), in_process=True, served_model_name="gqa")
    attached(engine, stored)
    shared = engine.batch([PROMPT]).external
    print(f"\na copy of the model in another directory: {shared} tokens shared")


def test_a_drafter_is_known_by_its_content(engines: Engines, daemon: Daemon, model: Model, tmp_path: pathlib.Path) -> None:
    """Its cache is stored with the target's. Guesses that need no model change nothing, and divide nobody."""

    def external(drafter: pathlib.Path | None, **options: Any) -> int:
        eagle = {"method": "eagle", "model": str(drafter), "num_speculative_tokens": 2}
        engine = engines.start(model(models.gqa()), connector=patient(daemon.socket), speculative_config=eagle if drafter else None, **options)
        attached(engine, daemon)
        found = engine.batch([PROMPT]).external
        engine.reset_local()
        settled(daemon)
        engine.exit()
        return found

    assert external(model(models.eagle()), in_process=True) == 0
    assert external(models.make(models.eagle(), tmp_path)) == 640, "another copy, in other processes: all but the last block, as vLLM has it"
    assert external(model(models.eagle(seed=3))) == 0
    rotates = dict(models.eagle().config) | {"rope_theta": json.dumps(20000.0)}
    assert external(model(dataclasses.replace(models.eagle(), name="eagle-rope", config=tuple(rotates.items())))) == 0, "the same weights"
    assert external(None) == 0, "without a drafter there are other layers"
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    plain = engines.start(model(models.gqa()), connector=patient(daemon.socket), speculative_config=ngram)
    attached(plain, daemon)
    assert plain.batch([PROMPT]).external == full_blocks(len(PROMPT)) * 32


def test_what_is_in_the_record(tmp_path: pathlib.Path) -> None:
    """Settings that no file shows, by stand-ins for vLLM's configuration: each of these divides, or makes an engine share with nobody and say so."""
    from kvdaemon import identity

    target, drafter = models.make(models.gqa(), tmp_path), models.make(models.eagle(), tmp_path)
    rope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 4096}
    warned: list[str] = []

    def record(*, target_rope: dict[str, Any] | None = None, longest: int = 4096, model: dict[str, Any] | None = None, **changed: Any) -> dict[str, str]:
        def config(path: pathlib.Path, scaling: dict[str, Any] | None) -> SimpleNamespace:
            hf = SimpleNamespace(rope_theta=1.0, rope_scaling=scaling, to_dict=lambda: {"a": 1})
            return SimpleNamespace(model=str(path), dtype="torch.bfloat16", hf_config=hf, hf_text_config=hf, max_model_len=longest, config_format="auto")

        main, draft = config(target, target_rope), config(drafter, changed.pop("draft_rope", None))
        vars(main).update(model or {})
        load = changed.pop("load_config", SimpleNamespace(load_format="auto"))
        guess = SimpleNamespace(**{"method": "eagle", "num_speculative_tokens": 2, "draft_model_config": draft} | changed)
        cache = SimpleNamespace(prefix_caching_hash_algo="sha256_cbor")
        vllm_config = SimpleNamespace(model_config=main, cache_config=cache, load_config=load, speculative_config=guess)
        return dict(identity.facts(vllm_config, "bfloat16", "t", "weights", b"0" * 32, warned.append))

    usual = record()
    assert record() == usual and record(longest=8192) == usual and not warned
    assert record(target_rope=rope) != record(target_rope=rope, longest=8192), "other factors for a longer context"
    assert record(draft_rope=rope) != record(draft_rope=rope, longest=8192)
    for changed in ({"method": "eagle3"}, {"num_speculative_tokens": 3}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}, {"max_model_len": 512}):
        assert record(**changed) != usual, changed
    online = {"quantization": "online", "quantization_config": {"linear": "fp8"}}
    assert record(model=online) != record(model=online | {"quantization_config": {"linear": "mxfp8"}}) != usual
    assert {key for key in usual if record(method="ngram").get(key) != usual[key]} == {"speculative"} and not warned
    unknown: list[dict[str, Any]] = [
        {"method": "custom_class"}, {"load_config": SimpleNamespace(load_format="dummy")}, {"model": {"hf_overrides": print}},
        {"draft_model_config": SimpleNamespace(model="/nowhere", dtype="x", hf_config=SimpleNamespace(), max_model_len=1)},
    ]
    for said, changed in enumerate(unknown):
        assert record(**changed)["speculative"] != record(**changed)["speculative"], "nobody else's"
        assert len(warned) == 2 * (said + 1) and "drafter" in warned[-1]
    draft = SimpleNamespace(model=str(target), dtype="x", hf_config=SimpleNamespace(), max_model_len=1)
    assert '"files":"weights"' in record(method="mtp", draft_model_config=draft)["speculative"]


def test_lora_of_the_same_name_and_path_with_other_content(engines: Engines, daemon: Daemon, model: Model, tmp_path: pathlib.Path) -> None:
    where = tmp_path / "adapter"
    adapter = {"name": "a", "id": 1, "path": str(where)}
    prompt = models.prompt(3, 300)

    def start(seed: int) -> Engine:
        models.make_lora(models.gqa(), where, seed)
        one = engines.start(model(models.gqa()), connector=patient(daemon.socket), enable_lora=True, max_lora_rank=8)
        attached(one, daemon)
        return one

    def comes_back(one: Engine) -> list[int]:
        """Until the prompt comes from the daemon: the adapter's files are read in the background, and nothing is stored before."""

        def loaded() -> list[int] | None:
            one.reset_local()
            batch = one.batch([prompt], lora=adapter)
            return batch.answers[0].tokens if batch.external == full_blocks(300) * 32 else None

        return wait_until("what the adapter computed is loaded", loaded, 60.0, every_s=0.1)

    first = start(1)
    right = first.ask(prompt, lora=adapter)
    assert comes_back(first) == right.tokens
    first.exit()
    second = start(2)
    batch = second.batch([prompt], lora=adapter)
    assert batch.external == 0, "the adapter's name and path are the same, its content is not"
    assert batch.answers[0].tokens != right.tokens
    assert comes_back(second) == batch.answers[0].tokens
    second.exit()
    assert comes_back(start(1)) == right.tokens


def test_states_without_prefix_caching_store_nothing_and_say_so_once(engines: Engines, daemon: Daemon, model: Model) -> None:
    engine = engines.start(model(models.qwen3next()), connector=patient(daemon.socket), enable_prefix_caching=False)
    prompt = models.prompt(4, 700)
    first = engine.ask(prompt)
    engine.reset_local()
    batch = engine.batch([prompt])
    assert (batch.external, batch.answers[0].tokens) == (0, first.tokens)
    assert daemon.resident() == 0
    lines = [line for line in engine.log.read_text(errors="replace").splitlines() if "kvd" in line and "neither stored nor loaded" in line]
    assert len(lines) == 1, lines
    assert "recurrent states" in lines[0]


def test_weights_epoch_on_reset(engines: Engines, daemon: Daemon, model: Model) -> None:
    """reset_cache: weights may have changed in place, so nothing stored before is loaded by this engine again; nobody's blocks are deleted."""
    engine = engines.start(model(models.gqa()), connector=patient(daemon.socket))
    attached(engine, daemon)
    base = daemon.resident()
    engine.ask(PROMPT)
    wait_stored(daemon, base + full_blocks(708))
    assert engine.call("reset", connector=True) is True
    assert engine.batch([PROMPT]).external == 0
    assert daemon.resident() >= base + full_blocks(708)
