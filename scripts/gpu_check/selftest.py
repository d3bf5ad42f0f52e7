"""Everything that needs no GPU: memory, holes, checks of bytes, checksum, table, and sections that crash or hang."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pathlib
import signal
import tempfile
import time

from .copying import DEVICE_POISON, PIECES, Pieces
from .driver import CopyAttributes
from .host import HUGE, MIB, SEALS, HugePages, Memory, libc, size_name
from .measure import CRC_CHECK, crc64nvme_slow, native_crc, row, send, table
from .report import STOPPED, Report


def check_memory(check) -> None:
    for kind in ["plain", "thp"] + (["hugetlb"] if HugePages().free() >= 8 else []):
        m = Memory(8 * MIB, kind)
        m.prefault()
        m.fill(1)
        check(f"{kind} memfd, sealed", fcntl.fcntl(m.fd, fcntl.F_GET_SEALS) == SEALS, m.pages())
        m.punch(HUGE, HUGE)
        ctypes.memmove(m.addr + HUGE + 9, b"again", 5)
        seen = bytes(m.view(HUGE, HUGE))
        empty = not any(seen[:9]) and not any(seen[14:])
        check(f"{kind} hole reads as zeros and takes bytes again", empty and seen[9:14] == b"again")
        m.close()


def check_pieces(check) -> None:
    """The check of bytes sees a right copy, one wrong byte in a piece, and one written beside a piece."""
    for size in PIECES:
        p, host, image = Pieces(size, 8 * MIB, 0, 0), Memory(8 * MIB, "anon"), Memory(16 * MIB, "anon")
        host.fill(size)
        ctypes.memset(image.addr, DEVICE_POISON, image.size)
        for i, at in enumerate(p.offsets):
            libc.memcpy(image.addr + at, host.addr + i * size, size)
        good, found = p.right(host.addr, image.addr), []
        for at in (p.offsets[-1] + size - 1, p.offsets[0] + size):
            view = image.view(at, 1)
            view[0] ^= 1
            found.append(not p.right(host.addr, image.addr))
            view[0] ^= 1
        check(f"check of {size_name(size)} pieces", good and all(found), f"{p.count} pieces")
        host.close()
        image.close()


def check_pool(check) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, value in (("nr_hugepages", "3"), ("free_hugepages", "3"), ("resv_hugepages", "1")):
            pathlib.Path(folder, name).write_text(value)
        pool = HugePages(folder)
        pool.want(10)
        raised = pathlib.Path(folder, "nr_hugepages").read_text()
        back = pool.restore()
        put_back = pathlib.Path(folder, "nr_hugepages").read_text() == "3"
        check("huge page pool raised and put back", raised == "11" and put_back, back)


def check_report(check) -> None:
    rows = [row("x", "a", [1.0, 2.0, 4.0], "GB/s", 4.0, True), row("x", "b", ok=False, note="n | m")]
    lines = table(rows).splitlines()
    check("table", len({len(x) for x in lines}) == 1 and "0.50" in lines[2] and "WRONG" in lines[3] and lines[3].count("|") == 8)
    report = Report()
    codes = [report.section(name, {}, seconds) for name, seconds in (("echo", 30), ("crash", 30), ("hang", 2))]
    good = codes == [0, -signal.SIGSEGV, STOPPED] and len(report.rows) == 1 and len(report.problems) == 2
    check("a section that answers, one that crashes, one that hangs", good, "; ".join(report.problems))


def self_test() -> int:
    failed = []

    def check(name: str, good: bool, detail: str = "") -> None:
        print(f"[self-test] {'ok  ' if good else 'FAIL'} {name}{': ' + detail if detail else ''}", flush=True)
        if not good:
            failed.append(name)

    check_memory(check)
    fields = [getattr(CopyAttributes, f).offset for f, _ in CopyAttributes._fields_]
    check("layout of CUmemcpyAttributes", fields == [0, 4, 12, 20] and ctypes.sizeof(CopyAttributes) == 24)
    check("CRC-64/NVME", crc64nvme_slow(b"123456789") == CRC_CHECK)
    function, why = native_crc()
    check("checksum of the wheel", not why.startswith("WRONG"), why or "agrees")
    check_pieces(check)
    check_pool(check)
    check_report(check)
    print(f"[self-test] {'failed: ' + ', '.join(failed) if failed else 'all right'}", flush=True)
    return 1 if failed else 0


# Sections for check_report.


def echo(c) -> None:
    send(row=row("echo", "hello", [1.0], "us"))


def crash(c) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(c) -> None:
    time.sleep(60)
