"""Section `crc`: CRC-64/NVME by cores over DRAM, alone and beside the copies (question 4).

The limit is memchr, which reads and does nothing else. What is read is larger than most caches; where it is not, the facts say so
(L3). DMA goes to and from another part of the same registered memory.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time

from .copying import registered
from .driver import Cuda
from .host import HUGE, MIB, Memory, libc, pattern
from .measure import native_crc, row, send

STILL, ABSENT = 0x11, 0x22  # the byte that all the memory holds, and one that memchr never finds


def scan_rate(work, memory: Memory, size: int, threads: int, seconds: float) -> float:
    """GB/s of each of `threads` threads that go over their share of the first `size` bytes again and again."""
    step = min(16 * MIB, size // threads)
    share, totals, go, stop = size // threads // step * step, [0] * threads, threading.Barrier(threads + 1), threading.Event()

    def scan(me: int) -> None:
        chunks = [(memory.addr + at, memory.view(at, step)) for at in range(me * share, (me + 1) * share, step)]
        go.wait()
        while not stop.is_set():
            for address, view in chunks:
                work(address, view, step)
                totals[me] += step
                if stop.is_set():
                    break

    workers = [threading.Thread(target=scan, args=(i,), daemon=True) for i in range(threads)]
    for w in workers:
        w.start()
    go.wait()
    begin = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for w in workers:
        w.join()
    return sum(totals) / threads / (time.perf_counter() - begin) / 1e9


class Dma:
    """Keeps one direction of the link busy from a thread of its own; with no direction it does nothing."""

    def __init__(self, cuda: Cuda, direction: str, host: int, n: int) -> None:
        self.cuda, self.direction, self.host, self.n = cuda, direction, host, n
        self.moved, self.error, self.stop = 0, None, threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        try:
            self.cuda.bind()
            while self.direction and not self.stop.is_set():
                self.cuda.copy(self.direction, self.host, self.cuda.memory, self.n)
                self.cuda.copy(self.direction, self.host, self.cuda.memory, self.n)
                self.cuda.sync()
                self.moved += 2 * self.n
        except Exception as e:  # raised again where the section can see it
            self.error = e

    def __enter__(self):
        self.thread.start()
        time.sleep(0.02 if self.direction else 0)
        self.begin, self.before = time.perf_counter(), self.moved
        return self

    def rate(self) -> float:
        return (self.moved - self.before) / (time.perf_counter() - self.begin) / 1e9

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()
        if self.error:
            raise self.error


def link_alone(c, cuda: Cuda, host: int, n: int) -> dict:
    """GB/s of each direction while no core reads."""
    alone = {}
    for direction in ("D2H", "H2D"):
        values = []
        for _ in range(c.scan_reps):
            with Dma(cuda, direction, host, n) as dma:
                time.sleep(c.scan_s)
                values.append(dma.rate())
        alone[direction] = statistics.median(values)
        send(row=row("crc", f"link {direction}, no core reads", values, "GB/s", method="link", beside=direction))
    return alone


def works(cuda: Cuda, memory: Memory, half: int) -> dict:
    """What cores do, by name: the read that is the limit, and the checksum when the wheel is there, its bytes checked first."""
    out = {"read (memchr)": lambda address, view, n: libc.memchr(address, ABSENT, n)}
    function, why = native_crc()
    if function is None:
        send(row=row("crc", "crc64nvme", ok=False if why.startswith("WRONG") else None, note=why))
        return out
    data = pattern(8, HUGE)
    ctypes.memmove(memory.addr, data, HUGE)
    cuda.copy("H2D", memory.addr, cuda.memory, HUGE)
    cuda.copy("D2H", memory.addr + half, cuda.memory, HUGE)
    cuda.sync()
    ok = function(memory.view(0, HUGE)) == function(memory.view(half, HUGE)) == function(data)
    send(row=row("crc", "crc64nvme of 2 MiB that went to the device and back, against the source's", ok=ok))
    ctypes.memset(memory.addr, STILL, HUGE)
    return {**out, "crc64nvme": lambda address, view, n: function(view)}


def crc(c) -> None:
    kind = c.kinds[0]
    half = c.sizes[kind] // 2
    cuda = Cuda(c.library, c.device, half)
    memory = registered(c, cuda, kind, 2 * half)
    if memory is None:
        return
    ctypes.memset(memory.addr, STILL, 2 * half)
    dma_bytes = min(half, 64 * MIB)
    by_name, alone = works(cuda, memory, half), link_alone(c, cuda, memory.addr + half, dma_bytes)
    counts = [t for t in (1, 2, 4) if t < max(2, len(os.sched_getaffinity(0)))]
    for direction, threads in [(d, t) for d in ("", "D2H", "H2D") for t in counts]:
        limit = 0.0
        for name, work in by_name.items():
            values, link = [], []
            for _ in range(c.scan_reps):
                with Dma(cuda, direction, memory.addr + half, dma_bytes) as dma:
                    values.append(scan_rate(work, memory, half, threads, c.scan_s))
                    link.append(dma.rate())
            limit = limit or statistics.median(values)
            what = f"{name}, {threads} thread{'s' if threads > 1 else ''}, " + (f"beside {direction}" if direction else "alone")
            note, keys = f"each thread; {kind}", {"method": name, "threads": threads, "beside": direction}
            if direction:
                rate = statistics.median(link)
                keys |= {"link_gbps": rate, "link_ratio": rate / alone[direction] if alone[direction] else None}
                note += f"; the link meanwhile {rate:.3g} GB/s, {rate / (alone[direction] or 1):.2f} of alone"
            send(row=row("crc", what, values, "GB/s", limit, note=note, **keys))
    cuda.unregister(memory, memory.size)
