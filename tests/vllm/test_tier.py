"""kvd below vLLM's own CPU tier: the manager alone against a real daemon, then real engines.

vLLM's tiers refuse to run on a CPU; the engines here have a worker that copies by memcpy (see fake_copy_worker.py), all else is vLLM's.
"""

from __future__ import annotations

import copy
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
from checks import differences, full_blocks, loads
from conftest import Engines
from daemon import Daemon
from engine import Engine, wait_until

pytestmark = [pytest.mark.plugin]
Model = Callable[[models.Recipe], pathlib.Path]
ROW = 64 << 10
PATIENT = {"lookup_deadline_ms": 5000, "load_deadline_ms": 30_000}
SERIALS = iter(range(1, 1 << 30))


@pytest.fixture(autouse=True, scope="module")
def tiers_of_this_vllm() -> None:
    try:
        import kvdaemon.vllm_tier  # noqa: F401
    except ImportError as error:
        if "needs vLLM" not in str(error):
            raise
        pytest.skip(str(error))


# The manager alone ------------------------------------------------------------------------------------------------
def keys(seed: int, count: int, group: int = 0) -> list[bytes]:
    from vllm.v1.kv_offload.base import make_offload_key

    found = np.random.default_rng(seed)
    return [make_offload_key(found.bytes(32), group) for _ in range(count)]


class Bench:
    """A tier as TieringOffloadingManager holds it: rows of memory, jobs by number."""

    def __init__(self, vllm_config: Any, socket: object, *, blocks_per_chunk: int = 1, ranks: int = 1, **options: Any) -> None:
        from vllm.v1.kv_offload.config import OffloadingCacheConfig, OffloadingConfig, OffloadingGroupConfig, OffloadingModelConfig, OffloadingParallelConfig
        from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

        config = OffloadingConfig(
            groups=(OffloadingGroupConfig(32, ("layer.0",), 0), OffloadingGroupConfig(32, ("layer.1",), 1)), worker_kv_bytes_per_block=ROW,
            enable_kv_cache_events=False, extra_config={}, engine_id="bench", model=OffloadingModelConfig("bench", "bfloat16"),
            cache=OffloadingCacheConfig(32, blocks_per_chunk), parallel=OffloadingParallelConfig(0, ranks, ranks, 1, 1, 1, 0, 1, None, True),
            kv_cache_layout="LBHNC",
        )
        self.rows = np.random.default_rng(7).integers(0, 256, (16, ROW), dtype=np.uint8).astype(np.int8)
        spec = SimpleNamespace(config=config, replicated_layout=False, blocks_per_chunk=blocks_per_chunk)
        tier = {"type": "KvdSecondaryTier", "module_path": "kvdaemon.vllm_tier", "socket": str(socket)} | options
        self.tier: Any = SecondaryTierFactory.create_secondary_tier(tier, memoryview(self.rows), spec)

    def request(self) -> Any:
        from vllm.v1.kv_offload.base import ReqContext

        context = ReqContext(f"r{next(SERIALS)}")
        self.tier.on_new_request(context)
        return context

    def step(self) -> None:
        from vllm.v1.kv_offload.base import ScheduleEndContext

        self.tier.on_schedule_end(ScheduleEndContext((), ()))

    def look(self, wanted: list[bytes], context: Any) -> str:
        """One scheduler's look at each: H, M or R."""
        words = "".join(self.tier.lookup(key, context).name[0] for key in wanted)
        self.step()
        return words

    def found(self, wanted: list[bytes]) -> str:
        """What a request of its own is told in the end."""
        context = self.request()
        words = wait_until("lookups are answered", lambda: (w := self.look(wanted, context)) and "R" not in w and w, every_s=0.002)
        self.tier.on_request_finished(context)
        return words

    def job(self, verb: str, wanted: list[bytes], rows: list[int], context: Any = None) -> Any:
        """Submits a job and waits for its result."""
        from vllm.v1.kv_offload.tiering.base import TransferJob

        of = context or self.request()
        job = TransferJob(next(SERIALS), wanted, np.array(rows, dtype=np.int32), verb == "load", of)
        (self.tier.submit_load if verb == "load" else self.tier.submit_store)(job)
        done: list[Any] = []
        wait_until("the job is over", lambda: done.extend(self.tier.get_finished_jobs()) or done, 60.0, every_s=0.002)
        assert [one.job_id for one in done] == [job.job_id]
        if context is None:
            self.tier.on_request_finished(of)
        return done[0]

    def attached(self) -> Bench:
        """Until the daemon answers it: it has found out what its weights are."""
        probe = keys(next(SERIALS) + 1000, 1)
        wait_until("the tier stores", lambda: self.job("store", probe, [15]).success, 60.0)
        return self


@pytest.fixture(scope="module")
def config(model: Model) -> Any:
    import harness

    return harness.make_config(model(models.gqa()), None, async_scheduling=False)


@pytest.fixture
def bench(config: Any) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(socket: object, vllm_config: Any = config, **options: Any) -> Bench:
        made.append(Bench(vllm_config, socket, **(PATIENT | options)))
        return made[-1]

    yield make
    for one in made:
        one.tier.shutdown()


def test_stored_rows_come_back_in_another_instance(bench: Callable[..., Bench], daemon: Daemon) -> None:
    one = bench(daemon.socket).attached()
    first, second = keys(1, 3), [key[:-1] + b"\1" for key in keys(1, 3)]  # the same hashes in another KV-cache group
    assert one.found(first) == "MMM"
    assert one.job("store", first, [0, 1, 2]).success
    assert one.found(first + second) == "HHHMMM"
    assert one.job("store", second, [3, 4, 5]).success
    again = one.job("store", first, [6, 7, 8])
    assert again.success, "what is there already is kept, not copied"
    two = bench(daemon.socket).attached()
    assert two.found(second + first) == "HHHHHH"
    want = two.rows[:6].copy()
    two.rows[:] = 0
    done = two.job("load", first + second, [8, 7, 6, 9, 10, 11])
    assert (done.success, done.transfer_bytes) == (True, 6 * ROW)
    assert (two.rows[[8, 7, 6, 9, 10, 11]] == want).all()
    assert not two.rows[:6].any() and not two.rows[12:].any(), "other rows are left alone"


def asked_and_found(one: Bench, wanted: list[bytes]) -> Any:
    """A request that has found these three, which are stored now."""
    one.job("store", wanted, [0, 1, 2])
    context = one.request()
    wait_until("all are found", lambda: one.look(wanted, context) == "HHH", every_s=0.002)
    return context


def test_a_missing_chunk_fails_alone_and_is_not_tried_again(bench: Callable[..., Bench], daemon: Daemon) -> None:
    one = bench(daemon.socket).attached()
    wanted = keys(2, 3)
    context = asked_and_found(one, wanted)
    gone = keys(3, 1)
    done = one.job("load", [wanted[0], *gone, wanted[2]], [3, 4, 5], context)
    assert (done.success, done.successful_keys) == (False, (wanted[0], wanted[2]))
    assert one.job("load", [wanted[1]], [6], context).success
    assert one.look(wanted, context) == "HHH"


def test_a_flipped_byte_is_a_failed_load_and_the_daemon_is_told(bench: Callable[..., Bench], daemon: Daemon) -> None:
    one = bench(daemon.socket).attached()
    wanted = keys(4, 3)
    context = asked_and_found(one, wanted)
    daemon.flip_byte(skip=2 * ROW // 4096)  # one row came before, from `attached`
    done = one.job("load", wanted, [3, 4, 5], context)
    assert not done.success and len(done.successful_keys) == 2
    assert loads(daemon).get("failed crc") == 1
    assert sorted(one.look(wanted, context)) == sorted("HHM"), "the request that failed is told that it is missing"
    assert sorted(one.found(wanted)) == sorted("HHM"), "the daemon has dropped it"


def test_a_hung_daemon_costs_misses_only(bench: Callable[..., Bench], daemon: Daemon) -> None:
    one = bench(daemon.socket, lookup_deadline_ms=50, load_deadline_ms=500).attached()
    wanted = keys(5, 2)
    wait_until("it is stored", lambda: one.job("store", wanted, [0, 1]).success)
    slowest = 0.0
    daemon.pause()
    try:
        begin = time.monotonic()
        context = one.request()
        wait_until("it is a miss after the deadline", lambda: one.look(wanted, context) == "MM", 5.0, every_s=0.002)
        waited = time.monotonic() - begin
        later = one.request()
        assert one.look(keys(6, 2), later) == "MM", "nobody waits for what does not answer"
        for verb in ("load", "store", "load"):
            began = time.monotonic()
            done = one.job(verb, wanted, [2, 3])
            slowest = max(slowest, time.monotonic() - began)
            assert (done.success, done.successful_keys) == (False, None)
        for asked in (context, later):
            one.tier.on_request_finished(asked)
        print(f"\nhung daemon: a miss after {waited * 1000:.0f} ms, a failed job after at most {slowest * 1000:.0f} ms")
        one.tier.drain_jobs()
    finally:
        daemon.resume()
    two = bench(daemon.socket).attached()
    assert two.found(wanted) == "HH"
    one.attached()


def test_a_killed_daemon_costs_misses_only(bench: Callable[..., Bench], daemon: Daemon) -> None:
    one = bench(daemon.socket).attached()
    wanted = keys(7, 2)
    assert one.job("store", wanted, [0, 1]).success
    daemon.kill()
    assert one.found(wanted) == "MM"
    for verb in ("load", "store"):
        assert not one.job(verb, wanted, [2, 3]).success
    daemon.start()
    wait_until("it stores again, by itself", lambda: one.job("store", wanted, [0, 1]).success)
    assert one.found(wanted) == "HH"
    one.rows[2:4] = 0
    assert one.job("load", wanted, [2, 3]).success
    assert (one.rows[2:4] == one.rows[:2]).all()


def test_a_reset_begins_a_new_epoch(bench: Callable[..., Bench], daemon: Daemon) -> None:
    """vLLM drains its tiers when it drops its caches: weights may have changed in place."""
    one = bench(daemon.socket).attached()
    wanted = keys(8, 2)
    running = one.request()
    assert one.job("store", wanted, [0, 1], running).success
    one.tier.drain_jobs()
    assert not one.job("store", keys(9, 1), [2], running).success, "it has KV of before"
    one.tier.on_request_finished(running)
    assert not one.job("store", keys(9, 1), [2]).success, "vLLM's own caches may have, too"
    one.tier.drain_jobs()
    one.attached()
    assert one.found(wanted) == "MM"
    assert bench(daemon.socket).attached().found(wanted) == "HH", "nobody's blocks are deleted"


def test_what_may_differ_is_not_shared(bench: Callable[..., Bench], config: Any, daemon: Daemon) -> None:
    wanted = keys(10, 2)
    assert bench(daemon.socket).attached().job("store", wanted, [0, 1]).success
    assert bench(daemon.socket, blocks_per_chunk=2).attached().found(wanted) == "MM"
    assert bench(daemon.socket, weights_id="other").attached().found(wanted) == "MM"
    assert bench(daemon.socket, ranks=2).attached().found(wanted) == "MM", "rows of two ranks are one after the other"
    assert bench(daemon.socket, vllm_config=None).attached().found(wanted) == "MM", "without a configuration nothing is shared"
    said = differences(daemon)
    assert {"x.blocks_per_chunk"} in said and {"weights"} in said
    adapters = copy.copy(config)
    adapters.lora_config = SimpleNamespace()
    assert bench(daemon.socket, vllm_config=adapters).attached().found(wanted) == "MM", "vLLM does not say which adapter it is"


def test_requests_that_leave_while_a_lookup_is_open(bench: Callable[..., Bench], daemon: Daemon) -> None:
    """Those that asked for the same chunk, or ask for it later, are answered all the same."""
    one = bench(daemon.socket).attached()
    wanted = keys(11, 2)
    assert one.job("store", wanted, [0, 1]).success
    leaves, stays, alone = one.request(), one.request(), one.request()
    daemon.pause()
    try:
        assert one.look(wanted, leaves) == one.look(wanted, stays) == "RR"
        gone = keys(12, 1)
        assert one.look(gone, alone) == "R"
        for context in (leaves, alone):
            one.tier.on_request_finished(context)
        later = one.request()
        assert one.look(gone + wanted, later) == "RRR"
    finally:
        daemon.resume()
    wait_until("the one that stays is answered", lambda: one.look(wanted, stays) == "HH", every_s=0.002)
    wait_until("so is the later one", lambda: one.look(gone + wanted, later) == "MHH", every_s=0.002)
    assert one.job("store", gone, [2]).success
    for context in (stays, later):
        one.tier.on_request_finished(context)
    assert one.found(gone) == "H", "an answer holds as long as those that asked for it"


def test_rows_that_there_are_not(bench: Callable[..., Bench], daemon: Daemon) -> None:
    """A failed job, and nothing is written, read or stored."""
    one = bench(daemon.socket).attached()
    wanted = keys(13, 2)
    assert one.job("store", wanted, [0, 1]).success
    before = one.rows.copy()
    for row in (-1, 16, 1 << 30):
        assert not one.job("load", wanted[:1], [row]).success
        assert not one.job("store", keys(14, 1), [row]).success
    assert (one.rows == before).all()
    assert one.found(keys(14, 1)) == "M"
    assert one.job("load", wanted[:1], [5]).success
    assert (one.rows[5] == before[0]).all()


def test_shutdown_with_jobs_and_lookups_open(bench: Callable[..., Bench], daemon: Daemon) -> None:
    """Of a daemon that hangs, too: no thread is left, and no row is written afterwards."""
    from vllm.v1.kv_offload.tiering.base import TransferJob

    one = bench(daemon.socket, load_deadline_ms=500).attached()
    wanted = keys(15, 2)
    assert one.job("store", wanted, [0, 1]).success
    context = one.request()
    wait_until("all are found", lambda: one.look(wanted, context) == "HH", every_s=0.002)
    mine = list(one.tier._threads._threads)
    assert mine and all(thread.is_alive() for thread in mine)
    before = one.rows.copy()
    daemon.pause()
    try:
        for number, submit in enumerate([one.tier.submit_load, one.tier.submit_store] * 3):
            rows = np.array([4 + 2 * number, 5 + 2 * number], dtype=np.int32)
            submit(TransferJob(next(SERIALS), wanted, rows, submit == one.tier.submit_load, context))
        assert one.look(keys(16, 3), context) == "RRR"
        one.tier.shutdown()
    finally:
        daemon.resume()
    assert not [thread for thread in mine if thread.is_alive()]
    assert bench(daemon.socket).attached().found(wanted) == "HH"
    assert (one.rows == before).all()


def test_a_full_daemon_gives_up_what_is_old(bench: Callable[..., Bench], tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, "4MiB") as small:
        one = bench(small.socket).attached()
        sets = [keys(100 + number, 15) for number in range(12)]  # 180 rows, where 64 have room
        for number, wanted in enumerate(sets):
            assert one.job("store", wanted, list(range(15))).success, number
        assert one.found(sets[-1]) == "H" * 15
        assert one.found(sets[0]) == "M" * 15
        assert one.job("load", sets[-1], list(range(15))).success


def test_where_states_may_be_wrong_nothing_is_kept(
    bench: Callable[..., Bench], config: Any, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the connector refuses: vLLM's copies of states may be wrong where hits end within blocks."""
    from kvdaemon.vllm_tier import tier

    said: list[str] = []
    monkeypatch.setattr(tier.logger, "warning", lambda text, *args: said.append(text % args))
    changed = copy.deepcopy(config)
    changed.cache_config.mamba_cache_mode, changed.cache_config.prefix_match_unit = "align", 16
    one = bench(daemon.socket, changed)
    wait_until("it says why", lambda: any("unset prefix_match_unit" in line for line in said))
    assert one.found(keys(1, 3)) == "MMM"
    assert not one.job("store", keys(1, 1), [0]).success
    assert daemon.resident() == 0


def test_options(bench: Callable[..., Bench], daemon: Daemon) -> None:
    for option, text in (({"sockett": "x"}, "unknown key 'sockett'.*knows .*socket"), ({"threads": "2"}, "must be a int"), ({"threads": 0}, "must be positive")):
        with pytest.raises(ValueError, match=text):
            bench(daemon.socket, **option)


# Real engines -----------------------------------------------------------------------------------------------------
PROMPT = models.prompt(1, 670)
LENGTH = full_blocks(670) * 32  # a whole number of chunks of two blocks, too

# Model, options, blocks in a chunk, and how many chunks PROMPT leaves.
KINDS: dict[str, tuple[Callable[[], models.Recipe], dict[str, Any], int, int]] = {
    "two ranks, two blocks a chunk": (models.gqa, {"tensor_parallel_size": 2, "threads": 1}, 2, LENGTH // 64),
    "windows": (models.gemma, {}, 1, 3 * LENGTH // 32),  # three KV-cache groups
}


class Tiered:
    """Configurations of engines with vLLM's CPU tier above kvd; removes the files of its shared memory that killed engines leave."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, socket: object, blocks_per_chunk: int = 1, **options: Any) -> dict[str, Any]:
        self.names.append(f"kvd-test-{uuid.uuid4()}")
        tier = {"type": "KvdSecondaryTier", "module_path": "kvdaemon.vllm_tier", "socket": str(socket)} | PATIENT | options
        return {
            "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "engine_id": self.names[-1],
            "kv_connector_extra_config": {
                "spec_name": "FakeCopyWorkerSpec", "spec_module_path": "fake_copy_worker", "cpu_bytes_to_use": 64 << 20,
                "blocks_per_chunk": blocks_per_chunk, "secondary_tiers": [tier],
            },
        }


def stores(engine: Engine, daemon: Daemon, per_chunk: int = 1) -> None:
    """Until the engine's chunks come to the daemon."""
    before = daemon.resident()

    def shows() -> bool:
        engine.ask(models.prompt(1_000_000 + next(SERIALS) + engine.facts["pid"] * 1000, 32 * per_chunk + 1), max_tokens=1)
        return daemon.resident() > before

    wait_until("the engine's tier stores", shows, 60.0, every_s=0.2)
    engine.reset_local()


@pytest.fixture
def tiered() -> Iterator[Tiered]:
    one = Tiered()
    yield one
    for name in one.names:
        for left in pathlib.Path("/dev/shm").glob(f"vllm_offload_{name}*"):
            left.unlink()


@pytest.mark.engine
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_engine_started_anew_loads_what_the_former_stored(kind: str, engines: Engines, daemon: Daemon, model: Model, tiered: Tiered) -> None:
    recipe, options, per_chunk, chunks = KINDS[kind]

    def start() -> Any:
        one = engines.start(model(recipe()), connector=tiered(daemon.socket, per_chunk), **options)
        stores(one, daemon, per_chunk)
        return one

    first = start()
    base = daemon.resident()
    assert first.ask(PROMPT).cached == 0
    wait_until("the prompt is stored", lambda: daemon.resident() >= base + chunks)
    hit = first.ask(PROMPT)
    assert hit.cached == LENGTH
    first.exit()
    second = start()
    before = loads(daemon)["hit"]
    batch = second.batch([PROMPT])
    assert (batch.external, batch.answers[0].cached) == (LENGTH, LENGTH)
    assert batch.answers[0].bits == hit.bits
    loaded = loads(daemon)["hit"] - before
    print(f"\n{kind}: {daemon.resident() - base} chunks stored, {loaded} loaded")
    assert LENGTH // 32 // per_chunk <= loaded <= chunks
    second.reset_local()
    assert second.batch([PROMPT]).external == LENGTH
    assert loads(daemon)["hit"] - before == loaded, "the second time it is in vLLM's own CPU tier"


@pytest.mark.engine
def test_an_engine_goes_on_when_the_daemon_is_killed_or_hangs(engines: Engines, daemon: Daemon, model: Model, tiered: Tiered) -> None:
    prompts = [models.prompt(20 + i, 300) for i in range(3)]
    alone = engines.start(model(models.gqa()), in_process=True, dtype="float32")
    right = [alone.ask(p, max_tokens=100).tokens for p in prompts]
    alone.exit()
    engine = engines.start(model(models.gqa()), connector=tiered(daemon.socket, lookup_deadline_ms=20, load_deadline_ms=2000), dtype="float32")
    stores(engine, daemon)
    engine.begin(prompts[:2], max_tokens=100, progress=True)
    engine.wait_tokens(20)
    daemon.kill()
    assert [a.tokens for a in engine.finish().answers] == right[:2]
    engine.reset_local()
    assert engine.ask(prompts[2], max_tokens=100).tokens == right[2]
    daemon.start()
    stores(engine, daemon)
    daemon.pause()
    try:
        engine.reset_local()
        assert [a.tokens for a in engine.batch(prompts[::-1], max_tokens=100).answers] == right[::-1]
    finally:
        daemon.resume()
    stores(engine, daemon)
