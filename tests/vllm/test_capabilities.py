"""A vLLM that is too new or too old costs one line in the log: the engine serves, computes everything itself, and never crashes.

The vLLM of this environment is doctored: a hook has another name, takes more, or one more is asked for; a class is gone. What is real is
vLLM's scheduler and engine, which must get along with what kvd gives them instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

import doctored  # noqa: E402
import models  # noqa: E402
from conftest import Engines  # noqa: E402
from daemon import Daemon  # noqa: E402
from engine import patient  # noqa: E402
from harness import BLOCK, FULL, SHAPES, ScriptedEngine, Shape, WrongCache, make_config, make_kv  # noqa: E402

pytestmark = pytest.mark.plugin
Model = Callable[[models.Recipe], pathlib.Path]


def ours() -> list[str]:
    return [name for name in sys.modules if name == "kvdaemon.vllm" or name.startswith("kvdaemon.vllm.")]


@pytest.fixture
def anew() -> Iterator[Callable[[], Any]]:
    """Imports the package as if for the first time; afterwards everything is as it was."""
    kept = {name: sys.modules.pop(name) for name in ours()}
    yield lambda: importlib.import_module("kvdaemon.vllm")
    for name in ours():
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    def put(owner: Any, name: str, *value: Any) -> None:
        if value:
            monkeypatch.setattr(owner, name, value[0], raising=False)
        else:
            monkeypatch.delattr(owner, name)

    return lambda what: what(put)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of our logger. (No handler of its own: vLLM takes handlers away whenever it configures logging.)"""
    lines: list[str] = []
    usual = logging.Logger.handle

    def handle(self: logging.Logger, record: logging.LogRecord) -> None:
        if self.name == "vllm.kvdaemon":
            lines.append(record.getMessage())
        usual(self, record)

    monkeypatch.setattr(logging.Logger, "handle", handle)
    return lines


def serves(model: pathlib.Path, daemon: Daemon) -> ScriptedEngine:
    """vLLM's own scheduler with whatever class it was given: requests, hits in its own cache, preemption, an abort, a reset."""
    engine = ScriptedEngine(make_config(model, patient(daemon.socket), async_scheduling=False, blocks=20))
    for i in range(4):
        engine.add(models.prompt(20 + i, 90), 120)
    given_up = engine.add(models.prompt(30, 60), 20)
    for _ in range(3):
        engine.step()
    engine.abort(given_up)
    engine.drain()
    engine.check_answers(skip={given_up})
    engine.reset()
    assert engine.ask(models.prompt(20, 90), 4)[1] == 0
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    return engine


def test_this_vllm_lacks_nothing(anew: Callable[[], Any]) -> None:
    package = anew()
    from kvdaemon.vllm import capabilities, connector

    assert (capabilities.lacking(), capabilities.misfit(connector.KvdConnector)) == (None, None)
    assert issubclass(package.KvdConnector, connector.KvdConnector)
    for name, there in dataclasses.asdict(capabilities.found()).items():
        print(f"{name}: {there}")


@pytest.mark.parametrize("what", list(doctored.CHANGES))
def test_another_interface_is_one_line(
    what: str, anew: Callable[[], Any], change: Callable[..., None], said: list[str], daemon: Daemon, model: Model
) -> None:
    does, says = doctored.CHANGES[what]
    change(does)
    anew()
    engine = serves(model(models.gqa()), daemon)
    engine.close()
    assert daemon.resident() == 0
    lines = [line for line in said if "neither stored nor loaded" in line]
    assert len(lines) == 1, said
    assert says in lines[0] and "0.3" in lines[0], lines[0]


def test_a_connector_that_cant_be_made_is_one_line(
    anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, said: list[str], daemon: Daemon, model: Model
) -> None:
    """What no look at the classes tells."""
    anew()
    from kvdaemon.vllm import caches

    def other(*args: Any) -> None:
        raise AttributeError("'ParallelConfig' object has no attribute 'tensor_parallel_size'")

    monkeypatch.setattr(caches, "refuse_config", other)
    engine = serves(model(models.gqa()), daemon)
    engine.close()
    lines = [line for line in said if "neither stored nor loaded" in line]
    assert len(lines) == 1 and "tensor_parallel_size" in lines[0], said


def test_a_wrong_setting_is_still_an_error(anew: Callable[[], Any], daemon: Daemon, model: Model) -> None:
    anew()
    with pytest.raises(ValueError, match="unknown key"):
        ScriptedEngine(make_config(model(models.gqa()), patient(daemon.socket, sockett="x"), async_scheduling=False))


def test_no_connectors_at_all(anew: Callable[[], Any], change: Callable[..., None]) -> None:
    """Then there is no class that vLLM would take. The error says with which versions kvd goes."""
    change(lambda put: put(importlib.import_module(doctored.BASE), "KVConnectorBase_V1"))
    with pytest.raises(ImportError, match=r"needs vLLM 0\.30"):
        anew()


def test_an_unknown_kind_of_cache_is_refused(anew: Callable[[], Any], daemon: Daemon, model: Model) -> None:
    """One that looks like full attention to isinstance: what its cells mean is not known."""
    anew()
    from kvdaemon.vllm import caches
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ForgetfulAttentionSpec(FullAttentionSpec):
        pass

    config = make_config(model(models.gqa()), patient(daemon.socket), async_scheduling=False)
    plain = make_kv(config, FULL)
    assert caches.refuse_config(config, plain) is None
    spec = plain.kv_cache_groups[0].kv_cache_spec
    odd = ForgetfulAttentionSpec(block_size=BLOCK, num_kv_heads=spec.num_kv_heads, head_size=spec.head_size, dtype=spec.dtype)
    plain.kv_cache_groups[0].kv_cache_spec = odd
    assert "ForgetfulAttentionSpec" in (caches.refuse_config(config, plain) or "")


def test_hits_within_a_block_of_states_are_refused(anew: Callable[[], Any], model: Model) -> None:
    """vLLM's own function says why: a block that is copied on in the step that fills it is read before. Where that is mended, this
    fails, and the refusal can go."""
    anew()
    from kvdaemon.vllm import caches, capabilities

    def said(shape: Shape) -> str | None:
        config = make_config(model(models.gqa()), None, async_scheduling=False, shape=shape)
        return caches.refuse_config(config, make_kv(config, shape))

    fine = SHAPES["states-fine"]
    assert "unset prefix_match_unit" in (said(fine) or "")
    assert said(dataclasses.replace(fine, args=())) is None and said(SHAPES["windows-long"]) is None and said(SHAPES["all"]) is None
    config = make_config(model(models.gqa()), None, async_scheduling=False, shape=fine)
    assert "unset" in (caches.refuse_hits_within_blocks(config, None) or ""), "a tier may not find the configuration of the KV cache"
    kv = make_kv(config, fine)
    config.cache_config.prefix_match_unit = None
    if capabilities.found().stated_hash_size:  # before, the setting alone decides
        assert "different sizes" in (caches.refuse_hits_within_blocks(config, kv) or "")
    assert caches.refuse_hits_within_blocks(config, None) is None
    utils = importlib.import_module("vllm.v1.worker.utils")
    blocks = torch.arange(4.0).reshape(4, 1)
    utils.copy_kv_cache_blocks_inplace([blocks], 4, [(0, 1), (1, 2)])
    assert blocks.flatten().tolist() == [0, 0, 1, 3], "0, 0, 0, 3 would be right"


def test_more_drafts_than_a_block_of_states_has_tokens(anew: Callable[[], Any], model: Model) -> None:
    """Refused, for vLLM's states are wrong then, without any connector: the worker copies one to where the request's newest is. Where
    that is mended, this fails, and the refusal can go."""
    anew()
    from kvdaemon.vllm import caches

    def config(drafts: int, shape: str = "states") -> Any:
        return make_config(
            model(models.gqa()), None, async_scheduling=True, shape=SHAPES[shape], spec_tokens=drafts, blocks=512, budget=64,
            prefix_cache_retention_interval=BLOCK,
        )

    def said(drafts: int, shape: str = "states") -> str | None:
        one = config(drafts, shape)
        return caches.refuse_config(one, make_kv(one, SHAPES[shape]))

    assert f"({BLOCK}) as their blocks have tokens" in (said(BLOCK) or "")
    assert said(BLOCK - 1) is None and said(BLOCK + 8, "windows") is None
    tier = config(BLOCK)
    assert caches.refuse_wrong_kv(tier, None) is None
    tier.cache_config.mamba_block_size = BLOCK
    assert "drafts" in (caches.refuse_wrong_kv(tier, None) or ""), "a tier may not find the configuration of the KV cache"

    def asks(drafts: int) -> None:
        for seed in range(5000, 5010):
            with contextlib.closing(ScriptedEngine(config(drafts), spec_tokens=drafts, shape=SHAPES["states"])) as engine:
                engine.ask(models.prompt(seed, 412), 100)

    asks(BLOCK - 1)
    with pytest.raises(WrongCache, match="does not hold the state"):
        asks(BLOCK + 8)


def test_settings_that_are_refused(anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    """Each with its reason; and what none of them is, is not."""
    anew()
    from kvdaemon.vllm import caches, capabilities

    kv = make_kv(make_config(model(models.gqa()), None, async_scheduling=False), FULL)
    without = dataclasses.replace(capabilities.found(), sleep_hooks=False)
    monkeypatch.setattr(capabilities, "found", lambda: without)

    def said(where: str = "", **setting: Any) -> str | None:
        parts = {name: SimpleNamespace(**(setting if name == where else {})) for name in ("parallel_config", "cache_config", "model_config")}
        return caches.refuse_config(SimpleNamespace(**parts), kv)  # type: ignore[arg-type]

    assert said() is None
    assert "decode_context_parallel_size" in (said("parallel_config", decode_context_parallel_size=2) or "")
    assert "prefill_context_parallel_size" in (said("parallel_config", prefill_context_parallel_size=2) or "")
    assert "calculate_kv_scales" in (said("cache_config", calculate_kv_scales=True) or "")
    assert "sleep mode" in (said("model_config", enable_sleep_mode=True) or "")


def test_blocks_that_hashes_do_not_divide_are_refused(
    anew: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, said: list[str], daemon: Daemon, model: Model
) -> None:
    anew()
    from kvdaemon.vllm import capabilities

    monkeypatch.setattr(capabilities, "hash_tokens", lambda *_: 24)
    engine = serves(model(models.gqa()), daemon)
    assert "no multiples of the 24 tokens" in engine.connector.debug_stats()["config_refusal"]
    engine.close()
    assert daemon.resident() == 0
    assert len([line for line in said if "neither stored nor loaded" in line]) == 1, said


@pytest.mark.engine
def test_a_real_engine_serves_without_kvd(engines: Engines, daemon: Daemon, model: Model) -> None:
    """In processes of its own, so that what the scheduler's half says reaches the worker's."""
    what = "class gone"
    connector = patient(daemon.socket) | {"kv_connector_module_path": "doctored"}
    engine = engines.start(model(models.gqa()), connector=connector, env={"KVD_TEST_DOCTOR": what})
    prompt = models.prompt(1, 300)
    first = engine.ask(prompt)
    assert engine.ask(prompt).cached == 288, "vLLM's own prefix cache works"
    engine.reset_local()
    batch = engine.batch([prompt])
    assert (batch.external, batch.answers[0].tokens) == (0, first.tokens)
    assert daemon.resident() == 0
    lines = [line for line in engine.log.read_text(errors="replace").splitlines() if "neither stored nor loaded" in line]
    assert len(lines) == 1 and doctored.CHANGES[what][1] in lines[0], lines
