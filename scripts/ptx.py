#!/usr/bin/env python3
"""Compiles kvd/device/src/cuda/kernel.cu to the PTX beside it: `make ptx`, after a change of the kernel.

The PTX is committed, so that nothing else needs NVIDIA's compiler, and its first line names what it was made from, which a test
of kvd-device compares. NVRTC comes from PyPI into a folder of the target directory; 12.1 because what it writes (PTX 8.1 for
compute capability 7.0) is read by every driver since CUDA 12.1. No GPU is needed.
"""

from __future__ import annotations

import ctypes
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNEL = ROOT / "kvd" / "device" / "src" / "cuda" / "kernel.cu"
NVRTC, ARCH = "nvidia-cuda-nvrtc-cu12==12.1.105", b"--gpu-architecture=compute_70"
POLYNOMIAL = 0x9A6C9329AC4BC9B5


def crc64nvme(data: bytes) -> int:
    crc = 2**64 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (POLYNOMIAL * (crc & 1))
    return crc ^ (2**64 - 1)


def nvrtc() -> ctypes.CDLL:
    folder = ROOT / "target" / "nvrtc"
    libraries = folder / "nvidia" / "cuda_nvrtc" / "lib"
    if not libraries.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), NVRTC], check=True)
    ctypes.CDLL(str(next(libraries.glob("libnvrtc-builtins.so*"))), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(next(libraries.glob("libnvrtc.so*"))))


def text(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    out = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, out)
    return out.value


def main() -> int:
    library, source, program = nvrtc(), KERNEL.read_bytes(), ctypes.c_void_p()
    if library.nvrtcCreateProgram(ctypes.byref(program), source, KERNEL.name.encode(), 0, None, None):
        sys.exit("NVRTC does not start")
    failed = library.nvrtcCompileProgram(program, 1, (ctypes.c_char_p * 1)(ARCH))
    if log := text(library, "ProgramLog", program).decode().strip():
        print(log, file=sys.stderr)
    if failed:
        return 1
    ptx = f"// From kernel.cu, CRC-64/NVME {crc64nvme(source):016x}.\n".encode() + text(library, "PTX", program)
    KERNEL.with_suffix(".ptx").write_bytes(ptx)
    print(f"{KERNEL.with_suffix('.ptx').relative_to(ROOT)}: {len(ptx)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
