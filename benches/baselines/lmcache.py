"""LMCache's storage adapters beside `kvd bench nvme`: its own bench (`lmcache bench l2`) with our block sizes, against the limit of the same run.

Sets itself up in `.venv/lmcache`: LMCache from the package index with all that it asks for (6 GB, most of it for GPUs), and its Rust part, which
is not published, built from its source package. Each run is LMCache's bench as its command line starts it. What is added: its clock also reads the
CPU time of the process, a flush of the device ends a run of stores, as one ends the plain run, and what a run of loads reads must come from the device.

Deliberately absent: an order of blocks, which that bench does not know, and anything about GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv" / "lmcache"
PLAIN = ROOT / "target" / "baselines" / "release" / "plain"
LMCACHE = "0.5.6"
TURNS = 5
BLOCKS = {"2MiB": 2 << 20, "1152KiB": 1152 << 10, "64KiB": 64 << 10}
DEPTHS = (1, 4, 16)
ADAPTERS = ("fs_native", "raw_block posix", "raw_block io_uring")
# Blocks that a run moves are no more than this for each block of depth.
BLOCKS_PER_DEPTH = 400
PAGE = 4096
# What raw_block keeps for its index.
META = 64 << 20
# Read when LMCache is imported. One thread for the bench's own clearing of buffers, whose helpers would spin into the measured time.
ENVIRONMENT = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


def progress(text: str) -> None:
    print(f"lmcache: {text}", file=sys.stderr, flush=True)


def size(text: str) -> int:
    units = {"KiB": 10, "MiB": 20, "GiB": 30}
    for unit, shift in units.items():
        if text.endswith(unit) and text.removesuffix(unit).isdigit():
            return int(text.removesuffix(unit)) << shift
    raise argparse.ArgumentTypeError(f"{text!r}: write it like 512MiB")


# --- setting up -------------------------------------------------------------------------------------------------------


def pip(*args: str) -> None:
    """Its output goes to standard error: standard output is the table's."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *args]
    subprocess.run(command, check=True, stdout=sys.stderr)


def set_up() -> None:
    """Makes the environment, or does nothing when it is there."""
    wanted = hashlib.sha256(f"{LMCACHE} {sys.version}".encode()).hexdigest()
    stamp = VENV / ".kvd-stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    progress(f"installing LMCache {LMCACHE} into .venv/lmcache (6 GB the first time)")
    venv.EnvBuilder(with_pip=True, symlinks=True).create(VENV)
    pip("install", "-q", "--progress-bar", "off", f"lmcache=={LMCACHE}")
    build_raw_block()
    stamp.write_text(wanted)


def build_raw_block() -> None:
    """Outside of this repository, whose workspace cargo would take the part for. Without it raw_block is left out, and the reason said."""
    progress("building LMCache's Rust part from its source package")
    with tempfile.TemporaryDirectory() as name:
        where = pathlib.Path(name)
        try:
            pip("download", "-q", "--no-deps", "--no-binary", "lmcache", "--no-build-isolation", "-d", name, f"lmcache=={LMCACHE}")
            with tarfile.open(next(where.glob("*.tar.gz"))) as archive:
                archive.extractall(where, filter="data")
            pip("install", "-q", "--progress-bar", "off", str(where / f"lmcache-{LMCACHE}" / "rust" / "raw_block"))
        except (subprocess.CalledProcessError, OSError, tarfile.TarError, StopIteration) as error:
            progress(f"could not be built, so raw_block is left out: {error}")


# --- measuring --------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Stands for the module `time` in LMCache's runners, which read it where a round begins and where it ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []

    def perf_counter(self) -> float:
        now = time.perf_counter()
        self.seconds.append(now)
        self.cpu.append(time.process_time())
        return now

    def take(self, rounds: int) -> tuple[float, float]:
        """Wall time and CPU time of the last so many rounds; forgets all of them."""
        walls, cpus = self.seconds[-2 * rounds :], self.cpu[-2 * rounds :]
        self.seconds, self.cpu = [], []
        return tuple(sum(ends) - sum(begins) for begins, ends in ((walls[::2], walls[1::2]), (cpus[::2], cpus[1::2])))


@dataclasses.dataclass
class Moved:
    """A run of stores or loads: 10^9 bytes a second, and seconds of CPU for 10^9 bytes."""

    gbps: float
    cpu_s_per_gb: float


class Bench:
    """LMCache's bench in this process: its module is imported once, then run as its command line runs it."""

    def __init__(self) -> None:
        from lmcache.cli import main as entry
        from lmcache.cli.commands.bench.l2_adapter_bench import runner

        self.main = entry.main
        self.watch = Stopwatch()
        self.flush: list[pathlib.Path] = []
        self.found: dict[str, Moved] = {}
        self.rounds = 0
        runner.time = self.watch
        runner.bench_store = self.wrap("store", runner.bench_store)
        runner.bench_lookup = self.wrap("lookup", runner.bench_lookup)
        runner.bench_load = self.wrap("load", runner.bench_load)

    def wrap(self, name: str, call):
        def measured(*args, **kwargs):
            before = read_bytes()
            result = call(*args, **kwargs)
            wall, cpu = self.watch.take(self.rounds)
            if name == "lookup":
                return result
            if result.timed_out_rounds or result.total_success != result.total_keys:
                raise SystemExit(f"{name}: only {result.total_success} of {result.total_keys} blocks")
            if name == "load" and read_bytes() - before < result.total_data_bytes:
                raise SystemExit("what was loaded did not come from the device")
            if name == "store":
                begin, begin_cpu = time.perf_counter(), time.process_time()
                for path in self.flush:
                    flush(path)
                wall += time.perf_counter() - begin
                cpu += time.process_time() - begin_cpu
            gb = self.rounds * result.total_data_bytes_per_round / 1e9
            self.found[name] = Moved(gb / wall, cpu / gb)
            return result

        return measured

    def run(self, spec: dict, block: int, submits: int, keys: int, rounds: int, flush_at_end: list[pathlib.Path]) -> dict[str, Moved]:
        """One round waits for `submits` tasks of `keys` blocks each."""
        self.rounds, self.flush, self.found = rounds, flush_at_end, {}
        argv = ["bench", "l2", "--l2-adapter", json.dumps(spec), "--in-flight", str(submits), "--num-keys", str(keys)]
        argv += ["--data-size-kb", str(block >> 10), "--l1-align-bytes", str(PAGE), "--rounds", str(rounds), "--no-skip-verify", "-q"]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                self.main(argv)
        except SystemExit as error:
            raise SystemExit(f"lmcache {' '.join(argv)}: {error}\n{said.getvalue()}") from error
        return self.found


def read_bytes() -> int:
    """What this process has had read from devices."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def flush(path: pathlib.Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fill(path: pathlib.Path, bytes_: int) -> None:
    """A file all of whose space has been written once."""
    piece = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(-(-bytes_ // len(piece))):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def plain(program: pathlib.Path, file: pathlib.Path, block: int, blocks: int, depth: int) -> dict[str, float]:
    command = [str(program), "--file", str(file), "--bytes", str(block * blocks), "--block", str(block), "--depth", str(depth)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def spec_of(adapter: str, scratch: pathlib.Path, block: int, depth: int) -> dict:
    """Tuned: direct transfers, as many threads as blocks are under way."""
    if adapter == "fs_native":
        return {"type": "fs_native", "base_path": str(scratch / "files"), "use_odirect": True, "num_workers": depth}
    spec = {"type": "raw_block", "device_path": str(scratch / "device"), "slot_bytes": block + PAGE, "use_odirect": True}
    spec |= {"meta_total_bytes": META, "load_checkpoint_on_init": False, "io_engine": adapter.split()[1]}
    return spec | {"num_store_workers": depth, "num_load_workers": depth}


def one_run(bench: Bench, adapter: str, scratch: pathlib.Path, block: int, depth: int, keys: int, rounds: int) -> dict[str, Moved]:
    spec = spec_of(adapter, scratch, block, depth)
    if adapter != "fs_native":
        return bench.run(spec, block, depth // keys, keys, rounds, [scratch / "device"])
    files = scratch / "files"
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir()
    flush(scratch)
    return bench.run(spec, block, depth // keys, keys, rounds, [files])


def measure(args: argparse.Namespace, bench: Bench, scratch: pathlib.Path, block: int, adapters: list[str]) -> list[dict]:
    raw, most = scratch / "raw", args.bytes // block
    progress(f"blocks of {block >> 10} KiB: taking space")
    plain(args.plain, raw, block, most, 16)
    # The first round is not measured.
    fill(scratch / "device", META + (most + 2 * max(DEPTHS)) * (block + PAGE))
    rows = []
    for adapter in adapters:
        for depth in [d for d in DEPTHS if args.depth in (None, d)]:
            progress(f"{adapter}, blocks of {block >> 10} KiB, depth {depth}")
            rounds = max(1, min(most, BLOCKS_PER_DEPTH * depth) // depth)
            best = {"store": Moved(0.0, float("inf")), "load": Moved(0.0, float("inf"))}
            limit = {"write_gbps": 0.0, "read_gbps": 0.0}
            for _ in range(TURNS):
                # As many tasks of one block, or one task of as many: what is faster counts.
                for keys in sorted({1, depth}):
                    now = plain(args.plain, raw, block, rounds * depth, depth)
                    limit = {name: max(value, now[name]) for name, value in limit.items()}
                    for name, moved in one_run(bench, adapter, scratch, block, depth, keys, rounds).items():
                        best[name].gbps = max(best[name].gbps, moved.gbps)
                        best[name].cpu_s_per_gb = min(best[name].cpu_s_per_gb, moved.cpu_s_per_gb)
            rows.append(row(adapter, block, depth, rounds * depth, limit, best))
    shutil.rmtree(scratch / "files", ignore_errors=True)
    return rows


def row(adapter: str, block: int, depth: int, blocks: int, limit: dict[str, float], best: dict[str, Moved]) -> dict:
    """Named as the rows of `kvd bench nvme --json` are."""
    store, load = best["store"], best["load"]
    return {
        "adapter": adapter,
        "block": block,
        "order": "sequential",
        "depth": depth,
        "blocks": blocks,
        "raw_write_gbps": limit["write_gbps"],
        "raw_read_gbps": limit["read_gbps"],
        "store_gbps": store.gbps,
        "load_gbps": load.gbps,
        "store_ratio": store.gbps / limit["write_gbps"],
        "load_ratio": load.gbps / limit["read_gbps"],
        "cpu_s_per_gb": store.cpu_s_per_gb + load.cpu_s_per_gb,
    }


def render(rows: list[dict]) -> str:
    names = ["raw_write_gbps", "store_gbps", "store_ratio", "raw_read_gbps", "load_gbps", "load_ratio", "cpu_s_per_gb"]
    head = ["adapter", "block", "depth", "raw write", "store", "ratio", "raw read", "load", "ratio", "CPU s/GB"]
    lines = [head, ["---"] * len(head)]
    for one in rows:
        lines.append([one["adapter"], f"{one['block'] >> 10} KiB", str(one["depth"]), *(f"{one[name]:.2f}" for name in names)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\nBest of {TURNS} turns, 10^9 bytes a second of payload.\n"


# --- the command ------------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()), help="where: a directory on the device")
    parser.add_argument("--bytes", type=size, default=512 << 20, metavar="SIZE", help="most bytes that one run moves; three times as many are taken")
    parser.add_argument("--block", choices=BLOCKS, help="only blocks of this size")
    parser.add_argument("--depth", type=int, choices=DEPTHS, help="only this depth")
    parser.add_argument("--adapter", choices=ADAPTERS, help="only this one")
    parser.add_argument("--plain", type=pathlib.Path, default=PLAIN, help="the program that measures the limit; make bench-baselines builds it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--set-up", action="store_true", help="only make the environment")
    return parser


def main() -> int:
    args = arguments().parse_args()
    # Without `-P` this file would be found for the module `lmcache`.
    if pathlib.Path(sys.prefix) != VENV or not sys.flags.safe_path:
        set_up()
        if args.set_up:
            return 0
        python = str(VENV / "bin" / "python")
        os.execve(python, [python, "-P", __file__, *sys.argv[1:]], os.environ | ENVIRONMENT)
    if not args.plain.exists():
        sys.exit(f"{args.plain} is missing: run make bench-baselines, or cargo build in benches/baselines/foyer")
    adapters = [one for one in ADAPTERS if args.adapter in (None, one)]
    try:
        import lmcache_rust_raw_block_io  # noqa: F401
    except ImportError as error:
        progress(f"raw_block is left out: {error}")
        adapters = [one for one in adapters if one == "fs_native"]
    bench, rows = Bench(), []
    with tempfile.TemporaryDirectory(prefix="kvd-bench-lmcache-", dir=args.dir) as name:
        for text, block in BLOCKS.items():
            if args.block in (None, text):
                rows += measure(args, bench, pathlib.Path(name), block, adapters)
    print(json.dumps(rows, indent=2) if args.json else render(rows), end="\n" if args.json else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
