"""Sections `copies`, `batch` and `torch`: the pinned peak (question 2), and pieces of four sizes by plain and by batched calls
(question 3). The peak is taken again in each process, so that a ratio never compares two of them."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from ctypes import byref, c_size_t, c_uint64, c_void_p

from .driver import ORDER_ANY, ORDER_STREAM, PREFER_OVERLAP, CopyAttributes, Cuda, CudaError, Location
from .host import KIB, MIB, Memory, libc, size_name
from .measure import rates, repeat, row, send

PIECES = [2 * MIB, 64 * KIB, 8 * KIB, 512]
MAX_PIECES = 32768
HOST_POISON, DEVICE_POISON = 0x5A, 0xA5


class Pieces:
    """Pieces of one size: in order in host memory, as in a slot, and scattered in device memory, as an engine's pages are.

    On the device the gaps are as large as the pieces, so that nothing can be merged there.
    """

    def __init__(self, size: int, total: int, host: int, dev: int) -> None:
        self.size, self.count = size, min(MAX_PIECES, total // size)
        order = list(range(self.count))
        random.Random(size).shuffle(order)
        self.offsets = [2 * size * i for i in order]
        self.host = [host + size * i for i in range(self.count)]
        self.dev = [dev + at for at in self.offsets]
        self.span, self.bytes = 2 * size * self.count, size * self.count

    def right(self, host: int, image: int) -> bool:
        """Host memory holds the pieces of `image`, a copy of the device memory, whose gaps still hold the poison."""
        gap = bytes([DEVICE_POISON]) * self.size
        n = self.size
        return all(
            libc.memcmp(host + i * n, image + at, n) == 0 and libc.memcmp(image + at + n, gap, n) == 0
            for i, at in enumerate(self.offsets)
        )


def plain_calls(cuda: Cuda, p: Pieces, direction: str):
    """A function that asks for all pieces, one asynchronous call each."""
    stream, n = cuda.streams[0], p.size
    call = cuda.lib.cuMemcpyHtoDAsync_v2 if direction == "H2D" else cuda.lib.cuMemcpyDtoHAsync_v2
    pairs = list(zip(p.dev, p.host) if direction == "H2D" else zip(p.host, p.dev))

    def submit() -> None:
        for to, source in pairs:
            if code := call(to, source, n, stream):
                cuda.check(f"{direction} of {n} bytes", code)

    return submit


def batched_calls(cuda: Cuda, p, direction: str, function, form: int, per_call: int, order: int, flags: int):
    """The same in batched calls of at most `per_call` pieces; the arrays are made beforehand."""
    to, source = (p.dev, p.host) if direction == "H2D" else (p.host, p.dev)
    array = c_uint64 * p.count
    dsts, srcs, sizes = array(*to), array(*source), (c_size_t * p.count)(*[p.size] * p.count)
    attributes, first, failed = CopyAttributes(order, Location(), Location(), flags), c_size_t(0), c_size_t(0)
    tail = [byref(attributes), byref(first), 1, *([] if form >= 13000 else [byref(failed)]), cuda.streams[0]]

    def submit() -> None:
        for at in range(0, p.count, per_call):
            n = min(per_call, p.count - at)
            code = function(byref(dsts, 8 * at), byref(srcs, 8 * at), byref(sizes, 8 * at), n, *tail)
            if code:
                cuda.check(f"batched {direction} of {n} pieces of {p.size} bytes", code)

    return submit


def call_overhead_us() -> list:
    """What Python itself takes for a plain call: a C function that does nothing, with the same arguments."""
    nothing = libc["abs"]
    nothing.argtypes = [c_uint64, c_void_p, c_size_t, c_void_p]
    pairs = [(0, 1 << 40)] * 20_000

    def loop() -> None:
        for a, b in pairs:
            if nothing(a, b, 512, b):
                raise AssertionError("abs(0) is not 0")

    return [s / len(pairs) * 1e6 for s in repeat(5, loop)]


class Bench:
    """Device memory of two sets, a host image of it, and the peaks of this process to hold everything else against."""

    def __init__(self, c) -> None:
        self.c, self.set, self.peaks = c, c.set_bytes, {}
        self.cuda, self.image = Cuda(c.library, c.device, 2 * c.set_bytes), Memory(2 * c.set_bytes, "anon")
        self.image.fill(3)
        pinned = self.cuda.pointer("cuMemHostAlloc", c.set_bytes, 0)
        for _ in range(20):  # the link may sleep until it is used
            self.cuda.copy("H2D", pinned, self.cuda.memory, self.set)
        self.cuda.sync()
        self.peak(pinned, "cuMemHostAlloc")
        self.cuda("cuMemFreeHost", pinned)

    def peak(self, host: int, label: str) -> None:
        """One copy of the whole set each way, then half a set each way at the same time."""
        cuda, n, half = self.cuda, self.set, self.set // 2

        def one(direction: str) -> None:
            cuda.copy(direction, host, cuda.memory, n)
            cuda.sync()

        def both() -> None:
            cuda.copy("H2D", host, cuda.memory, half, 0)
            cuda.copy("D2H", host + half, cuda.memory + half, half, 1)
            cuda.sync(0)
            cuda.sync(1)

        self.image.fill(n % 1000 + len(label), n)
        ctypes.memmove(host, self.image.addr, n)
        cuda.fill(cuda.memory, DEVICE_POISON, n)
        for direction, do in (("H2D", lambda: one("H2D")), ("D2H", lambda: one("D2H")), ("both", both)):
            if direction == "D2H":
                ctypes.memset(host, HOST_POISON, n)
            elif direction == "both":
                cuda.fill(cuda.memory, DEVICE_POISON, half)
                ctypes.memset(host + half, HOST_POISON, half)
            values = rates(n, repeat(self.c.reps, do))
            self.peaks.setdefault(direction, statistics.median(values))
            if direction != "D2H":  # D2H: the host was poisoned, so what it holds now came
                ctypes.memset(host, HOST_POISON, half)
                cuda("cuMemcpyDtoH_v2", host, cuda.memory, half if direction == "both" else n)
            ok = libc.memcmp(host, self.image.addr, n) == 0
            what = f"{direction} {size_name(n)} at once, {label}"
            keys = {"kind": label, "direction": direction, "method": "peak"}
            send(row=row(self.c.section, what, values, "GB/s", self.peaks[direction], ok, **keys))

    def pieces(self, memory: Memory, size: int, direction: str, method: str, make) -> None:
        """Times what `make(pieces)` gives, then checks the bytes of an extra run over poisoned memory."""
        cuda, p, asked = self.cuda, Pieces(size, self.set, memory.addr, self.cuda.memory), []
        what = f"{direction} {size_name(size)}, {method}, {memory.kind}"
        keys = {"kind": memory.kind, "direction": direction, "piece": size, "method": method, "pieces": p.count}
        try:
            submit = make(p)

            def run() -> None:
                begin = time.perf_counter()
                submit()
                asked.append((time.perf_counter() - begin) / p.count * 1e6)
                cuda.sync()

            cuda.fill(cuda.memory, DEVICE_POISON, p.span)
            memory.fill(size, p.bytes)
            if direction == "D2H":
                plain_calls(cuda, p, "H2D")()
                cuda.sync()
            seconds = repeat(self.c.reps, run)
            if direction == "D2H":
                ctypes.memset(memory.addr, HOST_POISON, p.bytes)
            else:
                cuda.fill(cuda.memory, DEVICE_POISON, p.span)
            run()
            cuda("cuMemcpyDtoH_v2", self.image.addr, cuda.memory, p.span)
            ok = p.right(memory.addr, self.image.addr)
        except CudaError as e:
            send(row=row(self.c.section, what, note=f"refused: {e}", **keys))
            return
        each, ask = statistics.median(seconds) / p.count * 1e6, statistics.median(asked[1:-1])
        note = f"{each:.3g} us a piece, {ask:.3g} of it to ask; {p.count} pieces"
        values = rates(p.bytes, seconds)
        send(row=row(self.c.section, what, values, "GB/s", self.peaks[direction], ok, note, us_each=each, us_ask=ask, **keys))


def registered(c, cuda: Cuda, kind: str, size: int):
    """Prefaulted, registered memory; or None, and a row that says why."""
    try:
        memory = Memory(size, kind)
        memory.prefault()
        cuda.register(memory, memory.size, 0)
        return memory
    except (CudaError, OSError) as e:
        send(row=row(c.section, f"{kind} memory for copies", note=f"refused: {e}", kind=kind))
        return None


def copies(c) -> None:
    bench = Bench(c)
    cuda = bench.cuda
    pageable = Memory(bench.set, "anon")
    bench.peak(pageable.addr, "not registered")
    pageable.close()
    send(row=row("copies", "Python's own share of a plain call", call_overhead_us(), "us"))
    for kind in c.kinds:
        memory = registered(c, cuda, kind, bench.set)
        if memory is None:
            continue
        bench.peak(memory.addr, kind)
        for size in PIECES:
            for d in ("H2D", "D2H"):
                bench.pieces(memory, size, d, "plain calls", lambda p: plain_calls(cuda, p, d))
        cuda.unregister(memory, memory.size)
        memory.close()


def batch(c) -> None:
    bench = Bench(c)
    cuda, most = bench.cuda, c.batch_max
    functions = cuda.batch_functions()
    if not functions:
        send(row=row("batch", "batched copies", note="absent in this driver (12.8 and newer have them)"))
        return
    newest = max(functions)
    usual = [(newest, most, ORDER_STREAM, 0, ""), (newest, 32, ORDER_STREAM, 0, "")]
    more = [(newest, most, ORDER_ANY, 0, ", any order"), (newest, most, ORDER_STREAM, PREFER_OVERLAP, ", prefer overlap")]
    more += [(form, most, ORDER_STREAM, 0, ", older form") for form in functions if form != newest]
    for kind, ways in [(kind, usual) for kind in c.kinds] + [(c.kinds[0], more)]:  # what matters most comes first
        memory = registered(c, cuda, kind, bench.set)
        if memory is None:
            continue
        for form, per_call, order, flags, label in ways:
            for size in PIECES:
                for d in ("H2D", "D2H"):
                    bench.pieces(memory, size, d, f"batches of {per_call}{label}", lambda p: batched_calls(
                        cuda, p, d, functions[form], form, per_call, order, flags))
        cuda.unregister(memory, memory.size)
        memory.close()


def torch(c) -> None:
    """The peak by somebody else's code, when torch is there."""
    try:
        import torch as t
    except ImportError:
        send(row=row("torch", "pinned copies by torch", note="torch not found"))
        return
    if not t.cuda.is_available():
        send(row=row("torch", "pinned copies by torch", note=f"torch {t.__version__} cannot use the GPU"))
        return
    n = c.set_bytes
    host, back = t.randint(0, 256, (n,), dtype=t.uint8).pin_memory(), t.zeros(n, dtype=t.uint8).pin_memory()
    device = t.empty(n, dtype=t.uint8, device=f"cuda:{c.device}")

    def one(to, source) -> None:
        to.copy_(source, non_blocking=True)
        t.cuda.synchronize(c.device)

    for direction, to, source in (("H2D", device, host), ("D2H", back, device)):
        values = rates(n, repeat(c.reps, lambda: one(to, source)))
        ok = bool(t.equal(device.cpu() if direction == "H2D" else back, host))
        what = f"{direction} {size_name(n)} at once, torch {t.__version__}"
        send(row=row("torch", what, values, "GB/s", ok=ok, direction=direction))
