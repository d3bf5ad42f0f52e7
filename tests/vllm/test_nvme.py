"""Blocks below host memory: what was pushed out of it comes back from NVMe in the same asynchronous load, and what was there when the
daemon died is there again, for the engine that stored it and for a new one. Always bit-equal to vLLM's own local hit."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import models
import pytest
from checks import attached, full_blocks, patient
from conftest import Engines
from daemon import Daemon
from engine import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.plugin]
Model = Callable[[models.Recipe], pathlib.Path]

PROMPTS = [models.prompt(300 + i, 700) for i in range(8)]
LENGTH = full_blocks(700) * 32


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with host memory for about four of the prompts, and a store for all of them."""
    where = tmp_path_factory.mktemp("d")
    one = Daemon(where, "6MiB", None, "--nvme", str(where / "nvme"), "--nvme-capacity", "128MiB", "--extent-size", "2MiB")
    try:
        yield one.start()
    finally:
        one.close()


def tier(daemon: Daemon) -> dict[str, int]:
    return daemon.whole_status()["tier"]["counts"]


def settled(daemon: Daemon) -> bool:
    """All that was stored is below, too."""
    counts, stores = tier(daemon), daemon.status()["stores"]
    return counts["offloaded"] >= stores["stored"]


def test_evicted_blocks_come_back_and_survive_restarts(small: Daemon, engines: Engines, model: Model) -> None:
    path = model(models.gqa())
    # A local cache that is large enough for all prompts gives the hits to compare with.
    plain = engines.start(path, in_process=True)
    hits = []
    for prompt in PROMPTS:
        plain.ask(prompt)
        hits.append(plain.ask(prompt))
    assert [hit.cached for hit in hits] == [LENGTH] * len(PROMPTS)
    plain.exit()

    engine = engines.start(path, connector=patient(small.socket))
    attached(engine, small)
    for prompt in PROMPTS:
        engine.ask(prompt)
        wait_until("its blocks are below", lambda: settled(small))
    assert small.resident() < len(PROMPTS) * (LENGTH // 32), "host memory holds only some of them"

    def loads(which: object, what: str) -> None:
        for prompt, hit in zip(PROMPTS, hits):
            which.reset_local()  # type: ignore[attr-defined]
            batch = which.batch([prompt])  # type: ignore[attr-defined]
            assert batch.external == LENGTH, what
            assert batch.answers[0].bits == hit.bits, what

    before = tier(small)["fetched"]
    loads(engine, "pushed out of host memory")
    assert tier(small)["fetched"] >= before + LENGTH // 32

    # The daemon dies and comes back under the running engine; host memory begins empty.
    small.kill()
    small.start()
    status = small.whole_status()
    assert status["stores"][0]["recovered"] >= len(PROMPTS) * (LENGTH // 32)
    attached(engine, small)
    loads(engine, "after the daemon's death, the same engine")
    engine.exit()

    # Everything is new.
    small.kill()
    small.start()
    heir = engines.start(path, connector=patient(small.socket))
    attached(heir, small)
    loads(heir, "after the death of both")
