"""Whatever breaks, the answer is right, and the same engine stores and hits again without a restart.

The right answer is known: the same engine's own local prefix hit, taken before anything was broken, or a cold run where nothing could
be loaded. The model's choice of tokens is the same in both: these engines compute in float32, since with bfloat16 two tokens can come so
close that another batch beside them, and so another order of rounding, decides.
"""

from __future__ import annotations

import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import models
import pytest
from checks import attached, full_blocks, kv_transfer, loads, reference_us, wait_stored
from conftest import SOAK, Engines
from daemon import Daemon
from engine import Engine, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.plugin]
Model = Callable[[models.Recipe], pathlib.Path]


def show_hooks(what: str, hooks: dict[str, dict[str, float]]) -> None:
    """The scheduler's hooks never wait for the socket. What they took is shown; only what no busy machine explains is an error."""
    p50, p99 = reference_us()
    print(f"\nscheduler hooks {what} (us); json.dumps of 8 numbers after a sleep: p50 {p50:.1f}, p99 {p99:.1f}")
    for name, row in sorted(hooks.items()):
        print(f"  {name:<28} {row['calls']:>5} calls   p50 {row['p50']:>6.1f}   p99 {row['p99']:>6.1f}   max {row['max']:>8.1f}")
    assert hooks["build_connector_meta"]["calls"] > 100
    assert all(row["p50"] < 1000 for row in hooks.values()), "a hook waits"


PROMPT = models.prompt(1, 700)
LONG = models.prompt(2, 400)


class House:
    """A daemon and an engine that has stored PROMPT, and how it answers."""

    def __init__(self, engine: Engine, daemon: Daemon) -> None:
        self.engine, self.daemon = engine, daemon
        attached(engine, daemon)
        # With the deadlines that users have: a busy machine may let a store fall, and the next request makes up for it.
        base = daemon.resident()

        def stored() -> bool:
            engine.reset_local()
            engine.ask(PROMPT)
            return daemon.resident() >= base + full_blocks(708)

        wait_until("the prompt is stored", stored, 60.0)
        engine.reset_local()
        engine.ask(PROMPT)
        self.hit = engine.ask(PROMPT)
        assert self.hit.cached == 672
        self.long = engine.ask(LONG, max_tokens=150).tokens

    def loads_again(self) -> None:
        """Until PROMPT comes from the daemon in full, bit-equal to the local hit."""

        def full() -> bool:
            self.engine.reset_local()
            batch = self.engine.batch([PROMPT])
            assert batch.answers[0].tokens == self.hit.tokens
            if batch.external != 672:
                return False
            assert batch.answers[0].bits == self.hit.bits
            return True

        wait_until("the same engine stores and hits again", full, 60.0, every_s=0.1)

    def goes_on_for(self, seconds: float) -> None:
        """Asks one new prompt after another."""
        slowest, begin = 0.0, time.monotonic()
        while time.monotonic() - begin < seconds:
            fresh = models.prompt(int(time.monotonic() * 1000) % 100000 + 1000, 100)
            slowest = max(slowest, self.engine.ask(fresh, max_tokens=4).total_s)
        print(f"\nslowest request meanwhile: {slowest * 1000:.0f} ms")


@pytest.fixture(scope="module")
def house(module_engines: Engines, module_daemon: Daemon, model: Model) -> House:
    path = model(models.gqa())
    return House(module_engines.start(path, connector=kv_transfer(module_daemon.socket), dtype="float32"), module_daemon)


@pytest.fixture(autouse=True)
def daemon_runs(house: House) -> Iterator[None]:
    if house.daemon.process is None:
        house.daemon.start()
    yield
    if house.daemon.process is not None:
        house.daemon.resume()


def test_a_flipped_byte_is_caught_and_recomputed(house: House) -> None:
    house.loads_again()
    before = loads(house.daemon).get("failed crc", 0)
    pages = 128 // 4  # of a slot
    for slot in range(40):  # the arena holds other prompts' blocks, too: go on until one of this prompt's is hit
        house.daemon.flip_byte(skip=3 + slot * pages)
        house.engine.reset_local()
        assert house.engine.ask(PROMPT).tokens == house.hit.tokens
        if loads(house.daemon).get("failed crc", 0) > before:
            break
    else:
        pytest.fail("no flipped byte was ever noticed")
    house.loads_again()


def test_a_punched_hole_is_caught_and_the_region_is_usable_again(house: House) -> None:
    house.loads_again()
    before = loads(house.daemon).get("failed crc", 0)
    house.daemon.punch_hole(0, os.stat(house.daemon.arena()).st_size)

    def caught() -> bool:
        house.engine.reset_local()
        assert house.engine.ask(PROMPT).tokens == house.hit.tokens
        return loads(house.daemon).get("failed crc", 0) > before

    # With the deadlines that users have, a lookup on a busy machine may come to nothing; then nothing is loaded, and nothing caught.
    wait_until("a load meets the hole", caught, 60.0, every_s=0.1)
    house.loads_again()


def test_daemon_killed_in_mid_answer(house: House) -> None:
    house.engine.hooks()
    house.engine.begin([LONG, PROMPT], max_tokens=150, progress=True)
    house.engine.wait_tokens(20)
    house.daemon.kill()
    answers = house.engine.finish().answers
    assert answers[0].tokens == house.long
    assert answers[1].tokens[:8] == house.hit.tokens
    # Without a daemon.
    house.engine.reset_local()
    batch = house.engine.batch([PROMPT])
    assert (batch.external, batch.answers[0].tokens) == (0, house.hit.tokens)
    house.goes_on_for(30.0 if SOAK else 5.0)
    show_hooks("while the daemon is killed", house.engine.hooks())
    house.daemon.start()
    house.loads_again()
    engine = [pid for pid, _ in house.engine.group()]
    assert house.daemon.memory(*engine) <= (256 << 20) * 1.25, "host memory in use doubled"
    assert house.daemon.status()["tiers"]["host"]["adopted"] is True


def test_daemon_hangs_in_mid_answer(house: House) -> None:
    house.loads_again()
    house.engine.hooks()
    house.engine.begin([LONG, PROMPT], max_tokens=150, progress=True)
    house.engine.wait_tokens(20)
    house.daemon.pause()
    try:
        answers = house.engine.finish().answers
        assert answers[0].tokens == house.long
        assert answers[1].tokens[:8] == house.hit.tokens
        house.engine.call("reset")
        house.goes_on_for(30.0 if SOAK else 5.0)
        show_hooks("with a stopped daemon", house.engine.hooks())
    finally:
        house.daemon.resume()
    house.loads_again()


@pytest.mark.parametrize("role", ["core", "worker"])
def test_engine_killed_in_mid_store(role: str, engines: Engines, daemon: Daemon, model: Model) -> None:
    """kill -9 of the scheduler's process, then of a worker: no slot leaks, nothing half-written is visible, the next engine is right."""
    path = model(models.gqa())
    prompts = [models.prompt(50 + i, 900) for i in range(4)]
    victim = engines.start(path, connector=kv_transfer(daemon.socket), dtype="float32")
    attached(victim, daemon)
    base = daemon.resident()
    victim.begin(prompts, max_tokens=400, progress=True)
    wait_until("some of it is stored", lambda: daemon.resident() > base)
    os.kill(victim.pid_of(role), signal.SIGKILL)
    victim.close()

    def clean() -> bool:
        slots = daemon.status()["tiers"]["host"]["slots"]
        return slots["reserved"] == slots["filling"] == slots["quarantined"] == 0

    wait_until("no slot is left reserved, filling or quarantined", clean)
    kept = daemon.resident()
    assert kept > base
    plain = engines.start(path, in_process=True, dtype="float32")
    right = [plain.ask(p).tokens for p in prompts]
    heir = engines.start(path, connector=kv_transfer(daemon.socket), dtype="float32")
    attached(heir, daemon)
    batch = heir.batch(prompts)
    assert [a.tokens for a in batch.answers] == right
    assert batch.external > 0


def test_engine_starts_before_the_daemon(engines: Engines, model: Model, tmp_path_factory: pytest.TempPathFactory) -> None:
    late = Daemon(tmp_path_factory.mktemp("d"))
    try:
        engine = engines.start(model(models.gqa()), connector=kv_transfer(late.socket))
        first = engine.ask(PROMPT)
        assert first.cached == 0
        late.start()
        attached(engine, late)
        engine.reset_local()
        engine.ask(PROMPT)

        def hit() -> bool:
            engine.reset_local()
            return engine.batch([PROMPT]).external == 672

        wait_until("it stores and hits", hit)
    finally:
        late.close()
