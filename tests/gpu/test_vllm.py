"""A real vLLM on an NVIDIA GPU, with CUDA graphs and without: what comes from the daemon is bit-equal to vLLM's own prefix hit of the same length.

Needs a vLLM built for CUDA, version 0.32 or newer, in the Python that runs this, and `kvdaemon` beside it: `make gpu-vllm`, which runs the tests of
all shapes of models (tests/vllm/test_shapes.py) on the GPU, too. Skipped elsewhere.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.version.hip:
    pytest.skip("there is no NVIDIA GPU", allow_module_level=True)
pytest.importorskip("vllm._C_stable_libtorch", reason="this vLLM has no CUDA kernels")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "vllm"))

import models  # noqa: E402
from checks import attached  # noqa: E402
from daemon import Daemon  # noqa: E402
from engine import ON_GPU, Engine, patient, wait_until  # noqa: E402

if not ON_GPU:
    pytest.skip("KVD_TEST_GPU=1 is not set", allow_module_level=True)

MODES: dict[str, dict[str, Any]] = {"eager": {"enforce_eager": True}, "graphs": {"enforce_eager": False}}
LONG = models.prompt(1, 2000)


def start(where: pathlib.Path, daemon: Daemon, name: str, path: pathlib.Path, mode: str) -> Engine:
    options = {"block_size": 16, "kv_cache_memory_bytes": 512 << 20, "gpu_memory_utilization": 0.2} | MODES[mode]
    engine = Engine(path, where / f"{name}.log", connector=patient(daemon.socket), **options)
    attached(engine, daemon)
    return engine


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("kind", ["gqa", "gemma", "gptoss"])
def test_load_is_bit_equal_to_a_local_hit(kind: str, mode: str, tmp_path: pathlib.Path) -> None:
    path = models.make(getattr(models, kind)(), tmp_path)
    with Daemon(tmp_path / "daemon", "1GiB") as daemon:
        with start(tmp_path, daemon, "first", path, mode) as first:
            first.ask(LONG)
            hit = first.ask(LONG)
            assert hit.cached == 1984
            first.reset_local()

            def comes_back() -> bool:
                batch = first.batch([LONG])
                first.reset_local()
                return batch.external == hit.cached and batch.answers[0].bits == hit.bits

            wait_until("the prompt comes from the daemon, bit-equal", comes_back, 60.0, every_s=0.5)
        with start(tmp_path, daemon, "second", path, mode) as second:
            batch = second.batch([LONG])
            assert batch.external == hit.cached
            assert batch.answers[0].bits == hit.bits
