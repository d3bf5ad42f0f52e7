"""What vLLM's metrics and its log show of kvd.

Each half is asked in every step what has happened since the last one; mostly that is nothing. What has happened travels from the
workers and from the scheduler as a dictionary: how much each count grew, how long each lookup, load and store took, and whether the
daemon is there, if that has changed. vLLM adds up what comes from several ranks and, for its log, from several steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # vLLM before 0.32 does not ask
    CacheHitSource = None  # type: ignore[assignment, misc]

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

    from kvdaemon._native import SchedulerHalf, WorkerHalf

CONNECTED = "connected"
TIERS = ("host", "fetching", "nvme", "object")

# Counters without a label of their own: metric, key in the data, help.
PLAIN = (
    ("vllm:kvd_store_bytes", "store_bytes", "Bytes of KV blocks copied to kvd, of all ranks."),
    ("vllm:kvd_store_blocks", "store_blocks", "KV blocks that kvd holds since this engine stored them."),
    ("vllm:kvd_store_present_blocks", "store_present", "KV blocks that were not stored because kvd had them already."),
    ("vllm:kvd_load_bytes", "load_bytes", "Bytes of KV blocks copied from kvd and found right, of all ranks."),
    ("vllm:kvd_load_blocks", "load_blocks", "KV blocks that loads from kvd brought and the engine could use."),
    ("vllm:kvd_lookups", "lookups", "Lookups sent to kvd, about one a request."),
)
# Counters with one: metric, label, prefix of the keys, values of the label, help.
SPLIT = (
    (
        "vllm:kvd_hit_tokens", "tier", "hit_", TIERS,
        "Prompt tokens whose KV was loaded from kvd, by where the lookup found it (fetching: on its way to host memory).",
    ),
    (
        "vllm:kvd_lookup_failures", "reason", "lookup_", ("timeout", "failed"),
        "Lookups without an answer (timeout: none in time; failed: not sent, refused or lost). The prompt was computed.",
    ),
    (
        "vllm:kvd_load_failed_blocks", "reason", "load_", ("absent", "corrupt", "timeout", "failed"),
        "KV blocks that a rank could not load (absent: not there any more; corrupt: wrong checksum; timeout: no answer in time;"
        " failed: anything else). They were computed anew.",
    ),
    (
        "vllm:kvd_store_failed_blocks", "reason", "store_", ("no_space", "failed", "dropped", "stale"),
        "KV blocks that were not stored (no_space: kvd had no room; failed: no reservation; dropped: a rank did not copy them;"
        " stale: copied too late).",
    ),
)
# Histograms: metric, key in the data, help.
TIMES = (
    ("vllm:kvd_lookup_seconds", "lookup_seconds", "Time from a lookup until the scheduler saw its answer."),
    ("vllm:kvd_load_seconds", "load_seconds", "Time from a load's order until its blocks were in place or given up, of each rank."),
    ("vllm:kvd_store_seconds", "store_seconds", "Time from a store's order until its blocks were copied, of each rank."),
)
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass
class KvdStats(KVConnectorStats):
    """What has happened. Keys are there only for what has."""

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        mine = self.data
        for key, value in other.data.items():
            if key not in mine or key == CONNECTED:
                mine[key] = value
            else:
                mine[key] = mine[key] + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's log says of an interval: only what happened in it."""
        data = self.data
        said: dict[str, int | float] = {}
        for what, verb in (("store", "stored"), ("load", "loaded")):
            if blocks := data.get(f"{what}_blocks"):
                said[f"kvd {verb} blocks"] = blocks
            if size := data.get(f"{what}_bytes"):
                said[f"kvd {verb} MB"] = round(size / 2**20, 3)
        for tier in TIERS:
            if tokens := data.get(f"hit_{tier}"):
                said[f"kvd hit tokens ({tier})"] = tokens
        for _, key, _ in TIMES:
            if times := sorted(data.get(key, ())):
                what = key.removesuffix("_seconds")
                said[f"kvd avg {what} time (ms)"] = round(sum(times) / len(times) * 1e3, 3)
                said[f"kvd P90 {what} time (ms)"] = round(times[min(len(times) - 1, len(times) * 9 // 10)] * 1e3, 3)
        for metric, _, prefix, values, _ in SPLIT[1:]:
            for reason in values:
                if count := data.get(prefix + reason):
                    said[f"kvd {metric.removeprefix('vllm:kvd_')} ({reason})".replace("_", " ")] = count
        if CONNECTED in data:
            said["kvd connected"] = data[CONNECTED]
        return said


class KvdPromMetrics(KVConnectorPromMetrics):
    """The same for Prometheus, in vLLM's front end."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, gauge, histogram = metric_types[Counter], metric_types[Gauge], metric_types[Histogram]
        engines = per_engine_labelvalues.items()
        self._counters: dict[int, dict[str, Any]] = {engine: {} for engine in per_engine_labelvalues}
        self._histograms: dict[int, dict[str, Any]] = {engine: {} for engine in per_engine_labelvalues}
        for name, key, text in PLAIN:
            plain = counter(name=name, documentation=text, labelnames=labelnames)
            for engine, own in engines:
                self._counters[engine][key] = plain.labels(*own)
        for name, label, prefix, values, text in SPLIT:
            split = counter(name=name, documentation=text, labelnames=[*labelnames, label])
            for engine, own in engines:
                self._counters[engine] |= {prefix + value: split.labels(*own, value) for value in values}
        for name, key, text in TIMES:
            spread = histogram(name=name, documentation=text, buckets=BUCKETS, labelnames=labelnames)
            for engine, own in engines:
                self._histograms[engine][key] = spread.labels(*own)
        text = "Whether this engine's scheduler and all of its ranks were attached to kvd when it last ran a step."
        connected = gauge(
            name="vllm:kvd_connected", documentation=text, multiprocess_mode="mostrecent", labelnames=labelnames
        )
        self._connected = {engine: connected.labels(*own) for engine, own in engines}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        counters, histograms = self._counters[engine_idx], self._histograms[engine_idx]
        for key, value in transfer_stats_data.items():
            if (one := counters.get(key)) is not None:
                one.inc(value)
            elif (one := histograms.get(key)) is not None:
                for took in value:
                    one.observe(took)
            elif key == CONNECTED:
                self._connected[engine_idx].set(value)


class Metrics:
    """The connector's methods that vLLM asks for them, on both sides and in its front end."""

    _scheduler: SchedulerHalf | None
    _worker: WorkerHalf | None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._worker is not None:
            seen = self._worker.observed()
        elif self._scheduler is not None:
            seen = self._scheduler.observed()
        else:
            return None
        return None if seen is None else KvdStats(seen)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return KvdStats(data if data is not None else {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return KvdPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[Any, int]:
        """Where the tokens that the request loads were found (vLLM 0.32 and newer ask)."""
        if num_external_tokens <= 0 or self._scheduler is None:
            return {}
        return by_source(self._scheduler.sources(request.request_id), num_external_tokens)


def by_source(tokens: list[int], wanted: int) -> dict[Any, int]:
    """vLLM's names for tiers; in all `wanted` tokens, which are a few less than those of whole blocks if the engine took less."""
    host, fetching, nvme, other = tokens
    found = (
        (CacheHitSource.HOST, host),
        (CacheHitSource.DISK, fetching + nvme),
        (CacheHitSource.EXTERNAL_UNSPECIFIED, other + max(wanted - sum(tokens), 0)),
    )
    over = max(sum(tokens) - wanted, 0)
    sources = {}
    for source, count in reversed(found):
        less = min(over, count)
        over -= less
        if count > less:
            sources[source] = count - less
    return sources
