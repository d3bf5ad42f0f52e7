"""Comparisons and waits that several end-to-end files share."""

from __future__ import annotations

import itertools
import json
import time
from types import SimpleNamespace
from typing import Any

import models
from daemon import Daemon
from engine import Answer, Engine, kv_transfer, patient, wait_until

BLOCK = 32


def planned(computed: dict[Any, Any], ahead: dict[str, int] | None = None, preempted: Any = None) -> SimpleNamespace:
    """What the connector reads of a `SchedulerOutput`: of running requests the tokens that are computed before the step, and those it adds."""
    cached = SimpleNamespace(req_ids=list(computed), num_computed_tokens=list(computed.values()))
    return SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=cached, num_scheduled_tokens=ahead or {}, preempted_req_ids=preempted)


def full_blocks(tokens: int, block: int = BLOCK) -> int:
    """Blocks that a finished request of so many tokens leaves behind: the last token was never computed."""
    return (tokens - 1) // block


def wait_stored(daemon: Daemon, count: int) -> None:
    try:
        wait_until(f"{count} blocks are stored", lambda: daemon.resident() >= count)
    except TimeoutError as error:
        said = daemon.status()
        raise AssertionError(f"{error}; the daemon says {said['stores']}, {said['tiers']['host']['slots']}") from None
    assert daemon.resident() == count


_serials = itertools.count(1)


def attached(engine: Engine, daemon: Daemon, **fields: Any) -> None:
    """Until the engine's blocks become visible: it has registered (weights are hashed in the background first, and so is the adapter that
    `fields` of the request may name). Leaves one block of a prompt that nobody else asks, and no store under way."""
    before = daemon.resident()

    def shows() -> bool:
        engine.ask(models.prompt(1_000_000 + next(_serials) + engine.facts["pid"] * 1000, engine.facts["block_size"] + 1), max_tokens=1, **fields)
        return daemon.resident() > before

    wait_until("the engine's connector stores", shows, 60.0, every_s=0.2)
    engine.reset_local()


def settled(daemon: Daemon) -> None:
    """After `reset_local`, until which an engine's copies are over: until the daemon has made all of them visible."""
    wait_until("no store is open", daemon.no_store_is_open)


def largest_gap(one: Answer, other: Answer) -> float:
    """Largest difference of the logprobs of tokens that both list, over the positions before they choose differently."""
    gap = 0.0
    for a, b, x, y in zip(one.samples[0].logprobs, other.samples[0].logprobs, one.tokens, other.tokens):
        p, q = {t: float.fromhex(h) for t, h in a}, {t: float.fromhex(h) for t, h in b}
        gap = max([gap, *(abs(p[t] - q[t]) for t in p if t in q)])
        if x != y:
            break
    return gap


def merged(dumps: list[dict[str, Any]]) -> list[list[list[str]]]:
    """Digests [layer][block][head] of all ranks of one pipeline stage side by side, heads in rank order."""
    layers = []
    for per_rank in zip(*(d["layers"] for d in dumps)):
        layers.append([[h for rank in per_rank for h in rank[b]] for b in range(len(per_rank[0]))])
    return layers


def loads(daemon: Daemon) -> dict[str, int]:
    """Blocks loaded since the daemon started, and those that failed, by reason."""
    said = daemon.status()["loads"]
    return {"hit": said["hit"], "absent": said["absent"]} | {f"failed {k}": v for k, v in said["failed"].items()}


def differences(daemon: Daemon) -> list[set[str]]:
    """For every pair of namespaces that the daemon compares: the fields in which they differ."""
    return [{one["field"] for one in d["fields"]} for n in daemon.status()["namespaces"] for d in n["differs"]]


def reference_us() -> tuple[float, float]:
    """p50 and p99, in microseconds, of a few microseconds of plain Python after a sleep as long as an engine's step: on a virtual machine the
    first microseconds of a thread that has slept cost much more than the same work in a loop, whatever it does."""
    took = []
    for _ in range(500):
        time.sleep(0.003)
        begin = time.perf_counter_ns()
        json.dumps({str(i): i for i in range(8)})
        took.append(time.perf_counter_ns() - begin)
    took.sort()
    return took[len(took) // 2] / 1000, took[len(took) * 99 // 100] / 1000


__all__ = [
    "BLOCK", "attached", "differences", "full_blocks", "kv_transfer", "largest_gap", "loads", "merged", "patient", "reference_us", "settled",
    "wait_stored",
]
