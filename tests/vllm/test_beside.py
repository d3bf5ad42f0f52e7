"""Beside other things: NixlConnector in a MultiConnector, and the next vLLM's Python."""

from __future__ import annotations

import importlib.util
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable

import models
import pytest
from checks import attached, full_blocks, patient, wait_stored
from conftest import Engines
from daemon import REPOSITORY, Daemon
from engine import Nursery, multi

pytestmark = [pytest.mark.engine, pytest.mark.plugin]
Model = Callable[[models.Recipe], pathlib.Path]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="nixl-cu12 is not installed")
def test_multi_connector_with_nixl(engines: Engines, daemon: Daemon, model: Model) -> None:
    connector = multi({"kv_connector": "NixlConnector", "kv_role": "kv_both"}, patient(daemon.socket))
    env = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
    engine = engines.start(model(models.gqa()), connector=connector, env=env)
    attached(engine, daemon)
    base = daemon.resident()
    prompt = models.prompt(1, 700)
    engine.ask(prompt)
    wait_stored(daemon, base + full_blocks(708))
    hit = engine.ask(prompt)
    engine.reset_local()
    batch = engine.batch([prompt])
    assert batch.external == 672
    assert batch.answers[0].bits == hit.bits


def overlay() -> pathlib.Path:
    where = REPOSITORY / ".venv" / "vllm33"
    subprocess.run([sys.executable, str(REPOSITORY / "scripts" / "vllm_overlay.py"), "--path", str(where)], check=True)
    return where


def test_next_vllm(daemon: Daemon, model: Model, tmp_path: pathlib.Path) -> None:
    """0.33's Python on 0.32's CPU extensions: a load is bit-equal to a local hit, also in a second process."""
    env = {"PYTHONPATH": str(overlay())}  # for the engines, too: vLLM looks at model classes in a process of its own
    nursery = Nursery(tmp_path / "nursery.log", env=env)
    engines = Engines(nursery, tmp_path)
    try:
        path = model(models.gqa())
        prompt = models.prompt(1, 700)
        first = engines.start(path, connector=patient(daemon.socket), env=env)
        assert first.facts["vllm"].startswith("0.33")
        attached(first, daemon)
        base = daemon.resident()
        first.ask(prompt)
        wait_stored(daemon, base + full_blocks(708))
        hit = first.ask(prompt)
        first.reset_local()
        batch = first.batch([prompt])
        assert batch.external == 672
        assert batch.answers[0].bits == hit.bits
        first.exit()
        second = engines.start(path, connector=patient(daemon.socket), env=env)
        attached(second, daemon)
        batch = second.batch([prompt])
        assert batch.external == 672
        assert batch.answers[0].bits == hit.bits
    finally:
        engines.close()
        nursery.close()
