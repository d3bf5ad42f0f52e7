"""Fixtures of the real-vLLM suite: one process that forks engines, daemons of their own, models made once a session.

Run it with the environment's Python: `.venv/vllm/bin/python -m pytest tests/vllm`. Without the plugin or the daemon's program every
test that needs them fails, and says what to build; KVD_TEST_WITHOUT_PLUGIN=1 skips those instead, by name.
KVD_TEST_SOAK=1 runs the statistical tests at full length. KVD_TEST_GPU=1 runs the engines on an NVIDIA GPU (`make gpu-vllm`).
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import daemon as daemon_module  # noqa: E402
import engine as engine_module  # noqa: E402
import models  # noqa: E402

SOAK = os.environ.get("KVD_TEST_SOAK") == "1"
if not engine_module.ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "plugin: needs the plugin `kvdaemon` and the daemon's program")
    config.addinivalue_line("markers", "engine: starts real vLLM engines")
    config.addinivalue_line("markers", "slow: takes more than half a minute")


def missing() -> str | None:
    """What has to be built before the plugin's tests can run, or None."""
    if importlib.util.find_spec("kvdaemon") is None or importlib.util.find_spec("kvdaemon.vllm") is None:
        return "the plugin `kvdaemon` is not installed: run `make plugin`"
    if not daemon_module.binary().exists():
        return f"{daemon_module.binary()} is not there: run `make build`, or set KVD_BIN"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("plugin") is None:
        return
    lack = missing()
    if lack is not None:
        if os.environ.get("KVD_TEST_WITHOUT_PLUGIN") == "1":
            pytest.skip(lack)
        pytest.fail(lack, pytrace=False)


# Where the minutes went -----------------------------------------------------------------------------------------
_spent: dict[str, list[float]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _spent.setdefault(report.nodeid.split("::")[0], [0.0, 0.0])
    row = _spent[report.nodeid.split("::")[0]]
    row[0 if report.when == "call" else 1] += report.duration


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line("")
    terminalreporter.write_line("where the seconds went (tests, fixtures)")
    for name, (call, rest) in sorted(_spent.items(), key=lambda kv: -sum(kv[1])):
        terminalreporter.write_line(f"  {call:7.1f} {rest:7.1f}  {name}")


# Things ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def model(model_root: pathlib.Path) -> Callable[[models.Recipe], pathlib.Path]:
    return lambda recipe: models.make(recipe, model_root)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[engine_module.Nursery | None]:
    if engine_module.ON_GPU:  # what talks to a driver is not forked
        yield None
        return
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    one = engine_module.Nursery(tmp_path_factory.mktemp("nursery") / "log", env={"PYTHONPATH": path})
    yield one
    one.close()


class Engines:
    """Starts engines and ends all of them, whatever the test did."""

    def __init__(self, nursery: engine_module.Nursery | None, where: pathlib.Path) -> None:
        self._nursery, self._where = nursery, where
        self._all: list[engine_module.Engine] = []

    def start(self, path: pathlib.Path, *, own_process: bool = False, **options: Any) -> engine_module.Engine:
        log = self._where / f"engine-{len(self._all)}.log"
        if not own_process:
            options["nursery"] = self._nursery
        wait = options.pop("start", True)
        one = engine_module.Engine(path, log, start=False, **options)
        self._all.append(one)
        return one.wait_started() if wait else one

    def last_log(self) -> str:
        return self._all[-1].log.read_text(errors="replace")

    def close(self) -> None:
        for one in self._all:
            one.close()


@pytest.fixture
def engines(nursery: engine_module.Nursery | None, tmp_path: pathlib.Path) -> Iterator[Engines]:
    many = Engines(nursery, tmp_path)
    yield many
    many.close()


@pytest.fixture(scope="module")
def module_engines(nursery: engine_module.Nursery | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    many = Engines(nursery, tmp_path_factory.mktemp("engines"))
    yield many
    many.close()


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemon_module.Daemon]:
    """A running daemon of the test's own. Socket paths are short: the kernel takes 107 bytes."""
    one = daemon_module.Daemon(tmp_path_factory.mktemp("d"))
    try:
        yield one.start()
    finally:
        one.close()


@pytest.fixture(scope="module")
def module_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemon_module.Daemon]:
    one = daemon_module.Daemon(tmp_path_factory.mktemp("d"))
    try:
        yield one.start()
    finally:
        one.close()
