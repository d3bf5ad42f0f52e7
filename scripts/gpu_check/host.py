"""Host memory as an arena has it: sealed memfds of plain, transparent-huge or hugetlb pages, and the pool these come from."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pathlib
import random
import time
from ctypes import c_int, c_long, c_size_t, c_void_p

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HUGE = 2 * MIB
SPARE_HUGE_PAGES = 34  # a punched hole needs a fresh page while the driver still holds the old one
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
MADV_HUGEPAGE, MADV_POPULATE_WRITE, PUNCH_HOLE_KEEP_SIZE = 14, 23, 3

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.memchr.restype = libc.memcpy.restype = c_void_p
libc.mmap.argtypes = [c_void_p, c_size_t, c_int, c_int, c_int, c_long]
libc.munmap.argtypes = [c_void_p, c_size_t]
libc.madvise.argtypes = [c_void_p, c_size_t, c_int]
libc.fallocate.argtypes = [c_int, c_int, c_long, c_long]
libc.memcmp.argtypes = libc.memcpy.argtypes = [c_void_p, c_void_p, c_size_t]
libc.memchr.argtypes = [c_void_p, c_int, c_size_t]


def size_name(n: int) -> str:
    return f"{n // GIB} GiB" if n >= GIB else f"{n // MIB} MiB" if n >= MIB else f"{n // KIB} KiB" if n >= KIB else f"{n} B"


def read_first(path: str, default: str = "?") -> str:
    """The first line of a small file, or `default`."""
    try:
        return pathlib.Path(path).read_text().strip().splitlines()[0]
    except (OSError, IndexError):
        return default


def pattern(seed: int, n: int) -> bytes:
    return random.Random(seed).randbytes(n)


def last_error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


class Memory:
    """Host memory at `addr`. Kinds `plain`, `thp`, `hugetlb`: a sealed memfd, mapped shared, as an arena is. `anon`: private."""

    def __init__(self, size: int, kind: str, fd: int = -1) -> None:
        self.size, self.kind, self.fd = size, kind, fd
        if kind != "anon" and fd < 0:
            huge = os.MFD_HUGETLB | os.MFD_HUGE_2MB if kind == "hugetlb" else 0
            self.fd = os.memfd_create("kvd-gpu-check", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | huge)
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        share = 0x22 if kind == "anon" else 0x01  # MAP_PRIVATE | MAP_ANONYMOUS, or MAP_SHARED
        self.addr = libc.mmap(None, size, 3, share, self.fd, 0)
        if self.addr is None or self.addr == c_void_p(-1).value:
            error = last_error(f"mmap of {size_name(size)} {kind}")
            if self.fd >= 0:
                os.close(self.fd)
            raise error
        if kind == "thp":
            libc.madvise(self.addr, size, MADV_HUGEPAGE)

    def close(self) -> None:
        libc.munmap(self.addr, self.size)
        if self.fd >= 0:
            os.close(self.fd)

    def prefault(self) -> float:
        """Makes every page be there; seconds. A kernel before 5.14 has no populate: then by writing."""
        begin = time.perf_counter()
        if libc.madvise(self.addr, self.size, MADV_POPULATE_WRITE):
            ctypes.memset(self.addr, 0, self.size)
        return time.perf_counter() - begin

    def fill(self, seed: int, n: int = 0) -> None:
        """Random bytes of an odd period: no two pieces of a power of two hold the same, so a misplaced one is seen."""
        n = n or self.size
        tile = pattern(seed, min(n, 4 * MIB) + 509)
        for at in range(0, n, len(tile)):
            ctypes.memmove(self.addr + at, tile, min(len(tile), n - at))

    def view(self, at: int, n: int) -> memoryview:
        return memoryview((ctypes.c_ubyte * n).from_address(self.addr + at)).cast("B")

    def punch(self, at: int, n: int) -> None:
        if libc.fallocate(self.fd, PUNCH_HOLE_KEEP_SIZE, at, n):
            raise last_error("punching a hole")

    def pages(self) -> str:
        """The page size that the kernel really uses, from smaps: an accepted madvise proves nothing."""
        kib, huge, here = 0, 0, False
        try:
            lines = pathlib.Path("/proc/self/smaps").read_text().splitlines()
        except OSError:
            return "page size unknown"
        for line in lines:
            if "-" in line.split(" ", 1)[0]:
                here = int(line.split("-", 1)[0], 16) == self.addr
            elif here and line.startswith("KernelPageSize:"):
                kib = int(line.split()[1])
            elif here and line.startswith("ShmemPmdMapped:"):
                huge = int(line.split()[1])
        return f"{kib} KiB pages" + (f", {huge // 1024} MiB mapped as huge pages" if huge else "")


class HugePages:
    """The pool of 2 MiB pages, raised for the run when that is allowed, and put back by `restore`."""

    def __init__(self, folder: str = "/sys/kernel/mm/hugepages/hugepages-2048kB") -> None:
        self.folder, self.before = pathlib.Path(folder), None
        self.count = self.folder / "nr_hugepages"

    def free(self) -> int:
        """Pages that nobody has and nobody has been promised."""
        try:
            return int((self.folder / "free_hugepages").read_text()) - int((self.folder / "resv_hugepages").read_text())
        except (OSError, ValueError):
            return 0

    def want(self, pages: int) -> str:
        """Tries to have this many free pages; says what came of it."""
        missing = pages - self.free()
        if missing <= 0:
            return f"{self.free()} free, none added"
        try:
            before = int(self.count.read_text())
            try:
                self.count.write_text(str(before + missing))
            except OSError:
                self.count = pathlib.Path("/proc/sys/vm/nr_hugepages")
                self.count.write_text(str(before + missing))
            self.before = before
        except (OSError, ValueError) as e:
            return f"{max(0, self.free())} free, and the pool cannot be raised: {e}"
        return f"pool raised from {before} to {self.count.read_text().strip()} pages, {self.free()} free"

    def restore(self) -> str:
        if self.before is None:
            return ""
        self.count.write_text(str(self.before))
        before, self.before = self.before, None
        return f"huge page pool put back to {self.count.read_text().strip()} pages (was {before})"
