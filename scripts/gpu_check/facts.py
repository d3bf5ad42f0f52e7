"""Section `facts`: what machine this is. Whatever cannot be read is a question mark, never an error."""

from __future__ import annotations

import ctypes
import os
import pathlib
import platform
import resource
from ctypes import byref, c_size_t

from .driver import Cuda
from .host import GIB, read_first
from .measure import send


def cpu_fact() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = dict(line.split(":", 1) for line in text.splitlines() if line.count(":"))
    found = {k.strip(): v.strip() for k, v in found.items()}
    flags = [f for f in ("avx2", "avx512f", "pclmulqdq", "vpclmulqdq") if f in found.get("flags", "").split()]
    cache = read_first("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return f"{found.get('model name', '?')}, {os.cpu_count()} CPUs, L3 {cache}, {' '.join(flags) or platform.machine()}"


def cpu_numbers(text: str) -> list:
    """`0-3,8` as numbers."""
    spans = [s.split("-") for s in text.split(",") if s]
    return [cpu for s in spans for cpu in range(int(s[0]), int(s[-1]) + 1)]


def device_facts(cuda: Cuda, pci: str, bus: str) -> dict:
    name, total = ctypes.create_string_buffer(256), c_size_t()
    cuda("cuDeviceGetName", name, 256, cuda.device)
    cuda("cuDeviceTotalMem_v2", byref(total), cuda.device)
    link = f"{read_first(pci + '/current_link_speed')} x{read_first(pci + '/current_link_width')}"
    forms = ", ".join(f"{f // 1000}.{f % 1000 // 10} form" for f in cuda.batch_functions())
    return {
        "gpu": f"{name.value.decode()}, {total.value / GIB:.1f} GiB, compute {cuda.attribute(75)}.{cuda.attribute(76)}",
        "driver": f"CUDA {cuda.version // 1000}.{cuda.version % 1000 // 10}; {read_first('/proc/driver/nvidia/version')}",
        "pci": f"{bus}, {link}, NUMA node {read_first(pci + '/numa_node')}, near CPUs {read_first(pci + '/local_cpulist')}",
        "copy engines": str(cuda.attribute(40)),
        "host register supported": str(cuda.attribute(99)),
        "host pointer good for registered memory": str(cuda.attribute(91)),
        "pageable memory reachable, by the host's page tables": f"{cuda.attribute(88)}, {cuda.attribute(100)}",
        "batched copy": forms or "absent",
    }


def facts(c) -> None:
    cuda = Cuda(c.library, c.device)
    name = ctypes.create_string_buffer(32)
    cuda("cuDeviceGetPCIBusId", name, 32, cuda.device)
    bus = name.value.decode().lower()
    pci = f"/sys/bus/pci/devices/{bus}"
    nodes = sorted(p.name for p in pathlib.Path("/sys/devices/system/node").glob("node[0-9]*"))
    iommu = os.listdir("/sys/class/iommu") if os.path.isdir("/sys/class/iommu") else []
    send(facts={
        **device_facts(cuda, pci, bus),
        "cpu": cpu_fact(),
        "numa nodes": f"{len(nodes)}; " + "; ".join(f"{n}: {read_first(f'/sys/devices/system/node/{n}/cpulist')}" for n in nodes),
        "memory": read_first("/proc/meminfo"),
        "memlock limit": f"{resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]} bytes (-1: none)",
        "iommu": ", ".join(iommu) or "none seen",
        "shmem huge pages": read_first("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "kernel, python": f"{platform.release()}, {platform.python_version()}",
    })
    near = cpu_numbers(read_first(pci + "/local_cpulist", ""))
    if len(nodes) > 1 and near:
        send(set={"cpus": near})  # the other sections run near the GPU, and so does the memory that they touch first
