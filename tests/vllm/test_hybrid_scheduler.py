"""Models with several KV-cache groups on vLLM's real Scheduler and AsyncScheduler: sliding windows, recurrent states, blocks of different sizes.

The scripted model reads what each group's layers would read, and notices writes into blocks that the connector keeps or loads. After every
scenario no block and no request is left behind on either side. Random schedules (`random_schedule`) mix all of it, by seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

import daemon as daemon_module  # noqa: E402
import models  # noqa: E402
from conftest import SOAK  # noqa: E402
from engine import kv_transfer, multi, patient  # noqa: E402
from harness import SHAPES, Careless, ScriptedEngine, Shape, WrongCache, continuation, make_config  # noqa: E402
from scripted import STATES_OFFERED  # noqa: E402
from vllm.v1.core.sched.interface import PauseState  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

_serials = itertools.count(1_000_000_000)  # of prompts that nobody else asks
HYBRID = [name for name in SHAPES if name != "full"]
OUTGROWING = [name for name in HYBRID if SHAPES[name].outgrows]
plugin = pytest.mark.plugin


@dataclasses.dataclass
class Rig:
    """A daemon (or none) and a way to make engines of a shape."""

    path: pathlib.Path
    daemon: daemon_module.Daemon | None
    is_async: bool
    shape: Shape
    as_child: bool = False
    """The connector is a MultiConnector's."""
    made: list[ScriptedEngine] = dataclasses.field(default_factory=list)

    def engine(
        self, *, spec_tokens: int = 0, blocks: int = 256, connector: dict[str, Any] | None = None, wait: bool = True, **options: Any
    ) -> ScriptedEngine:
        """Unless told not to, waits until it stores."""
        # vLLM offers states only where the same prompt would look for one, unless it is told to keep more.
        if self.shape.outgrows:
            options.setdefault("prefix_cache_retention_interval", self.shape.unit)
        if connector is None and self.daemon is not None:
            connector = patient(self.daemon.socket)
        if self.as_child and connector is not None:
            connector = multi(connector)
        config = make_config(
            self.path, connector, async_scheduling=self.is_async, spec_tokens=spec_tokens, blocks=blocks, shape=self.shape, **options
        )
        one = ScriptedEngine(config, spec_tokens=spec_tokens, shape=self.shape)
        self.made.append(one)
        if self.daemon is not None and wait:
            def stores() -> bool:
                one.ask(self.prompt(self.shape.unit + 1), 1)
                return one.ours.debug_stats()["done_blocks"] > 0

            one.run_until("the connector has registered", stores)
            self.settle(one)
            one.requests.clear()
            one.reset()
        return one

    def settle(self, engine: ScriptedEngine) -> None:
        """Until every store is over, on both sides."""
        engine.run_until("no copy is under way", lambda: engine.ours.debug_stats()["blocks_in_flight"] == 0)
        if self.daemon is not None:
            engine.run_until("the daemon has all", self.daemon.no_store_is_open)

    @staticmethod
    def prompt(length: int) -> list[int]:
        """One that nobody else asks."""
        return models.prompt(next(_serials), length)

    def hit(self, tokens: int) -> int:
        """The longest hit of a prompt that shares so many tokens, where every step ended at a multiple of 64 tokens."""
        step = 64 if self.shape.states else self.shape.unit
        return tokens // step * step


def idle(engine: ScriptedEngine) -> None:
    """Nothing is left behind: no block, no request, no copy."""
    engine.drain()
    stats = engine.ours.debug_stats()
    left = {name: stats[name] for name in ("blocks_held", "blocks_in_flight", "requests_known", "loads_under_way") if stats[name]}
    assert not left, left
    assert not engine.watch.kept
    assert not engine.watch.loads


@contextlib.contextmanager
def closing(rig: Rig) -> Iterator[Rig]:
    """What every test ends with, failed or not."""
    try:
        yield rig
    finally:
        for engine in rig.made:
            engine.close()


@pytest.fixture(params=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return request.param == "async"


@pytest.fixture(params=HYBRID)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[str(request.param)]


@pytest.fixture
def rig(shape: Shape, is_async: bool, model: Callable[[models.Recipe], pathlib.Path], module_daemon: daemon_module.Daemon) -> Iterator[Rig]:
    """Shares a daemon with other tests: prompts are the test's own."""
    with closing(Rig(model(models.gqa()), module_daemon, is_async, shape)) as one:
        yield one


@pytest.fixture
def own_rig(shape: Shape, is_async: bool, model: Callable[[models.Recipe], pathlib.Path], daemon: daemon_module.Daemon) -> Iterator[Rig]:
    """With a daemon that the test may stop and damage."""
    with closing(Rig(model(models.gqa()), daemon, is_async, shape)) as one:
        yield one


def hasty(rig: Rig, **extra: Any) -> dict[str, Any]:
    """A connector that soon gives up on a daemon that does not answer."""
    assert rig.daemon is not None
    return kv_transfer(rig.daemon.socket, **({"lookup_deadline_ms": 50, "hold_deadline_ms": 100} | extra))


def stops_when_it_loads(engine: ScriptedEngine, daemon: daemon_module.Daemon) -> list[bool]:
    """SIGSTOP before the workers begin the first load that was promised; what is given is no longer empty then."""
    stopped: list[bool] = []

    def stop(out: Any) -> None:
        if engine.watch.loads and not stopped:
            daemon.pause()
            stopped.append(True)

    engine.model.before_execute.append(stop)
    return stopped


# Hits ---------------------------------------------------------------------------------------------------------------
@plugin
def test_hits_of_every_length(rig: Rig) -> None:
    """Of all of a prompt, of its head, of less than a window; in the engine that stored it and in another."""
    first = rig.engine(budget=64)
    prompt = rig.prompt(400)
    assert first.ask(prompt, 8)[1] == 0
    rig.settle(first)
    second = rig.engine(budget=64)
    for engine in (first, second):
        for shared in (399, 320, 257, 200, 130, 97, 64, 40):
            engine.reset()
            asked = prompt[:shared] + rig.prompt(50)
            assert engine.ask(asked, 8)[1] == rig.hit(shared), shared
            rig.settle(engine)
        assert engine.ours.debug_stats()["load_failures"] == 0
        idle(engine)


@plugin
def test_a_hit_goes_on_where_the_engines_own_ends(rig: Rig) -> None:
    """The engine's own cache has the head; the daemon has more."""
    first = rig.engine(budget=64)
    prompt = rig.prompt(500)
    first.ask(prompt, 8)
    rig.settle(first)
    second = rig.engine(budget=64)
    assert second.ask(prompt[:200], 2)[1] == rig.hit(199)
    # The last boundary of a prompt is one at which vLLM ends a step, too.
    assert second.ask(prompt, 8)[1] == 499 // rig.shape.unit * rig.shape.unit - rig.hit(199)
    idle(second)


@plugin
def test_what_was_generated_is_hit(rig: Rig) -> None:
    """A long answer outgrows its windows and states many times."""
    engine = rig.engine()
    prompt = rig.prompt(70)
    engine.ask(prompt, 300)
    rig.settle(engine)
    assert engine.watch.most_kept > 0 or not rig.shape.outgrows
    whole = prompt + continuation(prompt, 300)
    for length in (360, 300, 210):
        engine.reset()
        loaded = engine.ask(whole[:length], 3)[1]
        assert loaded == (length - 1) // rig.shape.unit * rig.shape.unit, length
        rig.settle(engine)
    idle(engine)


# Preemption, abort ----------------------------------------------------------------------------------------------------
@plugin
def test_preempted_requests_come_back(rig: Rig) -> None:
    blocks = {"sizes": 26, "windows-long-full": 34, "windows-long": 34, "states-fine": 24}.get(rig.shape.name, 40)
    engine = rig.engine(blocks=blocks, budget=128)
    prompts = [rig.prompt(90) for _ in range(4)]
    for p in prompts:
        engine.add(p, 160)
    preempted = 0
    while engine.step():
        preempted = max([preempted, *(r.num_preemptions for r in engine.scheduler.requests.values())])
    idle(engine)
    engine.check_answers()
    assert preempted > 0, "the pool was not small enough"
    for p in prompts:
        engine.reset()
        engine.ask(p + continuation(p, 160), 2)
    idle(engine)


@plugin
def test_abort_at_every_stage(rig: Rig) -> None:
    engine = rig.engine(budget=64)
    prompt = rig.prompt(330)
    engine.ask(prompt, 4)
    rig.settle(engine)
    for stage in range(0, 14 if not SOAK else 80):
        engine.reset()
        other = engine.add(rig.prompt(70), 12)
        one = engine.add(prompt[: 250 + stage], 8)
        for _ in range(stage):
            engine.step()
        engine.abort(one)
        idle(engine)
        engine.check_answers(skip={one})
        assert other in engine.finish
        engine.requests.clear()
        engine.answers.clear()


@plugin
def test_abort_while_loading(rig: Rig) -> None:
    """Its blocks are anybody's once the load is over, and not before."""
    engine = rig.engine()
    prompt = rig.prompt(256)
    engine.ask(prompt, 4)
    rig.settle(engine)
    engine.reset()
    one = engine.add(prompt, 4)
    engine.run_until("it is loading", lambda: bool(engine.watch.loads) or one in engine.finish)
    engine.abort(one)
    engine.add(rig.prompt(600), 8)
    idle(engine)
    engine.check_answers(skip={one})


@plugin
@pytest.mark.skipif(not STATES_OFFERED, reason="this vLLM offers no states")
@pytest.mark.parametrize("trusting", [False, True])
def test_states_that_were_given_away_before_they_were_offered(
    trusting: bool, monkeypatch: pytest.MonkeyPatch, model: Callable[[models.Recipe], pathlib.Path], daemon: daemon_module.Daemon
) -> None:
    """With async scheduling and drafts, vLLM offers blocks that are another request's by then. Who trusts the offer keeps a block that others write."""
    from kvdaemon.vllm import capture

    usual: Callable[[Any, int], bytes] = capture.make_block_hash_with_group_id
    stale: list[Any] = []

    class Offered(bytes):
        """The hash under which the pool should find a block that is offered."""

        __hash__ = bytes.__hash__

        def __eq__(self, found_by: object) -> bool:
            if not (is_still := bytes(self) == found_by):
                stale.append(found_by)
            return trusting or is_still

    monkeypatch.setattr(capture, "make_block_hash_with_group_id", lambda hash, group: Offered(usual(hash, group)))
    with closing(Rig(model(models.gqa()), daemon, True, SHAPES["all"])) as rig:
        engine = rig.engine(spec_tokens=3, blocks=64, budget=128)

        def many() -> bool:
            for i in range(40):
                engine.add(rig.prompt(20 + 11 * i % 90), 90)
                for _ in range(4):
                    engine.step()
            idle(engine)
            return bool(stale)

        # When an offer is stale, and whether the block is still being copied when it is written, is chance.
        if not trusting:
            engine.run_until("an offer is stale", many)
            engine.check_answers()
        else:
            with pytest.raises(AssertionError):
                for _ in range(12):
                    many()


# Daemons and bytes that fail --------------------------------------------------------------------------------------
@plugin
def test_a_block_that_does_not_load_is_recomputed(own_rig: Rig) -> None:
    """Whichever group's it is. The engine computes the request from the start, and stores what was lost."""
    engine, daemon = own_rig.engine(budget=64), own_rig.daemon
    assert daemon is not None
    prompt = models.prompt(80, 330)
    engine.ask(prompt, 4)
    own_rig.settle(engine)
    failures = 0
    for skip in range(1, 120 if own_rig.shape.outgrows else 90, 7):
        daemon.flip_byte(skip)
        engine.reset()
        engine.ask(prompt, 4)
        own_rig.settle(engine)
        idle(engine)
        failures = engine.ours.debug_stats()["load_failures"]
    assert failures > 0
    engine.reset()
    assert engine.ask(prompt, 4)[1] == own_rig.hit(329), "all of it is there again"
    idle(engine)


@plugin
@pytest.mark.parametrize("comes_back", [True, False])
def test_daemon_stops_while_it_loads(own_rig: Rig, comes_back: bool) -> None:
    """SIGSTOP before the workers begin a load that was promised; then it goes on, or is killed and started anew."""
    daemon = own_rig.daemon
    assert daemon is not None
    engine = own_rig.engine(connector=patient(daemon.socket, load_deadline_ms=300))
    prompt = models.prompt(100, 330)
    engine.ask(prompt, 4)
    own_rig.settle(engine)
    engine.reset()
    others = [engine.add(models.prompt(101 + i, 100), 30) for i in range(2)]
    engine.run_until("they run", lambda: all(len(engine.answers[n]) > 2 for n in others))
    stopped = stops_when_it_loads(engine, daemon)
    engine.add(prompt, 4)
    engine.run_until("the load was ordered", lambda: bool(stopped))
    for _ in range(5):
        engine.step()
    if comes_back:
        daemon.resume()
    else:
        daemon.kill()
    idle(engine)
    engine.check_answers()
    engine.model.before_execute.clear()
    engine.requests.clear()
    if not comes_back:
        daemon.start()

    def again() -> bool:
        engine.reset()
        return engine.ask(prompt, 4)[1] == 320

    engine.run_until("the same engine stores and hits again", again)
    idle(engine)


@plugin
def test_evicted_blocks_make_hits_shorter(model: Callable[[models.Recipe], pathlib.Path], tmp_path: pathlib.Path, shape: Shape, is_async: bool) -> None:
    """Host memory for less than a prompt: what is hit is what all groups have."""
    with daemon_module.Daemon(tmp_path, "4MiB") as small, closing(Rig(model(models.gqa()), small, is_async, shape)) as rig:
        engine = rig.engine(budget=64)
        prompt = models.prompt(5, 1200)
        lengths = set()
        for i in range(6):
            engine.ask(prompt, 2)
            engine.reset()
            rig.settle(engine)
            engine.ask(models.prompt(50 + i, 400 + 400 * i), 2)
            engine.reset()
            rig.settle(engine)
            lengths.add(engine.ask(prompt, 2)[1])
            engine.reset()
            rig.settle(engine)
        assert min(lengths) < rig.hit(1199), lengths
        assert engine.ours.debug_stats()["load_failures"] == 0
        idle(engine)


@plugin
@pytest.mark.parametrize("shape", OUTGROWING, indirect=True)
@pytest.mark.parametrize("end", ["resume", "kill", "deadline"])
def test_blocks_outgrown_while_the_daemon_is_silent(own_rig: Rig, end: str) -> None:
    """They are kept, and let go when they are copied, when the daemon is gone, or when it takes too long."""
    daemon = own_rig.daemon
    assert daemon is not None
    engine = own_rig.engine(connector=hasty(own_rig, hold_deadline_ms=30_000 if end != "deadline" else 50, lookup_deadline_ms=5000))
    prompt = models.prompt(60, 100)
    engine.add(prompt, 250)
    engine.run_until("it runs", lambda: len(engine.answers["r%d" % engine.serial]) > 2)
    daemon.pause()
    held = 0
    for _ in range(150):
        engine.step()
        held = max(held, engine.ours.debug_stats()["blocks_held"])
    assert held > 0 or end == "deadline"
    if end == "resume":
        daemon.resume()
    elif end == "kill":
        daemon.kill()
    idle(engine)
    engine.check_answers()
    if end == "resume":
        own_rig.settle(engine)
        engine.reset()
        assert engine.ask(prompt + continuation(prompt, 250), 3)[1] > 0
        idle(engine)
    elif end == "deadline":
        assert engine.ours.debug_stats()["hold_timeouts"] > 0


@plugin
@pytest.mark.parametrize("shape", OUTGROWING, indirect=True)
def test_a_pause_waits_for_blocks_that_are_kept(own_rig: Rig) -> None:
    """vLLM's engine steps while there is work, though all requests are paused, and then drops its cache under them: which it can't where
    blocks are kept."""
    daemon = own_rig.daemon
    assert daemon is not None
    engine = own_rig.engine(connector=hasty(own_rig, hold_deadline_ms=30_000, lookup_deadline_ms=5000))
    engine.add(models.prompt(61, 100), 250)
    engine.run_until("it runs", lambda: len(engine.answers["r%d" % engine.serial]) > 2)
    own_rig.settle(engine)
    daemon.pause()
    engine.run_until("blocks are kept", lambda: engine.ours.debug_stats()["blocks_held"] > 0)
    engine.settle()
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert engine.ours.debug_stats()["blocks_held"] and engine.scheduler.has_requests()
    daemon.resume()
    engine.run_until("nothing is to do", lambda: not engine.scheduler.has_requests())
    engine.settle()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    idle(engine)
    engine.check_answers()


def reset_running(engine: ScriptedEngine, **options: Any) -> bool:
    """vLLM raises where blocks are in use that no running request has: by loads, by finished requests, by what the connector keeps."""
    engine.settle()
    try:
        engine.scheduler.reset_prefix_cache(reset_running_requests=True, **options)
    except RuntimeError:
        waits = [one for one in engine.scheduler.requests.values() if one.is_finished() or one.status == RequestStatus.WAITING_FOR_REMOTE_KVS]
        # Before 0.31 those that hold blocks while they wait are among the skipped.
        holding = getattr(engine.scheduler, "kv_holding_waiting", None) or getattr(engine.scheduler, "skipped_waiting", ())
        assert engine.watch.kept or waits or engine.scheduler.deferred_frees or len(holding)
        return False
    return True


# Random schedules ----------------------------------------------------------------------------------------------------
def random_schedule(rig: Rig, seed: int) -> dict[str, int]:
    """A random mixture of everything; the model checks all of it. What happened is counted."""
    rng = random.Random(seed)
    shape, daemon = rig.shape, rig.daemon
    spec = rng.choice([0, 0, 1, 3]) if STATES_OFFERED or not shape.states else 0
    retention = rng.choice([None, None, 0, shape.unit, 2 * shape.unit]) if shape.outgrows else None
    faults = rng.choice(["none", "none", "silent", "bytes"]) if daemon is not None else "none"
    connector = None
    if daemon is not None:
        connector = hasty(rig, lookup_deadline_ms=rng.choice([1, 20]), hold_deadline_ms=rng.choice([1, 30])) if faults == "silent" else patient(daemon.socket)
    engine = rig.engine(
        spec_tokens=spec, blocks=rng.choice([40, 64, 128]), budget=rng.choice([64, 128, 512]), max_seqs=rng.choice([3, 8]),
        prefix_cache_retention_interval=retention, connector=connector,
    )
    roots = [models.prompt(1_000_000 + 1000 * seed + i, rng.randrange(20, 260)) for i in range(3)]
    aborted: set[str] = set()
    preempted = 0
    stopped = 0
    for _ in range(60):
        act = rng.random()
        live = [n for n in engine.requests if n in engine.scheduler.requests]
        if act < 0.30 and len(live) < 7:
            root = rng.choice(roots)
            head = root[: rng.randrange(1, len(root) + 1)] if rng.random() < 0.3 else root + continuation(root, rng.randrange(0, 120))
            asked = (head + models.prompt(rng.randrange(5), rng.randrange(1, 40)))[: engine.longest - 1]
            engine.add(asked, min(rng.randrange(1, 90), engine.longest - len(asked)))
        elif act < 0.36 and live:
            aborted.add(name := rng.choice(live))
            engine.abort(name)
        elif act < 0.40:
            engine.scheduler.reset_prefix_cache()
        elif act < 0.42:
            reset_running(engine, reset_connector=rng.random() < 0.3)
        elif act < 0.47 and faults == "silent" and daemon is not None:
            (daemon.resume if stopped else daemon.pause)()
            stopped = 1 - stopped
        elif act < 0.47 and faults == "bytes" and daemon is not None:
            daemon.punch_hole(0, 1 << 30)
        else:
            for _ in range(rng.randrange(1, 12)):
                engine.step()
                preempted = max([preempted, *(r.num_preemptions for r in engine.scheduler.requests.values())])
    if stopped and daemon is not None:
        daemon.resume()
    engine.drain()
    engine.check_answers(skip=aborted)
    # Whatever was stored on the way is right: load it.
    for root in roots:
        engine.scheduler.reset_prefix_cache()
        engine.ask((root + continuation(root, 130))[: engine.longest - 2], 2)
    if daemon is None:
        return {"preempted": preempted, "copied": engine.model.copied_blocks}
    idle(engine)
    stats = engine.ours.debug_stats()
    if faults == "none":
        assert stats["load_failures"] == 0, "a load was ordered of blocks that were not there"
    return {
        "preempted": preempted, "copied": engine.model.copied_blocks, "loads": stats["loads"], "failures": stats["load_failures"],
        "kept": engine.watch.most_kept, "hold timeouts": stats["hold_timeouts"], "external": engine.external_hits,
    }


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[daemon_module.Daemon]]:
    """One with room for everything, and one with less than a schedule stores."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(daemon_module.Daemon(tmp_path_factory.mktemp("d"), capacity)) for capacity in ("256MiB", "8MiB")]


def of_seed(seed: int) -> tuple[int, Shape]:
    """Shapes come in turn: how often all have come before, and the one of this seed."""
    turn, at = divmod(seed, len(SHAPES))
    return turn, list(SHAPES.values())[at]


@plugin
@pytest.mark.parametrize("part", range(60 if not SOAK else 1000))
def test_random_schedules(part: int, daemons: list[daemon_module.Daemon], model: Callable[[models.Recipe], pathlib.Path]) -> None:
    """One schedule each, or ten. Every shape, with both schedulers, comes in turn; in every fifth kvd is a MultiConnector's child."""
    each = 1 if not SOAK else 10
    for seed in range(part * each, part * each + each):
        turn, shape = of_seed(seed)
        small, child = (seed + turn) % 3 == 2, (seed + 2 * turn) % 5 == 4
        with closing(Rig(model(models.gqa()), daemons[small], turn % 2 == 1, shape, as_child=child)) as rig:
            print(f"seed {seed}: {shape.name}, {random_schedule(rig, seed)}")


@pytest.mark.parametrize("seed", range(2 * len(SHAPES) if not SOAK else 200))
def test_the_model_is_right_without_a_connector(seed: int, model: Callable[[models.Recipe], pathlib.Path]) -> None:
    turn, shape = of_seed(seed)
    with closing(Rig(model(models.gqa()), None, turn % 2 == 1, shape)) as rig:
        random_schedule(rig, seed)


@plugin
@pytest.mark.parametrize("told_by", ["manager", "output"])
@pytest.mark.parametrize("name", ["windows", "all"])
def test_blocks_are_found_without_a_look_into_vllms_manager(
    told_by: str, name: str, is_async: bool, model: Callable[[models.Recipe], pathlib.Path], daemon: daemon_module.Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the connector's usual ways of asking, should vLLM keep its tables elsewhere, or not bind its manager."""
    from kvdaemon.vllm import capture

    if told_by == "manager":
        monkeypatch.setattr(capture, "_are_what_it_tells", lambda *_: False)
    else:
        monkeypatch.setattr(capture.Capture, "bind_manager", lambda *_: None)
    with closing(Rig(model(models.gqa()), daemon, is_async, SHAPES[name])) as rig:
        random_schedule(rig, 1)


# The harness notices -------------------------------------------------------------------------------------------------
@plugin
@pytest.mark.parametrize("name", ["states"])
def test_harness_notices(name: str, is_async: bool, model: Callable[[models.Recipe], pathlib.Path], daemon: daemon_module.Daemon) -> None:
    """States that nobody keeps are others' before they are copied. (Of windows the moment is not met reliably.)"""
    with closing(Rig(model(models.gqa()), daemon, is_async, SHAPES[name])) as rig:
        engine = rig.engine(blocks=40, connector=patient(daemon.socket))
        engine.connector.bind_gpu_block_pool(Careless(engine.scheduler.kv_cache_manager.block_pool, engine.watch))
        prompts = [models.prompt(70 + i, 100) for i in range(4)]
        with pytest.raises(WrongCache):
            for round in range(10):
                daemon.pause()
                for p in prompts:
                    engine.add(p + models.prompt(round, 3), 120)
                for _ in range(150):
                    engine.step()
                daemon.resume()
                engine.drain()
                for p in prompts:
                    whole = p + models.prompt(round, 3)
                    whole += continuation(whole, 120)
                    for length in range(40, 220, 30):
                        engine.scheduler.reset_prefix_cache()
                        engine.ask(whole[:length], 1)
