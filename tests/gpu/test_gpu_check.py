"""scripts/gpu_check where there is no GPU: its self-test, what it says without a driver, and every section on a fake driver."""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))

from gpu_check import registering  # noqa: E402
from gpu_check.host import Memory  # noqa: E402

SMALL = ["--no-torch", "--no-huge-pages", "--region-mib", "16", "--set-mib", "4", "--reps", "2", "--scan-s", "0.01"]
COMPILER = shutil.which("cc") or shutil.which("gcc")


def run(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> str:
    if not COMPILER:
        pytest.skip("no C compiler to build the fake driver with")
    out = tmp_path_factory.mktemp("fake") / "libfakecuda.so"
    source = pathlib.Path(__file__).with_name("fake_cuda.c")
    subprocess.run([COMPILER, "-O1", "-w", "-shared", "-fPIC", "-o", str(out), str(source)], check=True)
    return str(out)


def check(fake: str, tmp_path: pathlib.Path, *args: str, **env: str) -> tuple[subprocess.CompletedProcess, dict]:
    out = tmp_path / "out.json"
    done = run("--libcuda", fake, "--json", str(out), *SMALL, *args, **env)
    return done, json.loads(out.read_text())


def test_self_test():
    done = run("--self-test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout and "FAIL" not in done.stdout


def test_no_driver():
    done = run("--libcuda", "libcuda-not-there.so.1")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr == "no NVIDIA driver: libcuda-not-there.so.1 not found\n"


def test_the_default_driver_is_libcuda():
    if pathlib.Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver")
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "no NVIDIA driver: libcuda.so.1 not found\n")


def test_wrong_use():
    assert run("--reps", "0").returncode == 2
    assert run("--only", "nothing").returncode == 2


def test_a_driver_without_a_gpu(fake):
    done = run("--libcuda", fake, FAKE_CUDA_DEVICES="0")
    assert done.returncode == 3
    assert done.stderr == "no usable NVIDIA GPU: cuInit: CUDA_ERROR_NO_DEVICE\n"


def test_every_section(fake, tmp_path):
    done, out = check(fake, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert out["problems"] == [] and out["facts"]["gpu"].startswith("fake GPU")
    rows = out["rows"]
    assert {r["section"] for r in rows} == {"register", "behaviour", "copies", "batch", "crc"}
    assert not [r for r in rows if r["ok"] is False]
    timed = {(r["region"], r["flags"], r["prefault"]) for r in rows if r.get("step") == "register" and r["kind"] == "plain"}
    assert len(timed) == 4  # here both regions are the whole of 16 MiB
    everything = {(p, d) for p in (2 << 20, 65536, 8192, 512) for d in ("H2D", "D2H")}
    more = [f"batches of 4096, {x}" for x in ("any order", "prefer overlap", "older form")]
    for method in ["plain calls", "batches of 4096", "batches of 32", *more]:
        mine = [r for r in rows if r.get("method") == method and r["kind"] == "plain"]
        assert {(r["piece"], r["direction"]) for r in mine} == everything
        assert all(r["ok"] and r["median"] > 0 and r["ratio"] > 0 and r["us_each"] > 0 for r in mine)
    noted = {r["what"]: r["note"] for r in rows if r["section"] == "behaviour"}
    assert noted["one plain piece across two registrations, a batched call"] == "refused: CUDA_ERROR_INVALID_VALUE"
    assert noted["a plain range registered twice by one process"] == "refused: CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
    assert noted["one plain memfd registered by two processes"].startswith("both register it")
    assert "DMA out then reads the new page" in noted["hole punched and faulted again under a registered plain memfd"]
    assert any(r["section"] == "crc" and r.get("beside") == "D2H" and r["link_gbps"] > 0 for r in rows if r.get("threads"))
    for section in ("register", "behaviour", "copies", "batch", "crc"):
        assert f"\n## {section}\n" in done.stdout
    for lines in re.findall(r"(?:^\|.*\n)+", done.stdout, re.M):
        assert len({len(x) for x in lines.splitlines()}) == 1


def test_an_older_driver_has_no_batches(fake, tmp_path):
    done, out = check(fake, tmp_path, "--only", "batch", FAKE_CUDA_VERSION="12020")
    assert done.returncode == 0, done.stdout
    assert out["facts"]["batched copy"] == "absent"
    notes = [r["note"] for r in out["rows"] if r["what"] == "batched copies"]
    assert notes == ["absent in this driver (12.8 and newer have them)"]


def test_the_first_form_of_batches(fake, tmp_path):
    done, out = check(fake, tmp_path, "--only", "batch", FAKE_CUDA_VERSION="12080")
    assert done.returncode == 0 and out["facts"]["batched copy"] == "12.8 form"
    assert [r for r in out["rows"] if r.get("method") == "batches of 4096" and r["ok"]]


def test_memory_that_does_not_register_is_an_answer(fake, tmp_path):
    done, out = check(fake, tmp_path, FAKE_CUDA_FAULT="noregister")
    assert done.returncode == 0, done.stdout
    answer = "plain memfd registers: no, refused: cuMemHostRegister_v2: CUDA_ERROR_NOT_SUPPORTED"
    assert [a for a in out["answers"] if a == answer]


def test_wrong_bytes_are_seen(fake, tmp_path):
    done, out = check(fake, tmp_path, "--only", "copies", FAKE_CUDA_FAULT="wrong")
    assert done.returncode == 1
    wrong = [r for r in out["rows"] if r["ok"] is False]
    assert {(r["piece"], r["direction"]) for r in wrong if r["kind"] == "plain"} == {(512, "H2D"), (512, "D2H")}
    assert "| WRONG |" in done.stdout and len(out["problems"]) == len(wrong)


def test_a_crash_leaves_the_other_answers(fake, tmp_path):
    done, out = check(fake, tmp_path, "--only", "batch", "crc", FAKE_CUDA_FAULT="crash")
    assert done.returncode == 1
    assert [p for p in out["problems"] if p.startswith("section batch died by SIGABRT; the last it said was: ")]
    assert [r for r in out["rows"] if r["section"] == "crc"]


class PinningCuda:
    """A driver that holds the pages it registered: after a hole is punched, its DMA still goes to the old ones."""

    def __init__(self) -> None:
        self.device = ctypes.create_string_buffer(4 << 20)
        self.memory, self.old = ctypes.addressof(self.device), {}

    def register(self, memory, region: int, flags: int) -> None:
        self.old = {}

    def unregister(self, memory, region: int) -> None:
        self.old = {}

    def fill(self, to: int, byte: int, n: int) -> None:
        ctypes.memset(to, byte, n)

    def __call__(self, name: str, to, source, n: int) -> None:
        page = lambda at: self.old.get(at, at) if isinstance(at, int) else at  # noqa: E731
        ctypes.memmove(page(to), page(source), n)


@pytest.mark.parametrize("pins", [True, False])
def test_a_punched_hole_is_told_apart(monkeypatch, pins):
    cuda, sent = PinningCuda(), []

    class PunchedMemory(Memory):
        def punch(self, at: int, n: int) -> None:
            if pins:
                cuda.old[self.addr + at] = ctypes.create_string_buffer(bytes(self.view(at, n)), n)
            super().punch(at, n)

    monkeypatch.setattr(registering, "Memory", PunchedMemory)
    monkeypatch.setattr(registering, "send", lambda row: sent.append(row))
    registering.hole(None, cuda, "plain")
    read, came = ("the old page", "is lost to the mapping") if pins else ("the new page", "arrives")
    assert [(r["ok"], r["read"]) for r in sent] == [(True, read)]
    assert sent[0]["note"] == (
        f"the hole reads as zeros; DMA out then reads {read}; DMA in {came}; registering again heals it; bytes beside it stay"
    )
