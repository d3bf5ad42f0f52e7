"""Sections `register` and `behaviour`: which host memory the driver takes, how long it takes, and what a registration does when
things go wrong (question 1)."""

from __future__ import annotations

import ctypes
import json
import pathlib
import subprocess
import sys
import time
import types

from .copying import batched_calls
from .driver import ORDER_STREAM, Cuda, CudaError
from .host import GIB, HUGE, KIB, MIB, Memory, libc, pattern, size_name
from .measure import row, send

FLAGS = {"default": 0, "portable": 1}  # CU_MEMHOSTREGISTER_PORTABLE
LAUNCHER = str(pathlib.Path(__file__).resolve().parent.parent / "gpu_check.py")


def round_trip(cuda: Cuda, memory: Memory, n: int) -> bool:
    """The last `n` bytes of this memory go to the device, and come back into its first `n`."""
    tail, data = memory.addr + memory.size - n, pattern(n, n)
    ctypes.memmove(tail, data, n)
    ctypes.memset(memory.addr, 0x5A, n)
    cuda.copy("H2D", tail, cuda.memory, n)
    cuda.copy("D2H", memory.addr, cuda.memory, n)
    cuda.sync()
    return libc.memcmp(memory.addr, data, n) == 0


def register_one_way(c, cuda: Cuda, kind: str, region: int, flags: str, prefault: bool) -> None:
    size, memory, ok, took, back, faults = c.sizes[kind], None, True, [], [], []
    keys = {"kind": kind, "region": region, "flags": flags, "prefault": prefault}
    try:
        for _ in range(c.register_reps):
            if memory is None or not prefault:
                if memory:
                    memory.close()
                memory = Memory(size, kind)
                faults += [memory.prefault()] if prefault else []
            begin = time.perf_counter()
            cuda.register(memory, region, FLAGS[flags])
            took.append(time.perf_counter() - begin)
            ok = round_trip(cuda, memory, 64 * KIB) and ok
            begin = time.perf_counter()
            cuda.unregister(memory, region)
            back.append(time.perf_counter() - begin)
        note = memory.pages()
    except (CudaError, OSError) as e:
        note = f"refused: {e}"
    finally:
        if memory:
            memory.close()

    def each(step: str, seconds: list, **more) -> None:
        text = f"{step} {kind}, {size_name(region)} regions, {flags}, {'prefaulted' if prefault else 'untouched'}"
        send(row=row("register", text, [s * 1e3 * GIB / size for s in seconds], "ms/GiB", step=step, **keys, **more))

    each("register", took, ok=ok if took else None, note=note)
    if back:
        each("unregister", back)
    if faults and flags == "default" and region == size:
        each("prefault", faults)


def register(c) -> None:
    cuda = Cuda(c.library, c.device, MIB)
    size, took, back = c.sizes["plain"], [], []
    for _ in range(c.register_reps):
        begin = time.perf_counter()
        pinned = cuda.pointer("cuMemHostAlloc", size, 0)
        took.append((time.perf_counter() - begin) * 1e3 * GIB / size)
        begin = time.perf_counter()
        cuda("cuMemFreeHost", pinned)
        back.append((time.perf_counter() - begin) * 1e3 * GIB / size)
    send(row=row("register", f"cuMemHostAlloc of {size_name(size)}, to compare", took, "ms/GiB", step="alloc"))
    send(row=row("register", f"cuMemFreeHost of {size_name(size)}, to compare", back, "ms/GiB", step="free"))
    for kind in c.kinds:
        for region in dict.fromkeys([c.sizes[kind], min(64 * MIB, c.sizes[kind])]):
            for prefault in (True, False):
                for flags in FLAGS:
                    register_one_way(c, cuda, kind, region, flags, prefault)


def device_reads(cuda: Cuda, address: int, n: int) -> bytes:
    """What DMA finds at a host address."""
    back = ctypes.create_string_buffer(n)
    cuda.fill(cuda.memory, 0, n)
    cuda("cuMemcpyHtoD_v2", cuda.memory, address, n)
    cuda("cuMemcpyDtoH_v2", back, cuda.memory, n)
    return back.raw


def hole(c, cuda: Cuda, kind: str) -> None:
    """A page is punched out under a registration, and faulted in again by the CPU: do DMA and mapping still agree?"""
    memory, at, n = Memory(16 * MIB, kind), 4 * MIB, HUGE
    first, second_, third = (pattern(seed, n) for seed in (1, 2, 3))
    spot = memory.addr + at
    memory.prefault()
    memory.fill(9)
    before = bytes(memory.view(at - n, n)) + bytes(memory.view(at + n, n))
    cuda.register(memory, memory.size, 0)
    ctypes.memmove(spot, first, n)
    memory.punch(at, n)
    zeros = not any(bytes(memory.view(at, n)))
    ctypes.memmove(spot, second_, n)
    read = {first: "the old page", second_: "the new page"}.get(device_reads(cuda, spot, n), "neither page")
    cuda("cuMemcpyHtoD_v2", cuda.memory, third, n)
    cuda("cuMemcpyDtoH_v2", spot, cuda.memory, n)
    came = {third: "arrives", second_: "is lost to the mapping"}.get(bytes(memory.view(at, n)), "arrives in part")
    cuda.unregister(memory, memory.size)
    cuda.register(memory, memory.size, 0)
    ctypes.memmove(spot, first, n)
    healed = device_reads(cuda, spot, n) == first
    beside = before == bytes(memory.view(at - n, n)) + bytes(memory.view(at + n, n))
    cuda.unregister(memory, memory.size)
    memory.close()
    note = f"the hole reads as {'zeros' if zeros else 'SOMETHING'}; DMA out then reads {read}; DMA in {came}; " \
           f"registering again {'heals' if healed else 'DOES NOT HEAL'} it; bytes beside it {'stay' if beside else 'CHANGED'}"
    what = f"hole punched and faulted again under a registered {kind} memfd"
    send(row=row("behaviour", what, ok=healed and zeros and beside, note=note, kind=kind, read=read))


def across(cuda: Cuda, memory: Memory, spot: int, how: str, submit) -> None:
    """One piece that lies in two registrations that touch."""
    ok, n = None, HUGE
    try:
        cuda.fill(cuda.memory, 0, n)
        submit()
        cuda.sync()
        back = ctypes.create_string_buffer(n)
        cuda("cuMemcpyDtoH_v2", back, cuda.memory, n)
        ok, note = libc.memcmp(spot, back, n) == 0, "accepted"
    except CudaError as e:
        note = f"refused: {e.name}"
    send(row=row("behaviour", f"one {memory.kind} piece across two registrations, {how}", ok=ok, note=note, kind=memory.kind))


def edges(c, cuda: Cuda, kind: str) -> None:
    memory, half = Memory(16 * MIB, kind), 8 * MIB
    memory.prefault()
    memory.fill(4)
    cuda.register(memory, half, 0)
    same = cuda.pointer("cuMemHostGetDevicePointer_v2", memory.addr, 0) == memory.addr
    note = "the same as the host's" if same else "NOT the host's: copies by unified address need care"
    send(row=row("behaviour", f"the device's address of registered {kind} memory", note=note, kind=kind))
    spot = memory.addr + half - HUGE // 2
    across(cuda, memory, spot, "a plain call", lambda: cuda.copy("H2D", spot, cuda.memory, HUGE))
    for form, function in list(cuda.batch_functions().items())[:1]:
        one = types.SimpleNamespace(size=HUGE, count=1, host=[spot], dev=[cuda.memory])
        across(cuda, memory, spot, "a batched call", batched_calls(cuda, one, "H2D", function, form, 1, ORDER_STREAM, 0))
    try:
        cuda("cuMemHostRegister_v2", memory.addr, half, 0)
        note = "accepted"
    except CudaError as e:
        note = f"refused: {e.name}"
    send(row=row("behaviour", f"a {kind} range registered twice by one process", note=note, kind=kind))
    if note == "accepted":
        cuda("cuMemHostUnregister", memory.addr)
    cuda.unregister(memory, half)
    memory.close()


def two_processes(c, cuda: Cuda, kind: str) -> None:
    """Every engine of a node registers the arena: here a second process does so while this one holds its own registration."""
    memory, shared = Memory(16 * MIB, kind), False
    memory.prefault()
    cuda.register(memory, memory.size, FLAGS["portable"])
    ctypes.memmove(memory.addr, pattern(5, HUGE), HUGE)
    order = json.dumps({**vars(c), "section": "second", "fd": memory.fd, "kind": kind})
    command = [sys.executable, LAUNCHER, "--child", order]
    try:
        done = subprocess.run(command, pass_fds=[memory.fd], capture_output=True, text=True, timeout=40)
        shared = json.loads(done.stdout or "{}").get("shared", False)
        failed = f"the second failed: {done.stderr.strip()[-200:]}"
        note = "both register it; each sees by DMA what the other wrote" if shared else failed
    except (subprocess.TimeoutExpired, ValueError) as e:
        note = f"no answer from the second: {e}"
    want = pattern(6, HUGE)
    ok = shared and device_reads(cuda, memory.addr + 4 * MIB, HUGE) == want == bytes(memory.view(4 * MIB, HUGE))
    cuda.unregister(memory, memory.size)
    memory.close()
    send(row=row("behaviour", f"one {kind} memfd registered by two processes", ok=ok, note=note, kind=kind))


def second(c) -> None:
    """The other process of `two_processes`."""
    cuda, memory = Cuda(c.library, c.device, HUGE), Memory(16 * MIB, c.kind, c.fd)
    cuda.register(memory, memory.size, FLAGS["portable"])
    shared = device_reads(cuda, memory.addr, HUGE) == pattern(5, HUGE)
    cuda("cuMemcpyHtoD_v2", cuda.memory, pattern(6, HUGE), HUGE)
    cuda("cuMemcpyDtoH_v2", memory.addr + 4 * MIB, cuda.memory, HUGE)
    cuda.unregister(memory, memory.size)
    send(shared=shared)


def behaviour(c) -> None:
    cuda = Cuda(c.library, c.device, HUGE)
    for kind in c.kinds:
        for check in (edges, two_processes, hole):
            try:
                check(c, cuda, kind)
            except (CudaError, OSError) as e:
                send(row=row("behaviour", f"{check.__name__}, {kind}", note=f"stopped: {e}", kind=kind))
