"""Run make targets one after the other, stop at the first that fails, and print where the minutes went.

Kept apart from make because make can't report times, and because the table must be printed also when a stage failed.
"""

from __future__ import annotations

import subprocess
import sys
import time


def main() -> int:
    stages = sys.argv[1:]
    if not stages:
        sys.exit("usage: stages.py TARGET [TARGET ...]")
    rows: list[tuple[str, float, str]] = []
    failed = False
    for i, stage in enumerate(stages):
        if failed:
            rows.append((stage, 0.0, "not run"))
            continue
        print(f"\n=== {stage} ({i + 1} of {len(stages)})", flush=True)
        start = time.monotonic()
        code = subprocess.run(["make", "--no-print-directory", stage]).returncode
        rows.append((stage, time.monotonic() - start, "ok" if code == 0 else f"failed ({code})"))
        failed = code != 0
    width = max(len(r[0]) for r in rows)
    print("\nwhere the minutes went")
    for name, seconds, outcome in rows:
        print(f"  {name:<{width}}  {seconds / 60:6.1f} min  {outcome}")
    print(f"  {'all':<{width}}  {sum(r[1] for r in rows) / 60:6.1f} min", flush=True)
    good = sum(r[2] == "ok" for r in rows)
    print(f"stages: {good} passed, {len(rows) - good} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
