"""What the connector costs in the engine's processes, by model shape: the scheduler's hooks while blocks are stored and loaded, and the
worker's hooks beside the time from one step to the next, while there is nothing to do.

Real vLLM on a CPU (on a GPU with KVD_TEST_GPU=1: `make gpu-vllm`) with tiny random models, whose steps are a fraction of a real model's.
Its core polls for its worker's answers, as it does everywhere (the tests of vLLM let it sleep instead): a core that sleeps has cold caches
when it wakes.
Beside the scheduler's hooks stands what vLLM's own scheduler takes for a step, and what becomes on this machine of some microseconds of
additions in the same thread, right after a step's orders; and, after all, of a few microseconds of Python after a sleep.
`make bench-hooks` builds what this needs. A table, or one JSON object with --json; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "vllm"))
import models  # noqa: E402
from checks import attached, reference_us  # noqa: E402
from daemon import Daemon  # noqa: E402
from engine import Batch, Engine, patient  # noqa: E402

SHAPES = {"llama": models.gqa, "qwen3": models.qwen3, "deepseek": models.mla, "gemma": models.gemma, "gpt-oss": models.gptoss, "qwen3-next": models.qwen3next}
AT_ONCE = 8


def prompts_of(number: int) -> list[list[int]]:
    """Eight prompts, half of which begin alike."""
    prompts = [models.prompt(number, 512) + models.prompt(1000 + number * AT_ONCE + i, 200 + 100 * i) for i in range(AT_ONCE // 2)]
    return prompts + [models.prompt(2000 + number * AT_ONCE + i, 300 + 200 * i) for i in range(AT_ONCE // 2)]


def share_loaded(batches: list[Batch]) -> float:
    """Of all prompts' tokens."""
    return sum(one.external for one in batches) / sum(answer.prompt for one in batches for answer in one.answers)


def bursts(engine: Engine, count: int) -> float:
    """`count` times eight prompts in the same moment, each with an answer of 48 tokens; gives the share of prompt tokens that were loaded."""
    return share_loaded([engine.batch(prompts_of(number), max_tokens=48, logprobs=None) for number in range(count)])


def steady(engine: Engine, count: int) -> float:
    """As many prompts, always eight under way: answers have 32 to 95 tokens, and the next prompt comes when one is over."""
    prompts = [one for number in range(count) for one in prompts_of(10_000 + number)]
    lengths = [32 + 37 * at % 64 for at in range(len(prompts))]
    return share_loaded([engine.batch(prompts, max_tokens=lengths, logprobs=None, at_once=AT_ONCE)])


TRAFFIC = {"steady": steady, "bursts": bursts}


def scheduler_row(hooks: dict[str, dict[str, float]]) -> dict[str, Any]:
    whole, step, vllm, additions = (hooks.pop(name) for name in ("all", "step", "vllm", "additions"))
    slowest = max(hooks, key=lambda name: hooks[name]["cpu_p99"])
    row = {"calls": whole["calls"]} | {f"{part}_us": whole[part] for part in ("p50", "p99", "cpu_p99")}
    row |= {"steps": step["calls"]}
    for name, one in {"step": step, "vllm": vllm, "additions": additions}.items():
        row |= {f"{name}_p50_us": one["p50"], f"{name}_p99_us": one["p99"]}
    return row | {"slowest": slowest, "slowest_p99_us": hooks[slowest]["p99"], "slowest_cpu_p99_us": hooks[slowest]["cpu_p99"]}


def worker_row(engine: Engine, count: int) -> dict[str, Any]:
    """Decoding without a block to store: prompt and answer together are less than one."""
    engine.watch_steps()
    for number in range(count):
        engine.batch([models.prompt(3000 + number * AT_ONCE + i, 4) for i in range(AT_ONCE)], max_tokens=24, logprobs=None)
    steps = [(end - begin, after - before) for (begin, before), (end, after) in itertools.pairwise(engine.watched_steps())]
    # Between two batches the worker waits for the next.
    usual = 4 * statistics.median(step for step, _ in steps)
    steps = [one for one in steps if one[0] < usual]
    share = sum(hooks for _, hooks in steps) / sum(step for step, _ in steps)
    return {
        "steps": len(steps), "step_us": statistics.median(step for step, _ in steps) / 1000,
        "hooks_us": statistics.median(hooks for _, hooks in steps) / 1000, "share": share,
    }


def shape(name: str, where: pathlib.Path, count: int) -> dict[str, Any]:
    path = models.make(SHAPES[name](), where)
    with Daemon(where / "d", "1GiB") as daemon:
        engine = Engine(path, where / "engine.log", connector=patient(daemon.socket), mla_prefix_caching=True, threads=1, yields=True)
        with engine:
            attached(engine, daemon)
            rows = {}
            for traffic, run in TRAFFIC.items():
                engine.hooks(beside=True)
                run(engine, count)
                rows[traffic] = {"storing": scheduler_row(engine.hooks(beside=True))}
            for traffic, run in TRAFFIC.items():
                engine.reset_local()
                engine.hooks(beside=True)
                share = run(engine, count)
                if share < 0.3:
                    raise SystemExit(f"{name}: only {share:.0%} of the prompts was loaded; the numbers would say nothing")
                rows[traffic]["loading"] = scheduler_row(engine.hooks(beside=True)) | {"loaded_share": share}
            return rows | {"idle_worker": worker_row(engine, 4 * count)}


def table(results: dict[str, Any]) -> str:
    p50, p99 = results["reference_us"]
    lines = [
        "scheduler's hooks (us): each call by the clock, and of the thread's own time on a CPU; all that belong to a step that computes something,",
        "and vLLM's own part of a step; a loop of additions in the same thread",
        f"{'shape':<12}{'prompts':<8}{'':<9}{'calls':>6}{'p50':>6}{'p99':>7}{'cpu p99':>9}  step p50{'p99':>6}  vLLM p50{'p99':>6}"
        f"  loop p50{'p99':>6}   slowest kind of hook: p99, cpu p99",
    ]
    for name, row in results["shapes"].items():
        for traffic, phase in itertools.product(TRAFFIC, ("storing", "loading")):
            one = row[traffic][phase]
            lines.append(
                f"{name:<12}{traffic:<8}{phase:<9}{one['calls']:>6}{one['p50_us']:>6.1f}{one['p99_us']:>7.1f}{one['cpu_p99_us']:>9.1f}"
                f"{one['step_p50_us']:>10.0f}{one['step_p99_us']:>6.0f}{one['vllm_p50_us']:>10.0f}{one['vllm_p99_us']:>6.0f}"
                f"{one['additions_p50_us']:>10.1f}{one['additions_p99_us']:>6.1f}{one['slowest_p99_us']:>9.0f}{one['slowest_cpu_p99_us']:>5.0f} {one['slowest']}"
            )
    lines += [f"beside it, json.dumps of 8 numbers after a sleep of 3 ms: p50 {p50:.1f}, p99 {p99:.1f}", ""]
    lines += ["worker's hooks with nothing to do, from one step to the next", f"{'shape':<12}{'steps':>7}{'step us':>10}{'hooks us':>10}{'share':>9}"]
    for name, row in results["shapes"].items():
        one = row["idle_worker"]
        lines.append(f"{name:<12}{one['steps']:>7}{one['step_us']:>10.0f}{one['hooks_us']:>10.1f}{one['share']:>9.2%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=8, help="of eight prompts at once, for each shape and phase")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = {"shapes": {}}
    for name in args.shapes:
        print(f"{name}: an engine stores, loads, and has nothing to do", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="kvd-bench-") as where:
            results["shapes"][name] = shape(name, pathlib.Path(where), args.rounds)
    results["reference_us"] = reference_us()
    print(json.dumps(results, indent=2) if args.json else table(results))


if __name__ == "__main__":
    main()
