"""vLLM's real Scheduler and AsyncScheduler drive the connector through what end-to-end runs on a CPU can't show (the CPU platform
forces async scheduling off), with a scripted model that checks every byte it would attend to.

Every scenario runs with a simple connector of vLLM's own kind first, which shows that the harness is right, and with ours. That the
harness notices wrong connectors is a test, too.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

import daemon as daemon_module  # noqa: E402
import memory_connector  # noqa: E402
import models  # noqa: E402
from conftest import SOAK  # noqa: E402
from engine import kv_transfer, patient  # noqa: E402
from harness import BLOCK, ScriptedEngine, WrongCache, continuation, make_config  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402


def memory(**extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "MemoryConnector", "kv_connector_module_path": "memory_connector", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra,
    }


@dataclasses.dataclass
class Rig:
    """A connector under test and a way to make engines with it."""

    kind: str
    is_async: bool
    path: pathlib.Path
    daemon: daemon_module.Daemon | None
    made: list[ScriptedEngine] = dataclasses.field(default_factory=list)

    def engine(self, *, spec_tokens: int = 0, as_users_do: bool = False, memory_extra: dict[str, Any] | None = None, **options: Any) -> ScriptedEngine:
        connector = memory(**(memory_extra or {"delay": 2})) if self.daemon is None else (kv_transfer if as_users_do else patient)(self.daemon.socket)
        config = make_config(self.path, connector, async_scheduling=self.is_async, spec_tokens=spec_tokens, **options)
        one = ScriptedEngine(config, spec_tokens=spec_tokens)
        self.made.append(one)
        if self.daemon is not None:
            one.run_until("the connector has registered", lambda: self.registered(one))
        return one

    def registered(self, one: ScriptedEngine) -> bool:
        """Both halves are attached: a request stores, and its blocks become visible."""
        if getattr(one, "warm", False):
            return True
        before = self.stored()
        one.ask(models.prompt(900 + len(self.made) + one.serial * 1000, BLOCK + 1), 1)
        one.warm = self.stored() > before
        one.requests.clear()
        return one.warm

    def stored(self) -> int:
        return len(memory_connector.STORE) if self.daemon is None else self.daemon.resident()

    def wait_stored(self, engine: ScriptedEngine, count: int) -> None:
        engine.run_until(f"{count} blocks are stored, {self.stored()} are", lambda: self.stored() >= count)
        assert self.stored() == count


@pytest.fixture(params=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return request.param == "async"


@pytest.fixture(params=["memory", pytest.param("kvd", marks=pytest.mark.plugin)])
def rig(request: pytest.FixtureRequest, is_async: bool, model: Callable[[models.Recipe], pathlib.Path]) -> Iterator[Rig]:
    memory_connector.STORE.clear()
    one = Rig(request.param, is_async, model(models.gqa()), request.getfixturevalue("daemon") if request.param == "kvd" else None)
    yield one
    for engine in one.made:
        engine.close()


def test_store_then_load(rig: Rig) -> None:
    engine = rig.engine()
    base = rig.stored()
    prompt = models.prompt(1, 200)
    assert engine.ask(prompt, 40)[1] == 0
    rig.wait_stored(engine, base + (200 + 40 - 1) // BLOCK)
    engine.reset()
    assert engine.ask(prompt, 40)[1] == 200 // BLOCK * BLOCK
    # Blocks that were generated count as much as those of the prompt.
    engine.reset()
    assert engine.ask(prompt + continuation(prompt, 40), 5)[1] == 7 * BLOCK


@pytest.mark.parametrize(("count", "blocks"), [(24, 6), (25, 7)])
def test_last_full_block_of_a_finished_request(rig: Rig, count: int, blocks: int) -> None:
    """200 + 25 tokens: 224 were computed, and the seventh block became full with the last one of them."""
    engine = rig.engine()
    base = rig.stored()
    engine.ask(models.prompt(2, 200), count)
    rig.wait_stored(engine, base + blocks)


def test_another_engine_loads(rig: Rig) -> None:
    first = rig.engine()
    base = rig.stored()
    prompt = models.prompt(3, 300)
    first.ask(prompt, 4)
    rig.wait_stored(first, base + 9)
    second = rig.engine()
    assert second.ask(prompt, 4)[1] == 9 * BLOCK


def test_deferred_lookup(rig: Rig) -> None:
    """`None` from get_num_new_matched_tokens: asked again in the next step, and nobody else is held up."""
    engine = rig.engine(memory_extra={"delay": 2, "defer": 3})
    base = rig.stored()
    prompt = models.prompt(4, 200)
    engine.ask(prompt, 4)
    rig.wait_stored(engine, base + 6)
    engine.reset()
    answers: list[Any] = []
    usual = engine.connector.get_num_new_matched_tokens

    def noted(request: Any, computed: int) -> Any:
        answers.append(usual(request, computed))
        return answers[-1]

    engine.connector.get_num_new_matched_tokens = noted
    other = engine.add(models.prompt(5, 40), 60)
    engine.run_until("the other one runs", lambda: len(engine.answers[other]) > 2)
    before = engine.external_hits
    engine.add(prompt, 4)
    engine.drain()
    engine.check_answers()
    assert engine.external_hits - before == 192
    assert (192, True) in answers or (192, False) in answers
    if rig.kind == "memory":
        assert (None, False) in answers


def test_two_requests_on_one_prefix(rig: Rig) -> None:
    engine = rig.engine()
    base = rig.stored()
    prompt = models.prompt(6, 256)
    engine.ask(prompt, 4)
    rig.wait_stored(engine, base + 8)
    engine.reset()
    for i in range(3):
        engine.add(prompt + models.prompt(60 + i, 20), 6)
    engine.drain()
    engine.check_answers()
    if rig.daemon is not None:
        loaded = int(rig.daemon.status()["loads"]["hit"])
        assert loaded <= 8, "requests that load the same prefix share one load"


def test_same_prompt_at_once_cold(rig: Rig) -> None:
    engine = rig.engine()
    base = rig.stored()
    for _ in range(3):
        engine.add(models.prompt(7, 200), 10)
    engine.drain()
    engine.check_answers()
    rig.wait_stored(engine, base + (200 + 10 - 1) // BLOCK)


def test_chunked_prefill(rig: Rig) -> None:
    engine = rig.engine(budget=48)
    base = rig.stored()
    prompt = models.prompt(8, 500)
    other = engine.add(models.prompt(9, 30), 50)
    engine.add(prompt, 4)
    engine.drain()
    engine.check_answers()
    rig.wait_stored(engine, base + 15 + 2)
    engine.reset()
    assert engine.ask(prompt, 4)[1] == 15 * BLOCK
    assert other in engine.finish


def test_preemption_in_the_same_step(rig: Rig) -> None:
    """A pool too small for all: running requests lose their blocks in the very step in which others get them."""
    engine = rig.engine(blocks=20)
    prompts = [models.prompt(20 + i, 90) for i in range(4)]
    names = [engine.add(p, 120) for p in prompts]
    preempted = 0
    while engine.step():
        preempted = max([preempted, *(r.num_preemptions for r in engine.scheduler.requests.values())])
    engine.drain()
    engine.check_answers()
    assert preempted > 0, "the pool was not small enough"
    # What was stored meanwhile is right: load all of it.
    for name, prompt in zip(names, prompts):
        engine.reset()
        assert engine.ask(prompt + continuation(prompt, 120), 2)[1] > 0, name


def test_abort_at_every_stage(rig: Rig) -> None:
    """Aborted before it is scheduled, while it is looked up, loaded, filled in, decoded, and after: no block stays behind, the others go on."""
    engine = rig.engine(budget=64)
    base = rig.stored()
    prompt = models.prompt(30, 330)
    engine.ask(prompt, 4)
    rig.wait_stored(engine, base + 10)
    for stage in range(0, 24 if not SOAK else 120):
        engine.reset()
        other = engine.add(models.prompt(31, 70), 12)
        one = engine.add(prompt[: 250 + stage], 8)
        for _ in range(stage):
            engine.step()
        engine.abort(one)
        engine.drain()
        engine.check_answers(skip={one})
        assert other in engine.finish
        engine.requests.clear()
        engine.answers.clear()


def test_abort_all_while_loading(rig: Rig) -> None:
    engine = rig.engine(memory_extra={"delay": 5})
    base = rig.stored()
    prompt = models.prompt(33, 256)
    engine.ask(prompt, 4)
    rig.wait_stored(engine, base + 8)
    engine.reset()
    one = engine.add(prompt, 4)
    engine.run_until(
        "it is loading, or has loaded", lambda: (r := engine.request(one)) is not None and r.status in (RequestStatus.WAITING_FOR_REMOTE_KVS, RequestStatus.RUNNING)
    )
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    engine.drain()
    # Its blocks are anybody's now, and hold what their new owner computes.
    engine.reset()
    engine.ask(models.prompt(34, 600), 8)


@pytest.mark.parametrize("connector_too", [False, True])
def test_prefix_cache_reset_while_running(rig: Rig, connector_too: bool) -> None:
    engine = rig.engine()
    names = [engine.add(models.prompt(40 + i, 100), 40) for i in range(3)]
    engine.run_until("all run", lambda: all(len(engine.answers[n]) > 3 for n in names))
    engine.settle()  # vLLM itself refuses while a step is under way: it defers the freeing of blocks then
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=connector_too) is not False
    engine.drain()
    engine.check_answers()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)


@pytest.mark.parametrize("spec", [1, 3])
def test_speculative_rejection(rig: Rig, spec: int) -> None:
    """Rejected drafts leave KV of tokens that never were; nothing of it may be stored."""
    engine = rig.engine(spec_tokens=spec)
    base = rig.stored()
    prompts = [models.prompt(50 + i, 150 + 7 * i) for i in range(3)]
    for p in prompts:
        engine.add(p, 100)
    engine.drain()
    engine.check_answers()
    rig.wait_stored(engine, base + sum((len(p) + 100 - 1) // BLOCK for p in prompts))
    for p in prompts:
        engine.reset()
        whole = p + continuation(p, 100)
        assert engine.ask(whole + [5], 4)[1] == (len(p) + 99) // BLOCK * BLOCK


def test_requests_that_skip_reading_take_nothing(rig: Rig) -> None:
    engine = rig.engine()
    base = rig.stored()
    prompt = models.prompt(70, 200)
    engine.ask(prompt, 4)
    rig.wait_stored(engine, base + 6)
    engine.reset()
    assert engine.ask(prompt, 4, skip_reading_prefix_cache=True)[1] == 0
    engine.reset()
    assert engine.ask(prompt, 4)[1] == 192


def test_failed_load_is_recomputed(rig: Rig) -> None:
    engine = rig.engine(memory_extra={"delay": 2, "fail_block": 3})
    base = rig.stored()
    prompt = models.prompt(80, 330)
    engine.ask(prompt, 4)
    rig.wait_stored(engine, base + 10)
    if rig.daemon is not None:
        for i in range(0, 60, 16):
            rig.daemon.flip_byte(skip=20 + i)
    engine.reset()
    before = engine.model.computed_tokens
    name = engine.add(prompt, 4)
    engine.drain()
    engine.check_answers()
    assert name in engine.finish
    assert engine.model.computed_tokens - before > 330 - 10 * BLOCK + 4, "nothing was recomputed"


def scramble(rig: Rig, seed: int, spec: int) -> None:
    """A random mixture of everything, all of it checked by the model."""
    rng = random.Random(seed)
    extra = {"delay": rng.randrange(1, 5), "defer": rng.randrange(3)}
    engine = rig.engine(spec_tokens=spec, blocks=rng.choice([24, 40, 64]), budget=rng.choice([64, 128, 512]), memory_extra=extra)
    roots = [models.prompt(1000 * seed + i, rng.randrange(20, 260)) for i in range(4)]
    aborted: set[str] = set()
    for _ in range(120 if not SOAK else 1000):
        act = rng.random()
        live = [n for n in engine.requests if n in engine.scheduler.requests]
        if act < 0.25 and len(live) < 7:
            root = rng.choice(roots)
            engine.add(root + continuation(root, rng.randrange(0, 80)) + models.prompt(rng.randrange(5), rng.randrange(1, 40)), rng.randrange(1, 60))
        elif act < 0.30 and live:
            aborted.add(name := rng.choice(live))
            engine.abort(name)
        elif act < 0.33:
            engine.scheduler.reset_prefix_cache()
        else:
            for _ in range(rng.randrange(1, 8)):
                engine.step()
    engine.drain()
    engine.check_answers(skip=aborted)
    # Whatever was stored on the way is right: load it.
    for root in roots:
        engine.reset()
        engine.ask(root + continuation(root, 100), 2)
    assert engine.external_hits > 0, "nothing was loaded: this seed shows nothing"


@pytest.mark.parametrize("spec", [0, 3])
@pytest.mark.parametrize("seed", range(4 if not SOAK else 100))
def test_scrambled(rig: Rig, seed: int, spec: int) -> None:
    scramble(rig, seed, spec)


# The harness notices -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fault", "spec", "noticed"),
    [("store-unverified", 3, (WrongCache,)), ("store-late", 0, (WrongCache,)), ("load-wrong-block", 0, (WrongCache,)), ("never-done", 0, (TimeoutError,))],
)
def test_harness_notices(fault: str, spec: int, noticed: tuple[type[Exception], ...], is_async: bool, model: Callable[[models.Recipe], pathlib.Path]) -> None:
    memory_connector.STORE.clear()
    config = make_config(model(models.gqa()), memory(fault=fault), async_scheduling=is_async, spec_tokens=spec, blocks=20)
    engine = ScriptedEngine(config, spec_tokens=spec)
    prompts = [models.prompt(20 + i, 90) for i in range(4)]
    with pytest.raises(noticed):
        for p in prompts:
            engine.add(p, 120)
        engine.drain(5.0)
        for p in prompts:
            engine.reset()
            engine.add(p + continuation(p, 120), 2)
            engine.drain(2.0)


# A daemon that fails ---------------------------------------------------------------------------------------------
kvd_only = pytest.mark.plugin


@pytest.fixture
def kvd_rig(is_async: bool, model: Callable[[models.Recipe], pathlib.Path], daemon: daemon_module.Daemon) -> Iterator[Rig]:
    one = Rig("kvd", is_async, model(models.gqa()), daemon)
    yield one
    for engine in one.made:
        engine.close()


@kvd_only
def test_stores_begin_in_a_step_that_computes_nothing(kvd_rig: Rig) -> None:
    """Before 0.31 vLLM does not call `wait_for_save` in such a step. The last blocks of a finished request are stored all the same."""
    engine = kvd_rig.engine()
    engine.model.quiet = True
    base = kvd_rig.stored()
    engine.ask(models.prompt(140, 200), 25)
    kvd_rig.wait_stored(engine, base + 7)


@kvd_only
def test_daemon_killed_and_back(kvd_rig: Rig) -> None:
    engine, daemon = kvd_rig.engine(), kvd_rig.daemon
    assert daemon is not None
    base = kvd_rig.stored()
    prompt = models.prompt(100, 330)
    engine.ask(prompt, 4)
    kvd_rig.wait_stored(engine, base + 10)
    names = [engine.add(models.prompt(101 + i, 200), 60) for i in range(3)]
    engine.run_until("they run", lambda: all(len(engine.answers[n]) > 5 for n in names))
    daemon.kill()
    engine.reset() if not engine.scheduler.running else None
    engine.add(prompt, 4)
    engine.drain()
    engine.check_answers()
    daemon.start()
    engine.requests.clear()

    def again() -> bool:
        engine.reset()
        return engine.ask(prompt, 4)[1] == 320

    engine.run_until("the same engine stores and hits again", again)


@kvd_only
def test_daemon_hangs(kvd_rig: Rig) -> None:
    """SIGSTOP: the scheduler's hooks never wait for the socket; everything ends, and comes back."""
    engine, daemon = kvd_rig.engine(as_users_do=True), kvd_rig.daemon
    assert daemon is not None and engine.times is not None
    base = kvd_rig.stored()
    prompt = models.prompt(110, 330)
    engine.ask(prompt, 4)
    kvd_rig.wait_stored(engine, base + 10)
    names = [engine.add(models.prompt(111 + i, 200), 60) for i in range(3)]
    engine.run_until("they run", lambda: all(len(engine.answers[n]) > 5 for n in names))
    daemon.pause()
    try:
        engine.times.clear()
        for i in range(4):
            engine.add(models.prompt(120 + i, 100) if i else prompt, 20)
        engine.drain()
        engine.check_answers()
        p50, p99, worst = (engine.times.spread()["all"][part] for part in ("p50", "p99", "max"))
        print(f"\nscheduler hooks with a stopped daemon: p50 {p50:.1f} us, p99 {p99:.1f} us, worst {worst:.1f} us")
    finally:
        daemon.resume()
    engine.requests.clear()

    def again() -> bool:
        engine.reset()
        return engine.ask(prompt, 4)[1] == 320

    engine.run_until("the same engine hits again", again)


@kvd_only
def test_daemon_comes_late(is_async: bool, model: Callable[[models.Recipe], pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    daemon = daemon_module.Daemon(tmp_path_factory.mktemp("d"))
    config = make_config(model(models.gqa()), patient(daemon.socket), async_scheduling=is_async)
    engine = ScriptedEngine(config)
    try:
        prompt = models.prompt(130, 200)
        assert engine.ask(prompt, 4)[1] == 0
        daemon.start()

        def hit() -> bool:
            engine.reset()
            return engine.ask(prompt, 4)[1] == 192

        engine.run_until("it stores and hits", hit)
    finally:
        engine.close()
        daemon.close()


