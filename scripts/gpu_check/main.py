"""Arguments, the order of the sections, and what each run may use."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import sys
import tempfile
import types
import zipfile

import gpu_check

from . import checksums, copying, facts, registering, selftest
from .driver import NoGpu, load_driver
from .host import HUGE, KIB, MIB, SPARE_HUGE_PAGES, HugePages, read_first, size_name
from .report import Report

DEADLINE_S = 285  # for the whole run
SECTIONS = {  # in order: the function, and the most seconds it may take
    "facts": (facts.facts, 60),
    "register": (registering.register, 110),
    "behaviour": (registering.behaviour, 60),
    "copies": (copying.copies, 60),
    "batch": (copying.batch, 80),
    "crc": (checksums.crc, 60),
    "torch": (copying.torch, 60),
}
HIDDEN = {"second": registering.second, "echo": selftest.echo, "crash": selftest.crash, "hang": selftest.hang}


def choose_memory(args, report: Report, pool: HugePages) -> dict:
    """Kinds of host memory and their sizes: 1 GiB each when the machine has the room, one kind at a time."""
    region = args.region_mib * MIB
    available = int(pathlib.Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * KIB
    while region * 4 > available and region > 64 * MIB:
        region //= 2
    if region < args.region_mib * MIB:
        report.notes.append(f"regions of {size_name(region)} only: {size_name(available)} of memory are available")
    sizes, set_bytes = {}, min(args.set_mib * MIB, region)
    if args.huge_pages:
        report.notes.append("huge pages: " + pool.want(region // HUGE + SPARE_HUGE_PAGES))
        room = (pool.free() - SPARE_HUGE_PAGES) * HUGE
        fit = next((r for r in (region, region // 2, region // 4, region // 8) if set_bytes <= r <= room), 0)
        if fit:
            sizes["hugetlb"] = fit
        else:
            report.notes.append("no hugetlb memfd: too few huge pages")
    sizes["plain"] = region
    shmem = read_first("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if any(f"[{x}]" in shmem for x in ("always", "within_size", "advise", "force")):
        sizes["thp"] = region
    return {"sizes": sizes, "kinds": list(sizes), "set_bytes": set_bytes}


def run_sections(args, report: Report, pool: HugePages, config: dict) -> None:
    for name, (_, seconds) in SECTIONS.items():
        if (args.only and name not in [*args.only, "facts"]) or (name == "torch" and not args.torch):
            continue
        left = DEADLINE_S - report.elapsed()
        if left < 5:
            report.problems.append(f"section {name} left out: no time left")
            continue
        code = report.section(name, config, min(seconds, left))
        if name == "facts":
            if code:
                return
            report.say(report.facts["gpu"])
            config.update(choose_memory(args, report, pool))


def run(args) -> int:
    load_driver(args.libcuda)
    report, pool = Report(), HugePages()
    config = {
        "library": args.libcuda, "device": args.device, "reps": args.reps, "register_reps": min(3, args.reps), "cpus": [],
        "scan_reps": min(5, args.reps), "scan_s": args.scan_s, "batch_max": args.batch_max, "kinds": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        if args.wheel:
            zipfile.ZipFile(args.wheel).extractall(folder)
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            run_sections(args, report, pool, config)
        finally:
            if put_back := pool.restore():
                report.notes.append(put_back)
    report.show(list(SECTIONS), config["kinds"])
    if args.json:
        report.write(args.json, config["kinds"])
    return 1 if report.problems else 0


def child(order: str) -> int:
    """One section, in this process."""
    c = types.SimpleNamespace(**json.loads(order))
    if getattr(c, "cpus", None):
        os.sched_setaffinity(0, c.cpus)
    do = SECTIONS[c.section][0] if c.section in SECTIONS else HIDDEN[c.section]
    do(c)
    return 0


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="gpu_check.py", description=gpu_check.__doc__, formatter_class=raw)
    p.add_argument("--json", metavar="FILE", help="write everything there too")
    p.add_argument("--wheel", metavar="FILE", help="kvdaemon's prebuilt wheel, for its checksum (unpacked aside, not installed)")
    p.add_argument("--self-test", action="store_true", help="run what needs no GPU, and nothing else")
    p.add_argument("--only", nargs="+", choices=list(SECTIONS), help="only these sections")
    p.add_argument("--device", type=int, default=0, help="which GPU")
    p.add_argument("--reps", type=int, default=9, help="repetitions of each measurement")
    p.add_argument("--batch-max", type=int, default=4096, help="pieces in the largest batched call; very many may crash a driver")
    p.add_argument("--region-mib", type=int, default=1024, help="size of the large registered region")
    p.add_argument("--set-mib", type=int, default=256, help="most bytes that one copy measurement moves")
    p.add_argument("--scan-s", type=float, default=0.2, help="seconds of each checksum measurement")
    p.add_argument("--no-torch", dest="torch", action="store_false", help="no cross-check by torch")
    p.add_argument("--no-huge-pages", dest="huge_pages", action="store_false", help="leave the huge page pool alone, and out")
    p.add_argument("--libcuda", default="libcuda.so.1", help="the driver's library")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.reps < 1 or args.batch_max < 1 or not 16 <= args.region_mib <= 1024 or not 4 <= args.set_mib <= 512:
        p.error("reps and batch-max are at least 1, region-mib is 16 to 1024, set-mib is 4 to 512")
    return args


def main() -> int:
    args = arguments()
    try:
        if args.child:
            return child(args.child)
        return selftest.self_test() if args.self_test else run(args)
    except NoGpu as e:
        if args.child:
            print(json.dumps({"no_gpu": str(e)}), flush=True)
        else:
            print(e, file=sys.stderr)
        return 3
