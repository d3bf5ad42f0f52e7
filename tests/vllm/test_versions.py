"""Engines of several vLLM versions on one daemon, all alive at once: each stores a prompt, and each asks for everybody's.

Two versions share exactly where their namespace records agree. Then what one stored serves the other: the answer is what the other would
have given from its own cache. Where records differ, the daemon says by which fields.

`make engine-matrix` says which versions there are, in KVD_TEST_VERSIONS: a JSON list of {"name", "python", "path"}, the last of them a
directory to put on PYTHONPATH, or empty. What happened is kept as properties of the test.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable

import models
import pytest
from checks import attached, full_blocks, largest_gap, patient, wait_stored
from conftest import Engines
from daemon import Daemon
from engine import Engine

pytestmark = [pytest.mark.engine, pytest.mark.plugin]
Model = Callable[[models.Recipe], pathlib.Path]

VERSIONS: list[dict[str, str]] = json.loads(os.environ.get("KVD_TEST_VERSIONS", "[]"))
LENGTH = full_blocks(700) * 32
# Of a logprob, where two versions compute with other kernels: as across parallel degrees in test_identical.
TOLERANCE = 0.1


def start(one: dict[str, str], engines: Engines, path: pathlib.Path, daemon: Daemon) -> Engine:
    env = {"PYTHONPATH": one["path"]}
    engine = engines.start(
        path, connector=patient(daemon.socket, label=f"vLLM {one['name']}"), own_process=True, in_process=True, python=one["python"], env=env
    )
    assert engine.facts["vllm"].startswith(one["name"]), engine.facts
    attached(engine, daemon)
    return engine


def why(daemon: Daemon, one: str, other: str) -> list[str]:
    """Fields in which the daemon says that two engines' namespaces differ; none when they have the same one."""
    said = daemon.status()

    def space(name: str) -> str:
        (found,) = {n for session in said["sessions"] if session["label"] == f"vLLM {name}" for n in session["namespaces"]}
        return found

    mine, theirs = space(one), space(other)
    if mine == theirs:
        return []
    (differs,) = [d["fields"] for n in said["namespaces"] if n["id"] == mine for d in n["differs"] if d["from"] == theirs]
    assert differs, "two namespaces, and the daemon does not say why"
    return sorted(d["field"] for d in differs)


@pytest.mark.skipif(len(VERSIONS) < 2, reason="there is one version of vLLM here; `make engine-matrix` has several")
def test_versions_on_one_daemon(engines: Engines, daemon: Daemon, model: Model, record_property: Callable[[str, object], None]) -> None:
    path = model(models.gqa())
    fleet = {one["name"]: start(one, engines, path, daemon) for one in VERSIONS}
    prompts = {name: models.prompt(700 + i, 700) for i, name in enumerate(fleet)}
    for name, engine in fleet.items():
        base = daemon.resident()
        engine.ask(prompts[name])
        engine.reset_local()
        wait_stored(daemon, base + full_blocks(708))
    for loader, engine in fleet.items():
        for storer, prompt in prompts.items():
            if loader == storer:
                continue
            fields = why(daemon, storer, loader)
            batch = engine.batch([prompt])
            assert batch.external == (0 if fields else LENGTH), (storer, loader, fields)
            if fields:
                record_property(f"{storer} -> {loader}", f"no: {', '.join(fields)} differ")
                continue
            # The salt is in the hashes alone: what it computes, it computes itself.
            engine.ask(prompt, salt="alone")
            own = engine.ask(prompt, salt="alone")
            assert own.cached == LENGTH
            if batch.answers[0].bits == own.bits:
                record_property(f"{storer} -> {loader}", "yes, bit-equal")
            else:
                gap = largest_gap(batch.answers[0], own)
                record_property(f"{storer} -> {loader}", f"yes, logprobs within {gap:.3f}")
                assert gap <= TOLERANCE, (storer, loader)
            engine.reset_local()
