"""What vLLM shows of kvd: its own classes collect, add up, log and export what the connector's halves say, and after stores, loads and
failures of a real engine the numbers are those of the daemon."""

from __future__ import annotations

import os
import pathlib
import pickle
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import models
import pytest
from checks import attached, full_blocks, kv_transfer, loads, patient, wait_stored
from conftest import Engines
from daemon import Daemon
from engine import Batch, Engine, multi, wait_until

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, generate_latest  # noqa: E402
from vllm.config import KVTransferConfig  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorStats  # noqa: E402
from vllm.v1.metrics.prometheus import unregister_vllm_metrics  # noqa: E402
from vllm.v1.metrics.stats import SchedulerStats  # noqa: E402
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput  # noqa: E402
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder  # noqa: E402

pytestmark = pytest.mark.plugin
Model = Callable[[models.Recipe], pathlib.Path]
PROMPT = models.prompt(1, 700)


# vLLM's classes ---------------------------------------------------------------------------------------------------
def rank(number: int) -> dict[str, Any]:
    return {"store_bytes": 100, "store_blocks": number, "load_bytes": 1 << 20, "load_corrupt": 1, "load_seconds": [0.002, 0.004]}


SCHEDULER = {"lookups": 2, "hit_host": 64, "hit_nvme": 32, "load_blocks": 3, "lookup_seconds": [0.001], "connected": 1}


def of_a_step(wrap: Callable[[dict[str, Any]], Any]) -> Any:
    """What the scheduler's process makes of what two ranks and its own half say."""
    outputs = []
    for number in range(2):
        stats = pickle.loads(pickle.dumps(wrap(rank(number))))  # over a queue
        output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
        output.kv_connector_output = KVConnectorOutput(kv_connector_stats=stats)
        outputs.append(output)
    merged = KVOutputAggregator(2).aggregate(outputs).kv_connector_output.kv_connector_stats
    return merged.aggregate(wrap(dict(SCHEDULER)))


def alone(data: dict[str, Any]) -> Any:
    from kvdaemon.vllm.stats import KvdStats

    return KvdStats(data)


def as_a_child(data: dict[str, Any]) -> Any:
    return MultiKVConnectorStats({"KvdConnector": alone(data)})


def over_the_wire(stats: Any) -> dict[str, Any]:
    sent = MsgpackEncoder().encode(SchedulerStats(kv_connector_stats=stats.to_dict()))
    received = MsgpackDecoder(SchedulerStats).decode(sent).kv_connector_stats
    assert isinstance(received, dict)
    return received


def test_counts_add_up_and_reset() -> None:
    stats = alone({})
    assert stats.is_empty()
    stats = of_a_step(alone)
    assert stats.data == SCHEDULER | {
        "store_bytes": 200, "store_blocks": 1, "load_bytes": 2 << 20, "load_corrupt": 2, "load_seconds": [0.002, 0.004, 0.002, 0.004]
    }
    assert not stats.is_empty()
    stats.aggregate(alone({"connected": 0}))
    assert stats.data["connected"] == 0, "the latest counts"
    stats.aggregate(alone({}))
    stats.reset()
    assert stats.is_empty() and stats.reduce() == {}


CASES = [(kv_transfer("/nowhere/kvd.sock"), alone), (multi(kv_transfer("/nowhere/kvd.sock")), as_a_child)]


@pytest.mark.parametrize(("connector", "wrap"), CASES, ids=["alone", "in a MultiConnector"])
def test_the_log_says_what_happened(connector: dict[str, Any], wrap: Callable[[dict[str, Any]], Any]) -> None:
    import kvdaemon.vllm  # noqa: F401  as the front end has, which asks the class for the layout

    logging = KVConnectorLogging(KVTransferConfig(**connector))
    lines: list[str] = []

    def log() -> None:
        logging.log(lambda text, *args: lines.append(text % args))

    log()
    assert lines == []
    logging.observe(over_the_wire(of_a_step(wrap)))
    logging.observe(over_the_wire(wrap({"load_blocks": 5, "store_no_space": 7})))
    log()
    log()
    assert len(lines) == 1, "once an interval"
    for text in ("loaded blocks{}8", "loaded MB{}2.0", "hit tokens (host){}64", "hit tokens (nvme){}32", "avg load time (ms){}3.0",
                 "P90 load time (ms){}4.0", "load failed blocks (corrupt){}2", "store failed blocks (no space){}7", "connected{}1"):
        assert any(f"kvd {text.format(sign)}" in lines[0] for sign in ("=", "': ")), (text, lines)
    assert "absent" not in lines[0], "what has not happened is not said"


@pytest.fixture
def registry() -> Iterator[None]:
    unregister_vllm_metrics()
    yield
    unregister_vllm_metrics()


@pytest.mark.parametrize(("connector", "wrap"), CASES, ids=["alone", "in a MultiConnector"])
def test_prometheus_gets_it_by_engine(connector: dict[str, Any], wrap: Callable[[dict[str, Any]], Any], registry: None) -> None:
    config: Any = SimpleNamespace(kv_transfer_config=KVTransferConfig(**connector))
    prom = KVConnectorProm(config, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    prom.observe(over_the_wire(of_a_step(wrap)), 1)
    prom.observe(over_the_wire(wrap({"a key of a newer version": 1, "load_absent": 2})), 1)

    def value(name: str, engine: str = "1", **labels: str) -> float | None:
        return REGISTRY.get_sample_value(name, {"model_name": "m", "engine": engine} | labels)

    assert value("vllm:kvd_store_bytes_total") == 200
    assert value("vllm:kvd_store_bytes_total", "0") == 0, "there from the start"
    assert value("vllm:kvd_load_blocks_total") == 3
    assert value("vllm:kvd_hit_tokens_total", tier="host") == 64
    assert value("vllm:kvd_hit_tokens_total", tier="nvme") == 32
    assert value("vllm:kvd_hit_tokens_total", tier="object") == 0
    assert value("vllm:kvd_load_failed_blocks_total", reason="corrupt") == 2
    assert value("vllm:kvd_load_failed_blocks_total", reason="absent") == 2
    assert value("vllm:kvd_load_seconds_count") == 4
    assert value("vllm:kvd_load_seconds_sum") == pytest.approx(0.012)
    assert value("vllm:kvd_lookup_seconds_count") == 1
    assert value("vllm:kvd_connected") == 1
    assert value("vllm:kvd_connected", "0") == 0
    text = generate_latest(REGISTRY).decode()
    operations = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    for name in sorted(set(re.findall(r"^# TYPE (vllm:kvd_\w+?)(?:_total|_created)? ", text, re.M))):
        assert f"`{name}" in operations, f"{name} is not in docs/operations.md"


def test_hits_have_sources_that_add_up() -> None:
    pytest.importorskip("vllm.v1.metrics.cache_hit_source")
    from kvdaemon.vllm.stats import by_source

    assert by_source([64, 0, 0, 0], 64) == {"host": 64}
    assert by_source([64, 32, 64, 0], 160) == {"host": 64, "disk": 96}
    assert by_source([64, 0, 32, 0], 95) == {"host": 64, "disk": 31}, "the engine took less"
    assert by_source([0, 0, 0, 0], 32) == {"external_unspecified": 32}
    assert by_source([32, 0, 0, 32], 64) == {"host": 32, "external_unspecified": 32}


# A real engine ----------------------------------------------------------------------------------------------------
def kvd_counters(engine: Engine) -> dict[str, float]:
    """Our metrics without what they have in common in their names."""
    found = engine.counters().items()
    return {name.removeprefix("vllm:kvd_"): value for name, value in found if name.startswith("vllm:kvd_")}


def step(engine: Engine) -> None:
    """Lets the engine tell what has happened since its last step: a request of less than a block."""
    engine.ask(models.prompt(70, 8), max_tokens=2)


def grown(engine: Engine, before: dict[str, float]) -> dict[str, float]:
    now = kvd_counters(engine)
    return {name: value - before[name] for name, value in now.items() if value != before[name]}


@pytest.mark.engine
def test_stores_loads_and_failures_of_an_engine_show(engines: Engines, daemon: Daemon, model: Model) -> None:
    engine = engines.start(model(models.gqa()), connector=patient(daemon.socket), env={"VLLM_LOG_STATS_INTERVAL": "0.2"})
    attached(engine, daemon)
    assert kvd_counters(engine)["connected"] == 1
    step(engine)
    base, before = daemon.resident(), kvd_counters(engine)
    engine.ask(PROMPT)
    stored = full_blocks(708)
    wait_stored(daemon, base + stored)
    engine.reset_local()
    cached = engine.counters()
    batch = engine.batch([PROMPT])
    assert batch.external == 672
    after = grown(engine, before)
    print("\nafter a store and a load:", after)
    assert after["store_blocks"] == stored
    assert after["load_blocks"] == after["hit_tokens{tier=host}"] / 32 == 21
    assert after["load_bytes"] * stored == after["store_bytes"] * 21 > 0, "bytes of blocks of one size"
    assert after["load_seconds"] == 1 and after["store_seconds"] >= 1 and after["lookup_seconds"] == after["lookups"] == 2
    assert not any("fail" in name for name in after)
    if any("cached_by_source" in name for name in cached):  # vLLM 0.32 and newer
        assert sources(batch) == {"host": 672}

    # The log, once in an interval.
    wait_until("vLLM logs it", lambda: any("loaded blocks" in line for line in logged(engine)) or step(engine))
    print(*logged(engine), sep="\n")
    assert any("kvd loaded blocks=21" in line and "kvd avg load time (ms)=" in line for line in logged(engine))

    # Everything is damaged.
    before, said = kvd_counters(engine), loads(daemon)
    daemon.punch_hole(0, os.stat(daemon.arena()).st_size)
    engine.reset_local()
    engine.ask(PROMPT)
    after = grown(engine, before)
    print("after damage:", after)
    assert after["load_failed_blocks{reason=corrupt}"] == 21
    wait_until("the daemon knows it, too", lambda: loads(daemon).get("failed crc", 0) > said.get("failed crc", 0))
    assert after.get("load_blocks", 0) == 0 and after["load_seconds"] == 1

    # The daemon is gone, and comes back.
    engine.hooks()
    daemon.kill()
    wait_until("the gauge falls", lambda: (step(engine), kvd_counters(engine)["connected"] == 0)[1])
    daemon.start()
    attached(engine, daemon)
    wait_until("the gauge rises", lambda: (step(engine), kvd_counters(engine)["connected"] == 1)[1])
    hooks = engine.hooks()
    print("hook:", hooks["get_kv_connector_stats"])
    assert hooks["get_kv_connector_stats"]["p50"] < 1000


def sources(batch: Batch) -> dict[str, float]:
    """Where vLLM says that a batch's cached tokens came from."""
    found = {name: value for name, value in batch.delta.items() if "cached_by_source" in name}
    return {re.sub(r".*=(\w+)}", r"\1", name): value for name, value in found.items()}


def logged(engine: Engine) -> list[str]:
    return [line for line in engine.log.read_text(errors="replace").splitlines() if "KV Transfer metrics" in line]


@pytest.mark.engine
def test_two_ranks_in_a_multi_connector_on_nvme(engines: Engines, tmp_path_factory: pytest.TempPathFactory, model: Model) -> None:
    """What two ranks do is added up, blocks are not counted twice, and after a restart the daemon's hits come from below."""
    where = tmp_path_factory.mktemp("d")
    with Daemon(where, "64MiB", None, "--nvme", str(where / "nvme"), "--nvme-capacity", "128MiB") as daemon:
        path = model(models.gqa())
        env = {"VLLM_LOG_STATS_INTERVAL": "0.2"}
        engine = engines.start(path, connector=multi(patient(daemon.socket)), tensor_parallel_size=2, threads=1, env=env)
        attached(engine, daemon)
        step(engine)
        base, before = daemon.resident(), kvd_counters(engine)
        engine.ask(PROMPT)
        stored = full_blocks(708)
        wait_stored(daemon, base + stored)
        wait_until("its blocks are below", lambda: below(daemon) >= base + stored)
        wait_until("vLLM has their counts", lambda: grown(engine, before).get("store_blocks", 0) >= stored or step(engine))
        first = grown(engine, before)
        daemon.kill()
        daemon.start()
        attached(engine, daemon)
        batch = engine.batch([PROMPT])
        assert batch.external == 672
        after = grown(engine, before)
        print("\nafter a store:", first, "\nafter a restart and a load, too:", after)
        assert stored < after["store_blocks"] < 2 * stored, "and one or a few that showed that the engine is attached again"
        assert after["load_blocks"] == 21
        # Of the store before the restart: a rank that is attached again before the other copies blocks that nobody completes.
        assert after["load_bytes"] * first["store_blocks"] == first["store_bytes"] * 21 > 0
        assert after["load_seconds"] == 2, "one for each rank"
        assert sum(value for name, value in after.items() if name.startswith("hit_tokens")) == 672
        assert after.get("hit_tokens{tier=host}", 0) < 672
        print("vLLM's sources:", sources(batch))
        wait_until("vLLM logs it", lambda: any("kvd loaded blocks" in line for line in logged(engine)) or step(engine))
        print(*logged(engine), sep="\n")


def below(daemon: Daemon) -> int:
    return int(daemon.whole_status()["tier"]["counts"]["offloaded"])
