"""The CUDA driver through ctypes: one device, its primary context, two streams, one piece of device memory.

Signatures and structures are those of cuda.h and cudaTypedefs.h, 12.8 and 13.x. `cuMemcpyBatchAsync` has two forms: that of 12.8
takes `failIdx` before the stream, that of 13.0 does not. Absent: the runtime API, and everything that this check does not call.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p


class NoGpu(Exception):
    """No driver, or no GPU that it can use: the text says which."""


class CudaError(Exception):
    """A driver call that failed; `name` is the driver's own name of the error."""

    def __init__(self, call: str, name: str) -> None:
        super().__init__(f"{call}: {name}")
        self.name = name


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("type", c_int), ("id", c_int)]


class CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes: 24 bytes."""

    _fields_ = [("src_access_order", c_int), ("src_hint", Location), ("dst_hint", Location), ("flags", c_uint)]


ORDER_STREAM, ORDER_ANY = 1, 3  # CU_MEMCPY_SRC_ACCESS_ORDER_*
PREFER_OVERLAP = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
P, U64, N = c_void_p, c_uint64, c_size_t
PROTOTYPES = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [P],
    "cuGetErrorName": [c_int, P],
    "cuGetProcAddress": [c_char_p, P, c_int, U64],
    "cuGetProcAddress_v2": [c_char_p, P, c_int, U64, P],
    "cuDeviceGet": [P, c_int],
    "cuDeviceGetAttribute": [P, c_int, c_int],
    "cuDeviceGetCount": [P],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetPCIBusId": [c_char_p, c_int, c_int],
    "cuDeviceTotalMem_v2": [P, c_int],
    "cuDevicePrimaryCtxRetain": [P, c_int],
    "cuCtxSetCurrent": [P],
    "cuMemAlloc_v2": [P, N],
    "cuMemHostAlloc": [P, N, c_uint],
    "cuMemFreeHost": [P],
    "cuMemHostRegister_v2": [P, N, c_uint],
    "cuMemHostUnregister": [P],
    "cuMemHostGetDevicePointer_v2": [P, P, c_uint],
    "cuMemcpyHtoD_v2": [U64, P, N],
    "cuMemcpyDtoH_v2": [P, U64, N],
    "cuMemcpyHtoDAsync_v2": [U64, P, N, P],
    "cuMemcpyDtoHAsync_v2": [P, U64, N, P],
    "cuMemsetD8_v2": [U64, ctypes.c_ubyte, N],
    "cuStreamCreate": [P, c_uint],
    "cuStreamSynchronize": [P],
    "cuCtxSynchronize": [],
}
# dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs; then failIdx in the older form only; then the stream.
BATCH_ARGS = [P, P, P, N, POINTER(CopyAttributes), POINTER(N), N]
BATCH_FORMS = {13000: (BATCH_ARGS + [P], "cuMemcpyBatchAsync_v2"), 12080: (BATCH_ARGS + [P, P], "cuMemcpyBatchAsync")}


def load_driver(library: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(library)
    except OSError as e:
        why = "not found" if "No such file" in str(e) else f"does not load: {e}"
        raise NoGpu(f"no NVIDIA driver: {library} {why}") from e


class Cuda:
    """An open device. Calling it calls a driver function by name and raises CudaError."""

    def __init__(self, library: str, device: int, device_bytes: int = 0) -> None:
        self.lib = load_driver(library)
        for name, args in PROTOTYPES.items():
            if hasattr(self.lib, name):
                getattr(self.lib, name).argtypes = args
        try:
            self("cuInit", 0)
            count = self.integer("cuDeviceGetCount")
        except CudaError as e:
            raise NoGpu(f"no usable NVIDIA GPU: {e}") from e
        if count <= device:
            raise NoGpu(f"no NVIDIA GPU: the driver counts {count} devices, and number {device} was asked for")
        self.version = self.integer("cuDriverGetVersion")
        self.device = self.integer("cuDeviceGet", device)
        self.context = self.pointer("cuDevicePrimaryCtxRetain", self.device)
        self.bind()
        self.streams = [self.pointer("cuStreamCreate", 1), self.pointer("cuStreamCreate", 1)]  # CU_STREAM_NON_BLOCKING
        self.memory = self.pointer("cuMemAlloc_v2", device_bytes) if device_bytes else 0

    def __call__(self, name: str, *args) -> None:
        if not hasattr(self.lib, name):
            raise CudaError(name, "not in this driver")
        self.check(name, getattr(self.lib, name)(*args))

    def check(self, what: str, code: int) -> None:
        if code:
            text = c_char_p()
            self.lib.cuGetErrorName(code, byref(text))
            raise CudaError(what, text.value.decode() if text.value else f"error {code}")

    def pointer(self, name: str, *args) -> int:
        """For functions that give a pointer or handle through their first argument."""
        out = c_void_p()
        self(name, byref(out), *args)
        return out.value or 0

    def integer(self, name: str, *args) -> int:
        out = c_int()
        self(name, byref(out), *args)
        return out.value

    def attribute(self, number: int) -> int:
        return self.integer("cuDeviceGetAttribute", number, self.device)

    def bind(self) -> None:
        """To be called on every thread that uses the driver."""
        self("cuCtxSetCurrent", self.context)

    def copy(self, direction: str, host: int, dev: int, n: int, stream: int = 0) -> None:
        if direction == "H2D":
            self("cuMemcpyHtoDAsync_v2", dev, host, n, self.streams[stream])
        else:
            self("cuMemcpyDtoHAsync_v2", host, dev, n, self.streams[stream])

    def fill(self, dev: int, byte: int, n: int) -> None:
        """Fills device memory, and waits for it: our streams do not wait for the default one, which does it."""
        self("cuMemsetD8_v2", dev, byte, n)
        self("cuCtxSynchronize")

    def sync(self, stream: int = 0) -> None:
        self("cuStreamSynchronize", self.streams[stream])

    def batch_functions(self) -> dict:
        """The batched copy by form, newest first, through cuGetProcAddress, else by name; empty when the driver has none."""
        found = {}
        for form, (args, name) in BATCH_FORMS.items():
            if self.version < form:
                continue
            out = c_void_p()
            if hasattr(self.lib, "cuGetProcAddress_v2"):
                self.lib.cuGetProcAddress_v2(b"cuMemcpyBatchAsync", byref(out), form, 0, None)
            elif hasattr(self.lib, "cuGetProcAddress"):
                self.lib.cuGetProcAddress(b"cuMemcpyBatchAsync", byref(out), form, 0)
            address = out.value or (hasattr(self.lib, name) and ctypes.cast(getattr(self.lib, name), c_void_p).value)
            if address:
                found[form] = ctypes.CFUNCTYPE(c_int, *args)(address)
        return found

    # Registrations, in regions of a size: all of them, or none.

    def register(self, memory, region: int, flags: int) -> None:
        done = []
        try:
            for at in range(0, memory.size, region):
                self("cuMemHostRegister_v2", memory.addr + at, min(region, memory.size - at), flags)
                done.append(at)
        except CudaError:
            for at in done:
                self("cuMemHostUnregister", memory.addr + at)
            raise

    def unregister(self, memory, region: int) -> None:
        for at in range(0, memory.size, region):
            self("cuMemHostUnregister", memory.addr + at)
