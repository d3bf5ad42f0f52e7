"""What vLLM's own suites demand of a connector (docs/vllm-suites.md), where no other file here has it: vLLM's real schedulers with the
scripted model, in models of one KV-cache group and of several."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import daemon as daemon_module  # noqa: E402
import memory_connector  # noqa: E402
import models  # noqa: E402
from checks import planned  # noqa: E402
from engine import multi, patient, wait_until  # noqa: E402
from harness import BLOCK, SHAPES, ScriptedEngine, continuation, make_config, make_kv, smallest_pool  # noqa: E402
from test_hybrid_scheduler import Rig, closing, idle, random_schedule, stops_when_it_loads  # noqa: E402
from vllm.v1.core.sched.interface import PauseState  # noqa: E402

pytestmark = pytest.mark.plugin
Model = Callable[[models.Recipe], pathlib.Path]


@pytest.fixture(params=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return request.param == "async"


@pytest.fixture(params=["full", "windows", "states"])
def rig(request: pytest.FixtureRequest, is_async: bool, model: Model, daemon: daemon_module.Daemon) -> Iterator[Rig]:
    with closing(Rig(model(models.gqa()), daemon, is_async, SHAPES[request.param])) as one:
        yield one


@pytest.fixture
def full(is_async: bool, model: Model, daemon: daemon_module.Daemon) -> Iterator[Rig]:
    with closing(Rig(model(models.gqa()), daemon, is_async, SHAPES["full"])) as one:
        yield one


def the_daemon(rig: Rig) -> daemon_module.Daemon:
    assert rig.daemon is not None
    return rig.daemon


def stored(rig: Rig, engine: ScriptedEngine, *prompts: list[int]) -> None:
    """These are in the daemon, and not in the engine's own cache. Of a small pool little is kept to be stored: better by a large engine."""
    for prompt in prompts:
        engine.ask(prompt, 2)
    rig.settle(engine)
    engine.reset()
    engine.requests.clear()


# Loads that fail ----------------------------------------------------------------------------------------------------
def test_policy_fail(rig: Rig) -> None:
    """vLLM's default: the request ends with an error. Nothing of it stays, and the next one for the prompt is right."""
    engine = rig.engine(budget=64, connector=patient(the_daemon(rig).socket) | {"kv_load_failure_policy": "fail"})
    prompt = rig.prompt(330)
    stored(rig, engine, prompt)
    the_daemon(rig).punch_hole(0, 1 << 30)
    name = engine.add(prompt, 4)
    other = engine.add(rig.prompt(50), 30)
    idle(engine)
    assert engine.finish[name] == "error" and not engine.answers[name]
    assert engine.finish[other] == "length"
    assert engine.ask(prompt, 4)[1] == 0
    rig.settle(engine)
    engine.reset()
    assert engine.ask(prompt, 4)[1] == rig.hit(329)
    idle(engine)


def test_one_of_several_loads_fails(full: Rig) -> None:
    """Whichever block it is: its request goes on from there, and the others keep all."""
    engine = full.engine(blocks=128)
    prompts = [full.prompt(330) for _ in range(3)]
    stored(full, engine, *prompts)
    lost = set()
    for round in range(24):
        the_daemon(full).flip_byte(skip=7 + 23 * round % 480)
        before, failures = engine.model.computed_tokens, engine.ours.debug_stats()["load_failures"]
        for prompt in prompts:
            engine.add(prompt, 1)
        idle(engine)
        engine.check_answers()
        failed = engine.ours.debug_stats()["load_failures"] - failures
        again = engine.model.computed_tokens - before - sum(len(one) - 320 for one in prompts)
        assert failed <= 1 and again % BLOCK == 0 and (again > 0) == (failed == 1), (again, failed)
        lost.add(again // BLOCK)
        full.settle(engine)
        engine.reset()
        engine.requests.clear()
    assert len(lost - {0}) > 2, lost


def test_two_requests_on_a_prefix_that_does_not_load(rig: Rig) -> None:
    """The second waits for the first one's load, which fails."""
    engine = rig.engine(blocks=512, budget=64)  # so large that an eighth of it is enough for all that is kept
    prompt = rig.prompt(330)
    stored(rig, engine, prompt)
    the_daemon(rig).punch_hole(0, 1 << 30)
    for i in range(3):
        engine.add(prompt + models.prompt(i, 40), 4)
    idle(engine)
    engine.check_answers()
    assert engine.ours.debug_stats()["load_failures"] > 0
    rig.settle(engine)
    engine.reset()
    assert engine.ask(prompt, 4)[1] == rig.hit(329)


@pytest.mark.parametrize("moment", ["asked", "allocated", "finished", 0, 1, 3, 8])
def test_a_scheduler_half_that_fails_by_a_bug(rig: Rig, moment: str | int) -> None:
    """Nothing that vLLM waits for stays away, nothing is reported twice, nothing is held for ever; then kvd is not there."""
    # A request that was preempted may be loading again when the daemon stops: that ends by its deadline, before the drain's.
    engine = rig.engine(budget=64, blocks=96, connector=patient(the_daemon(rig).socket, load_deadline_ms=2000))
    prompt = rig.prompt(330)
    stored(rig, engine, prompt)
    connector, failed = engine.connector, []

    def fail() -> None:
        if not failed:
            failed.append(True)
            connector._scheduler.fail()

    def failing(hook: str, when: Callable[[Any], Any]) -> None:
        usual = getattr(connector, hook)

        def call(*args: Any) -> Any:
            result = usual(*args)
            if when(result):
                fail()
            return result

        setattr(connector, hook, call)

    for i in range(2):
        engine.add(prompt[:100] + models.prompt(i, 20), 60)
        for _ in range(3):
            engine.step()
    if moment == "asked":
        failing("get_num_new_matched_tokens", lambda result: result[0])
    elif moment == "allocated":
        failing("update_state_after_alloc", lambda _: engine.watch.loads)
    elif moment == "finished":
        failing("request_finished_all_groups", lambda result: result[0])
    last = [engine.add(prompt, 100), engine.add(prompt + models.prompt(9, 50), 40)]
    if isinstance(moment, int):
        for _ in range(moment):
            engine.step()
        fail()
    elif moment == "finished":
        engine.run_until("they run", lambda: all(engine.answers[one] for one in last))
        the_daemon(rig).pause()
    engine.drain()
    the_daemon(rig).resume()
    engine.check_answers()
    assert failed and not engine.watch.kept and not engine.watch.loads
    engine.reset()
    assert engine.ask(prompt, 4)[1] == 0
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)


# Room ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", [0, 3])
def test_hits_that_do_not_fit_together(rig: Rig, spec: int) -> None:
    """Each needs most of the pool: one waits, with what its lookup promised, and has it."""
    few = 20 if rig.shape.name == "full" else 48
    prompts = [rig.prompt(420) for _ in range(3)]
    stored(rig, rig.engine(blocks=512, budget=64), *prompts)
    engine = rig.engine(blocks=few, budget=64, spec_tokens=spec)
    for prompt in prompts:
        engine.add(prompt, 60)
    idle(engine)
    engine.check_answers()
    assert engine.ours.debug_stats()["load_failures"] == 0
    rig.settle(engine)
    for prompt in prompts:
        engine.reset()
        assert engine.ask(prompt + continuation(prompt, 60), 2)[1] > 0
    idle(engine)


@pytest.mark.parametrize("spec", [0, 3, 40])
def test_the_longest_request_of_the_smallest_pool(rig: Rig, spec: int) -> None:
    """vLLM starts with room for one such request. Its hit is no reason to need more: nothing would ever come free for it."""
    if rig.shape.states and spec >= BLOCK:
        spec = BLOCK - 1  # with more, vLLM's states are wrong: test_more_drafts_than_a_block_of_states_has_tokens
    prompt = rig.prompt(512)
    stored(rig, rig.engine(blocks=512, budget=64), prompt)
    alike = make_config(rig.path, None, async_scheduling=rig.is_async, spec_tokens=spec, blocks=512, budget=64, shape=rig.shape)
    engine = rig.engine(blocks=smallest_pool(alike, make_kv(alike, rig.shape), 512), budget=64, spec_tokens=spec)
    assert 512 <= engine.longest < 512 + BLOCK
    hits = []
    for answer in (1, 60, 100):
        for before in (0, 1):
            engine.reset()
            if before:
                engine.add(rig.prompt(100), 4)
            hits.append(engine.ask(prompt[: 512 - answer], answer)[1])
    # For 40 drafts, vLLM 0.32 wants room for two more blocks. A hit of 480 tokens has 15, and there are 16, of full attention alone.
    assert all(hits[2 if spec == 40 and rig.shape.name == "full" else 0 :]), hits
    idle(engine)


def test_a_hit_that_waits_longer_than_its_lease(rig: Rig) -> None:
    """It is asked for again; should the blocks be gone by then, it is computed."""
    few = {"full": 24, "windows": 32, "states": 28}[rig.shape.name]
    prompt = rig.prompt(400)
    stored(rig, rig.engine(blocks=512, budget=64), prompt)
    engine = rig.engine(blocks=few, budget=64, connector=patient(the_daemon(rig).socket, lease_ms=100))
    long = engine.add(rig.prompt(350), 190)
    engine.run_until("it runs", lambda: len(engine.answers[long]) > 2)
    before, hits = engine.ours.debug_stats()["lookups"], engine.external_hits
    waiting = engine.add(prompt, 4)
    for _ in range(100):
        engine.step()
        time.sleep(0.008)  # of the length of an engine's: leases are over after a time
    assert not engine.answers[waiting] and long not in engine.finish
    idle(engine)
    engine.check_answers()
    assert engine.ours.debug_stats()["lookups"] - before > 4, "it was not asked again"
    assert engine.external_hits > hits, "asked too often, it was computed"
    assert engine.ours.debug_stats()["load_failures"] == 0


def test_a_request_that_waits_ahead_of_a_load(rig: Rig) -> None:
    """It is more important than one that loads, the pool has room for one of them, and its lookup is not answered: the load goes on behind it."""
    few = {"full": 20, "windows": 48, "states": 48}[rig.shape.name]
    prompt = rig.prompt(420)
    stored(rig, rig.engine(blocks=512, budget=64), prompt)
    engine = rig.engine(blocks=few, budget=64, scheduling_policy="priority")
    stopped = stops_when_it_loads(engine, the_daemon(rig))
    engine.add(prompt + models.prompt(1, 30), 60, priority=9)
    engine.run_until("the load was ordered", lambda: bool(stopped))
    waited = engine.ours.debug_stats()["asked_to_wait"]
    engine.add(prompt + models.prompt(2, 30), 60, priority=1)
    for _ in range(5):
        engine.step()
    assert engine.ours.debug_stats()["asked_to_wait"] > waited
    the_daemon(rig).resume()
    idle(engine)
    engine.check_answers()
    assert engine.ours.debug_stats()["load_failures"] == 0


# Local hits that differ -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["windows", "states", "all", "sizes-windows"])
def test_local_hits_that_differ_by_group(name: str, is_async: bool, model: Model, daemon: daemon_module.Daemon) -> None:
    """vLLM's own cache has lost the end, or the middle, of one group alone: what is offered goes on from what all groups have, and nothing that is
    computed anew could have been loaded."""
    with closing(Rig(model(models.gqa()), daemon, is_async, SHAPES[name])) as rig:
        engine = rig.engine(budget=64)
        prompt = rig.prompt(330)
        stored(rig, engine, prompt)
        probe = engine.request(engine.add(prompt, 1))
        assert probe is not None
        hashes = list(probe.block_hashes)
        idle(engine)
        pool, groups = engine.scheduler.kv_cache_manager.block_pool, len(engine.model.kv.kv_cache_groups)
        found = 0
        for group in range(groups):
            for lost in (slice(5, None), slice(3, 6), slice(0, None)):
                engine.ask(prompt, 1)  # all is there again
                cached = [pool.get_cached_block(one, [group]) for one in hashes[lost]]
                numbers = {block.block_id for blocks in cached if blocks for block in blocks}
                pool.evict_blocks(numbers)
                found += len(numbers)
                before = engine.model.computed_tokens
                engine.ask(prompt, 1)
                assert engine.model.computed_tokens - before == len(prompt) - rig.hit(len(prompt) - 1), (group, lost)
                idle(engine)
        assert found > 5 * groups


def test_all_that_wait_with_loads_have_room_together() -> None:
    from kvdaemon.vllm.caches import Rule
    from kvdaemon.vllm.room import Room

    def anew(blocks: int, *locals: int) -> list[bool]:
        """Whether requests of 330 tokens may load up to 320, one after the other; the same prompts where they have a multiple of 100 in common."""
        room = Room([Rule("full", 32), Rule("sliding_window", 32, 64), Rule("state", 32, offered=True)], 32, 64, 1)
        said = []
        for i, local in enumerate(locals):
            hashes = [bytes([local % 100 and i + 1, at]) for at in range(10)]
            one = SimpleNamespace(request_id=str(i), num_tokens=330, block_hashes=hashes)
            said.append(room.fits(one, local // 100 * 32, 320, SimpleNamespace(num_gpu_blocks=blocks)))
            if said[-1]:
                room.loads(one)
        return said

    # Ten blocks of full attention, two that the window reaches, one state; and to go on 1 + 2, 1 + 2 and 3 + 1.
    own = 10 + 2 + 1 + 3 + 3 + 4
    assert anew(1, 0) == [True], "vLLM knows of one alone"
    assert anew(2 * own + 1, 0, 0) == [True, True]
    assert anew(2 * own, 0, 0) == [True, False]
    assert anew(3 * own, 0, 0, 0, 900) == [True, True, False, False], "nobody overtakes"
    # Nine blocks that both have count once, where they are the same.
    assert anew(2 * (own - 9) + 9 + 1, 900, 900) == [True, True]
    assert anew(2 * (own - 9) + 9, 900, 900) == [True, False]
    assert anew(2 * own, 901, 901) == [True, False]
    assert anew(2 * own + 1, 901, 901) == [True, True]
    room = Room([Rule("full", 32), Rule("sliding_window", 32, 64)], 32, 64, 0)
    waits = [SimpleNamespace(request_id=name, num_tokens=330, block_hashes=[]) for name in "abc"]
    pool = SimpleNamespace(num_gpu_blocks=40)
    for end in ("runs", "is preempted", "is gone"):
        for one in waits[:2]:
            assert room.fits(one, 0, 320, SimpleNamespace(num_gpu_blocks=100))
            room.loads(one)
        assert not room.fits(waits[2], 0, 320, pool)
        if end == "runs":
            room.step(planned({"a": 320, "b": 320}, {"a": 5, "b": 10}))
        elif end == "is preempted":
            room.step(planned({}, preempted={"b"}))
        else:
            room.step(planned({}))
            room.gone("b")
        assert room.fits(waits[2], 0, 320, pool)
        room.gone("a")
        assert not room._own and not room._waiting and not room._common


def test_a_hit_that_vllm_never_takes_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdaemon.vllm import room as module
    from kvdaemon.vllm.caches import Rule

    clock = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: clock[0])

    def pool(blocks: int, usage: float = 0.0) -> SimpleNamespace:
        return SimpleNamespace(num_gpu_blocks=blocks, get_usage=lambda: usage)

    # By its count: ten blocks, of the window two, a state; and for 1 + 20 + 20 tokens two more.
    room = module.Room([Rule("full", 32), Rule("sliding_window", 32, 64), Rule("state", 32, offered=True)], 32, 64, 20, 20)
    assert room.never("a", 320, pool(15)) and not room.never("a", 320, pool(16))
    # By what it does: nothing is taken for ten seconds, while all is free.
    for between in ("", "taken", "used", "another", "gone"):
        room = module.Room([Rule("full", 32), Rule("state", 32, offered=True)], 32, 64, 0)
        asked = SimpleNamespace(request_id="a", num_tokens=330, block_hashes=[])
        for _ in range(2):
            assert not room.never("a", 320, pool(100)) and room.fits(asked, 0, 320, pool(100))
            room.step(planned({}))
            clock[0] += 3
        if between == "taken":
            room.taken()
        elif between == "gone":
            room.gone("a")
        elif between:
            assert not room.never("b" if between == "another" else "a", 320, pool(100, 0.5 if between == "used" else 0.0))
        assert not room.never("a", 320, pool(100))
        clock[0] += 6
        assert room.never("a", 320, pool(100)) == (not between)


# Resets, pauses, importance -----------------------------------------------------------------------------------------
def test_a_reset_while_a_load_is_under_way(rig: Rig) -> None:
    """The load ends; what came before it is neither loaded nor stored by what comes after."""
    daemon = the_daemon(rig)
    engine = rig.engine(budget=64)
    prompt = rig.prompt(330)
    stored(rig, engine, prompt)
    stopped = stops_when_it_loads(engine, daemon)
    engine.add(prompt, 4)
    engine.run_until("the load was ordered", lambda: bool(stopped))
    engine.settle()
    assert not engine.scheduler.reset_prefix_cache(reset_connector=True), "its blocks are in use"
    daemon.resume()
    idle(engine)
    engine.check_answers()
    # Its KV is of before the reset, and so may be what vLLM has cached of it.
    engine.ask(prompt + models.prompt(1, 200), 4)
    rig.settle(engine)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert engine.ask(prompt, 4)[1] == 0
    rig.settle(engine)
    engine.reset()
    assert engine.ask(prompt, 4)[1] == rig.hit(329)
    idle(engine)


def test_a_pause_with_a_load_under_way(rig: Rig) -> None:
    """One that lets go on what has blocks: the load ends, and its request. One that stops all: the load ends, and what it brought is used when the
    engine goes on."""
    daemon = the_daemon(rig)
    engine = rig.engine(budget=64)
    prompt = rig.prompt(330)
    stored(rig, engine, prompt)
    # Before 0.32 the former stops what waits with blocks, too.
    drains = "kv_holding_waiting" in type(engine.scheduler).get_num_unfinished_requests.__code__.co_names
    for how in (PauseState.PAUSED_NEW, PauseState.PAUSED_ALL):
        engine.reset()
        hits, computed, stopped = engine.external_hits, engine.model.computed_tokens, stops_when_it_loads(engine, daemon)
        one = engine.add(prompt, 4)
        engine.run_until("the load was ordered", lambda: bool(stopped))
        engine.settle()
        engine.scheduler.set_pause_state(how)
        daemon.resume()
        if how == PauseState.PAUSED_NEW and drains:
            engine.run_until("nothing is to do", lambda: not engine.scheduler.has_requests())
            assert one in engine.finish
        else:
            rank = engine.model.connector
            wait_until("the load is over", lambda: rank.debug_stats()["loaded_blocks"] >= engine.ours.debug_stats()["loaded_blocks"], 20.0)
            while engine.step():
                pass
            assert not engine.answers[one]
        engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        idle(engine)
        engine.check_answers()
        assert engine.external_hits - hits == rig.hit(329)
        assert engine.model.computed_tokens - computed == 330 - rig.hit(329) + 3, "what was loaded is used"
        assert engine.scheduler.reset_prefix_cache(reset_connector=False)


def test_a_reset_with_output_on_its_way(rig: Rig) -> None:
    """Running requests lose their blocks at any moment. While a step of theirs is under way vLLM raises (it defers the freeing of blocks then), and so
    it does while blocks are kept: they have lost them all the same, and come back."""
    engine = rig.engine(budget=64)
    done = 0
    for round in range(6):
        prompts = [rig.prompt(150 + 40 * i) for i in range(3)]
        for prompt in prompts:
            engine.add(prompt, 60)
        for _ in range(3 + 5 * round):
            engine.step()
        under_way = bool(engine.queue)
        try:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=round % 2 == 1)
            done += 1
        except RuntimeError:
            assert under_way or engine.watch.kept or engine.scheduler.deferred_frees
        assert not engine.scheduler.running, "all were preempted"
        idle(engine)
        engine.check_answers()
        engine.requests.clear()
        engine.reset()
    assert done == 6 or rig.is_async or rig.shape.outgrows


def test_every_order_is_worked_on_once(rig: Rig) -> None:
    """vLLM hands a step's orders over twice, and some steps compute nothing: what was ordered was copied, no more."""
    engine = rig.engine(budget=64)
    for quiet in (False, True):
        engine.model.quiet = quiet
        prompt = rig.prompt(330)
        engine.ask(prompt, 70)
        stored(rig, engine, prompt)
        assert engine.ask(prompt, 4)[1] == rig.hit(329)
        rig.settle(engine)
        ours, rank = engine.ours.debug_stats(), engine.model.connector.debug_stats()
        assert ours["ordered_blocks"] == ours["done_blocks"] == rank["copied_blocks"] + rank["dropped_blocks"] > 10
        assert ours["loaded_blocks"] == rank["loaded_blocks"] > 0
        engine.reset()


def test_more_important_requests(rig: Rig) -> None:
    """With vLLM's priority scheduling, requests that load or store lose their blocks to others, and come back."""
    few = {"full": 24, "windows": 34, "states": 34}[rig.shape.name]
    prompts = [rig.prompt(200) for _ in range(4)]
    stored(rig, rig.engine(blocks=512, budget=64), *prompts)
    engine = rig.engine(blocks=few, budget=64, scheduling_policy="priority")
    preempted = 0

    def over() -> bool:
        nonlocal preempted
        preempted = max([preempted, *(one.num_preemptions for one in engine.scheduler.requests.values())])
        return not engine.scheduler.requests

    for round in range(3):
        for i, prompt in enumerate(prompts):
            engine.add(prompt + models.prompt(round, 20), 200, priority=10 - i)
            for _ in range(12):
                engine.step()
                over()
        engine.run_until("all have had their blocks", over)
        idle(engine)
        engine.check_answers()
        engine.reset()
    assert preempted > 0, "the pool was not small enough"
    assert engine.external_hits > 0


# Roles and other connectors -----------------------------------------------------------------------------------------
def test_roles(rig: Rig) -> None:
    """A producer stores and loads nothing; a consumer loads and stores nothing."""
    daemon = the_daemon(rig)
    prompt = rig.prompt(330)
    first = rig.engine(budget=64, connector=patient(daemon.socket) | {"kv_role": "kv_producer"})
    stored(rig, first, prompt)
    have = daemon.resident()
    assert first.ask(prompt, 4)[1] == 0
    idle(first)
    assert first.ours.debug_stats()["lookups"] == 0
    second = rig.engine(budget=64, wait=False, connector=patient(daemon.socket) | {"kv_role": "kv_consumer"})
    second.run_until("it has attached, and loads", lambda: second.ask(prompt, 4)[1] == rig.hit(329) or second.reset())
    assert second.ours.debug_stats()["loads"] > 0
    assert second.ask(rig.prompt(200), 4)[1] == 0
    idle(second)
    assert second.ours.debug_stats()["reserves"] == 0
    assert daemon.resident() == have


def test_what_a_child_of_a_multi_connector_hears(rig: Rig) -> None:
    """All that happens to a connector that is alone, of one cache group and of several: random schedules in which requests were preempted, and
    loaded, and blocks had to be kept."""
    rig.as_child = True
    seen: dict[str, int] = {}
    for seed in range(6):
        for what, count in random_schedule(rig, seed).items():
            seen[what] = seen.get(what, 0) + count
    print(seen)
    assert seen["preempted"] and seen["loads"], seen
    assert seen["kept"] or rig.shape.name == "full", seen


def test_another_child_serves_the_load(full: Rig) -> None:
    """Both have the prefix and the other one comes first: ours loads nothing, keeps nothing, and stores what it lacks."""
    memory_connector.STORE.clear()
    other = {"kv_connector": "MemoryConnector", "kv_connector_module_path": "memory_connector", "kv_role": "kv_both"}
    both = multi(other, patient(the_daemon(full).socket))
    alone = full.engine()
    prompt = full.prompt(330)
    stored(full, alone, prompt)
    have = the_daemon(full).resident()
    engine = full.engine(wait=False, connector=both)
    ours = engine.ours

    def stores() -> bool:
        engine.ask(full.prompt(40), 1)
        return bool(ours.debug_stats()["done_blocks"])

    engine.run_until("ours has attached", stores)
    assert engine.ask(prompt, 2)[1] == 320
    assert ours.debug_stats()["loads"] == 1, "the other one lacked it"
    engine.run_until("the other one has it", lambda: len(memory_connector.STORE) >= 10)
    engine.reset()
    longer = prompt + full.prompt(100)
    assert engine.ask(longer, 2)[1] == 320
    engine.reset()
    one = engine.add(longer + full.prompt(50), 60)
    engine.run_until("it runs", lambda: len(engine.answers[one]) > 2)
    engine.abort(one)
    engine.drain()
    stats = ours.debug_stats()
    assert (stats["loads"], stats["requests_known"]) == (1, 0)
    engine.run_until("ours has the longer one", lambda: the_daemon(full).resident() >= have + 3)
    engine.run_until("no lease is left", lambda: the_daemon(full).status()["tiers"]["host"]["pinned_bytes"] == 0)
