"""How long lookups take from Python, over the socket, while a million blocks are held: what `kvd bench session` measures from Rust.

Needs the package `kvdaemon` and a kvd binary; `make bench` builds both. Prints one JSON object; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import sys
import tempfile
import time

import kvdaemon

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "vllm"))
from daemon import Daemon  # noqa: E402

BLOCK = 4096
BATCH = 8192


def fill(blocks: kvdaemon.Namespace, count: int) -> list[bytes]:
    hashes = [os.urandom(32) for _ in range(count)]
    zeros = bytes(BATCH * BLOCK)
    for first in range(0, count, BATCH):
        some = hashes[first : first + BATCH]
        told = blocks.store(some, memoryview(zeros)[: len(some) * BLOCK])
        if any(one != "stored" for one in told):
            raise SystemExit(f"a block was not stored: {set(told)}")
    return hashes


def quantiles(blocks: kvdaemon.Namespace, requests: list[bytes]) -> tuple[float, float]:
    """p50 and p99 in microseconds."""
    took = []
    for request in requests:
        begin = time.perf_counter_ns()
        runs = blocks.lookup(request)
        took.append((time.perf_counter_ns() - begin) / 1000)
        if sum(run.length for run in runs) != len(request) // 32:
            raise SystemExit("a block that was stored is not found")
    took = sorted(took[len(took) // 10 :])
    return took[len(took) // 2], took[len(took) * 99 // 100]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks of 4 KiB that are held meanwhile")
    args = parser.parse_args()
    room = (args.blocks * BLOCK >> 20) + 256
    with tempfile.TemporaryDirectory() as where:
        daemon = Daemon(pathlib.Path(where), f"{room}MiB").start()
        try:
            with kvdaemon.connect(daemon.socket, timeout=30.0) as session:
                blocks = session.register({"model": "bench", "weights": "bench"}, block_bytes=BLOCK)
                while daemon.status()["tiers"]["host"]["state"] != "ready":
                    time.sleep(0.02)  # all memory is there
                print(f"storing {args.blocks} blocks", file=sys.stderr)
                hashes = fill(blocks, args.blocks)
                print("looking up", file=sys.stderr)
                cold = [b"".join(random.sample(hashes, 6250)) for _ in range(550)]
                results = {"lookup_blocks": args.blocks}
                for name, requests in [
                    ("lookup_128", [b"".join(hashes[:128])] * 5500),
                    ("lookup_6250", [b"".join(hashes[:6250])] * 1100),
                    ("lookup_6250_cold", cold),
                ]:
                    results[f"{name}_us_p50"], results[f"{name}_us_p99"] = quantiles(blocks, requests)
                print(json.dumps(results, indent=2))
        finally:
            daemon.close()


if __name__ == "__main__":
    main()
