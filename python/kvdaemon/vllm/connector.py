"""The connector class. It translates vLLM's hooks into calls of the two native halves; what is decided is decided there.

Scheduler side: `SchedulerHalf`, never waiting. Worker side: `WorkerHalf`, copying on threads of its own. Orders and reports
travel as opaque bytes inside vLLM's own metadata objects. Whatever can't be served leaves both halves out: the engine runs as
if the connector were not there, and one line in its log says why.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger

from kvdaemon import identity
from kvdaemon._calm import calm_threads
from kvdaemon._native import KvCache, SchedulerHalf, WorkerHalf, digest
from kvdaemon.vllm import caches, canary, capabilities, stats
from kvdaemon.vllm.capture import Capture
from kvdaemon.vllm.config import Config
from kvdaemon.vllm.room import Room

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvdaemon")


@dataclass
class KvdMetadata(KVConnectorMetadata):
    """The scheduler half's orders of one step."""

    orders: bytes


@dataclass
class KvdHandshake(KVConnectorHandshakeMetadata):
    """What a rank holds."""

    hello: bytes


@dataclass
class KvdWorkerMeta(KVConnectorWorkerMetadata):
    """Reports of one or more ranks."""

    reports: list[bytes] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KvdWorkerMeta:
        assert isinstance(other, KvdWorkerMeta)
        return KvdWorkerMeta(self.reports + other.reports)


def _instance(vllm_config: VllmConfig) -> bytes:
    """16 bytes that all processes of this engine instance, and no others, have in common."""
    transfer = vllm_config.kv_transfer_config
    name = f"kvd:{transfer.engine_id}:{getattr(vllm_config, 'instance_id', '')}"
    return bytes.fromhex(digest(name.encode())[:32])


def _world(vllm_config: VllmConfig) -> int:
    parallel = vllm_config.parallel_config
    return int(parallel.pipeline_parallel_size * parallel.tensor_parallel_size)


class KvdConnector(stats.Metrics, KVConnectorBase_V1, SupportsHMA):
    """KV blocks kept by the node's kvd daemon: see the package's documentation."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._config = Config.parse(dict(self._kv_transfer_config.kv_connector_extra_config or {}))
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._stream: Callable[[], int] | None = None
        self._adapters: set[str] = set()
        self._inplace = 0
        self._hopeless: set[str] = set()
        """Requests whose hits vLLM will not take."""
        self._begun: KVConnectorMetadata | None = None
        self._finder = identity.Finder(logger.warning)
        self._refusal = caches.refuse_config(vllm_config, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            if getattr(self._kv_transfer_config, "kv_load_failure_policy", "fail") == "fail":
                logger.warning(
                    "kvd: kv_load_failure_policy is 'fail', so a request whose blocks can't be loaded ends with an error; set it "
                    "to 'recompute' (with a MultiConnector: on the MultiConnector)"
                )
            if self._refusal is None:
                self._refusal = self._start_scheduler()
            if self._refusal is not None:
                logger.warning("kvd: KV blocks are neither stored nor loaded: %s", self._refusal)

    # --- scheduler side -------------------------------------------------------------------------------------------------

    def _start_scheduler(self) -> str | None:
        """Starts the scheduler half, unless there is a reason not to."""
        config, vllm_config = self._config, self._vllm_config
        self._rules = caches.rules(self._kv_cache_config)
        spans = [rule.block_tokens for rule in self._rules]
        self._hash_tokens = capabilities.hash_tokens(vllm_config, self._kv_cache_config) or math.gcd(*spans)
        if any(span % self._hash_tokens for span in spans):
            return f"blocks of {spans} tokens are no multiples of the {self._hash_tokens} tokens that a hash covers"
        with calm_threads():
            half = self._scheduler = self._scheduler_half(config, vllm_config)
        self._unit = half.unit()
        self._reads = bool(self._kv_transfer_config.is_kv_consumer)
        drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0
        ahead = getattr(vllm_config, "num_lookahead_tokens", 0)
        at_a_time = getattr(vllm_config, "max_in_flight_tokens", None) or 2 * vllm_config.scheduler_config.max_num_batched_tokens
        self._room = Room(list({rule.of: rule for rule in self._rules}.values()), self._hash_tokens, at_a_time, drafts, ahead)
        self._capture = Capture(half, self._rules, self._room)
        self._finder.start("kvd-identity", self._find_facts)
        return None

    def _scheduler_half(self, config: Config, vllm_config: VllmConfig) -> SchedulerHalf:
        return SchedulerHalf(
            config.socket_path,
            _instance(vllm_config),
            self._label(),
            world=_world(vllm_config),
            groups=[(rule.kind, rule.block_tokens, rule.window, rule.offered, rule.of) for rule in self._rules],
            hash_tokens=self._hash_tokens,
            lookup_deadline_ms=config.lookup_deadline_ms,
            startup_deadline_ms=config.startup_deadline_ms,
            share_deadline_ms=config.share_deadline_ms,
            hold_deadline_ms=config.hold_deadline_ms,
            lease_ms=config.lease_ms,
            max_in_flight=config.max_in_flight,
            stores=self._kv_transfer_config.is_kv_producer,
            drop_last=capabilities.drops_last(vllm_config),
        )

    def _label(self) -> str:
        return self._config.label or str(self._vllm_config.model_config.model)

    def _find_facts(self) -> None:
        vllm_config, half = self._vllm_config, self._scheduler
        assert half is not None
        weights = self._finder.weights(
            vllm_config.model_config, vllm_config.load_config, self._config.weights_id
        )
        none_hash = self._finder.wait(lambda: capabilities.none_hash(vllm_config), 600.0)
        if none_hash is None:
            return half.refuse("the seed of vLLM's block hashes is not known")
        dtype = caches.kv_dtype(vllm_config, self._kv_cache_config)
        facts = identity.facts(vllm_config, dtype, self._config.tenant, weights, none_hash, logger.warning)
        half.set_facts(facts, str(uuid.uuid4()))

    def _adapter(self, request: Request) -> str:
        """A name for the adapter that computes this request's KV; its digest is found out on the side."""
        lora = request.lora_request
        if getattr(lora, "load_inplace", False):
            self._inplace += 1
        name = f"{lora.lora_int_id}:{lora.lora_name}:{lora.lora_path}:{self._inplace}"
        if name not in self._adapters:
            self._adapters.add(name)
            path, half = lora.lora_path, self._scheduler
            assert half is not None
            self._finder.start("kvd-adapter", lambda: half.set_adapter(name, self._finder.adapter(path)))
        return name

    def on_new_request(self, request: Request) -> None:
        half = self._scheduler
        if half is not None:
            self._capture.requests[request.request_id] = request
            reads = self._reads and not getattr(request, "skip_reading_prefix_cache", False)
            adapter = None if request.lora_request is None else self._adapter(request)
            half.on_new_request(request.request_id, request, adapter, reads)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        half = self._scheduler
        found = 0
        if half is not None:
            computed = num_computed_tokens // self._unit
            found = half.matched(request.request_id, computed)
            if found == -2 and self._room.full:
                found = -1  # nor is anything kept for it
            elif found == -2:
                half.ask(request.request_id, request)
                found = half.matched(request.request_id, computed)
            if found > 0 and self._room.never(request.request_id, (computed + found) * self._unit, self._capture.pool):
                if request.request_id not in self._hopeless:
                    self._hopeless.add(request.request_id)
                    logger.info("kvd: a hit of %d tokens is computed: vLLM does not take it, even with its whole pool free", found * self._unit)
                found = 0
            if found > 0 and not self._room.fits(request, computed * self._unit, (computed + found) * self._unit, self._capture.pool):
                found = -1
        if found < 0:
            return None, False
        return (found * self._unit, True) if found else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        half = self._scheduler
        if half is not None:
            self._room.taken()
            external = -(-num_external_tokens // self._unit)
            ids: list[list[int]] = []
            if external:
                theirs = blocks.get_block_ids()
                ids = [list(theirs[rule.of]) for rule in self._rules]
                self._room.loads(request)
            half.allocated(request.request_id, external, ids)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        half = self._scheduler
        if half is None:
            return KvdMetadata(b"")
        orders, notices = self._capture.step(scheduler_output)
        if notices:
            self._log(half.notices())
        return KvdMetadata(orders)

    @staticmethod
    def _log(notices: list[tuple[bool, str]]) -> None:
        for warning, text in notices:
            (logger.warning if warning else logger.info)("kvd: %s", text)

    def has_pending_block_frees(self) -> bool:
        return self._scheduler is not None and self._scheduler.lets_go_soon()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        half = self._scheduler
        if half is not None:
            meta, output = connector_output.kv_connector_worker_meta, connector_output
            reports = meta.reports if isinstance(meta, KvdWorkerMeta) else []
            if reports or output.finished_sending or output.finished_recving or output.invalid_block_ids or getattr(output, "failed_recving", None):
                half.on_output(output, reports, self._capture.pool)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._hopeless.discard(request.request_id)
        hold = self._scheduler is not None and self._capture.finished(request, block_ids)
        return hold, None

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_pending_work()

    def reset_cache(self) -> bool:
        """Begins a new weights epoch. What is stored stays, under its old name."""
        if self._scheduler is not None:
            self._scheduler.reset_cache(self._capture.pool_is_empty())
        return True

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._capture.bind_pool(gpu_block_pool)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        # From this vLLM has the block pool bound, too.
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None:
            self._capture.bind_manager(kv_cache_manager)

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        model = vllm_config.model_config
        if model is None or getattr(model, "use_mla", False):
            return None
        if not capabilities.found().named_layouts:
            return "HND"
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
        return str(extra.get("layout", "LBHNC"))

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        self._hellos(metadata.values())

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._hellos(metadata.values())

    def _hellos(self, metadata: Iterable[KVConnectorHandshakeMetadata]) -> None:
        # Inside a MultiConnector these may be another connector's.
        if self._scheduler is not None:
            for one in metadata:
                if isinstance(one, KvdHandshake):
                    self._scheduler.hello(one.hello)

    # --- worker side ----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._refusal is not None:
            if caches.refuse_config(self._vllm_config, caches.as_scheduled(self._kv_cache_config)) is None:
                self._start_worker([], self._refusal)  # for the scheduler does not see why
            return
        shares: list[caches.Share] = []
        refusal = ""
        try:
            shares = caches.read(self._vllm_config, self._kv_cache_config, kv_caches)
            for share in shares:
                share.cache = KvCache(
                    share.layers,
                    heads=share.heads,
                    block_tokens=share.cells,
                    page_tokens=share.page_tokens,
                    cell_bytes=share.cell_bytes,
                    device=share.device,
                )
                canary.check(share, share.cache)
        except Exception as error:
            refusal = str(error)
            shares = []
            logger.warning("kvd: KV blocks are neither stored nor loaded: %s", refusal)
        self._stream = caches.stream_of(shares[0]) if shares else None
        self._start_worker(shares, refusal)

    def _start_worker(self, shares: list[caches.Share], refusal: str) -> None:
        config = self._config
        rank, stage = self._rank()
        if self._worker is not None:
            self._worker.close()
        with calm_threads():
            self._worker = self._worker_half(config, shares, refusal, rank, stage)

    def _worker_half(
        self, config: Config, shares: list[caches.Share], refusal: str, rank: int, stage: int
    ) -> WorkerHalf:
        vllm_config = self._vllm_config
        return WorkerHalf(
            config.socket_path,
            _instance(vllm_config),
            f"{self._label()} rank {rank}",
            rank=rank,
            world=_world(vllm_config),
            stage=stage,
            machine=caches.machine_id(),
            encoding=caches.encoding(shares) if shares else "",
            scales=";".join(share.scales for share in shares if share.scales),
            refusal=refusal,
            groups=shares,
            copy_threads=config.copy_threads,
            load_deadline_ms=config.load_deadline_ms,
        )

    def _rank(self) -> tuple[int, int]:
        """Number of this worker in its instance, and its pipeline stage."""
        parallel = self._vllm_config.parallel_config
        stage = tensor = 0
        if _world(self._vllm_config) > 1:
            from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

            stage = get_pp_group().rank_in_group
            tensor = get_tensor_model_parallel_rank()
        return stage * parallel.tensor_parallel_size + tensor, stage

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        if self._worker is None or not capabilities.is_alone(self):
            return None
        return KvdHandshake(self._worker.hello())

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self._begin(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._begin(connector_metadata)

    def _begin(self, metadata: KVConnectorMetadata) -> None:
        """Takes a step's orders, once."""
        if metadata is self._begun or self._worker is None:
            return
        self._begun = metadata
        assert isinstance(metadata, KvdMetadata)
        if metadata.orders:
            self._worker.begin(metadata.orders)
            self._log(self._worker.notices())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start_loads(self._stream)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole blocks are copied when the step is over."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.start_stores(self._stream)

    def clear_connector_metadata(self) -> None:
        """The step is over. Before 0.31 one without a forward pass does not say so with `wait_for_save`."""
        self.wait_for_save()
        super().clear_connector_metadata()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        sent, received, invalid, failed = self._worker.results()
        self._invalid = set(invalid)
        return KVConnectorTransferResults(set(sent), set(received), set(failed))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending or None, results.finished_recving or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid: set[int] = getattr(self, "_invalid", set())
        self._invalid = set()
        return invalid

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        if self._worker is None:
            return None
        report = self._worker.report()
        return None if report is None else KvdWorkerMeta([report])

    def unregister_kv_caches(self) -> None:
        """The KV cache is about to be unmapped (sleep). It comes back at the same addresses; until then nothing is copied."""
        if self._worker is not None:
            self._worker.pause()

    def restore_kv_caches(self) -> None:
        if self._worker is not None:
            self._worker.resume()

    # --- both -----------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        self._finder.stop()
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()
        self._scheduler = self._worker = None

    def debug_stats(self) -> dict[str, Any]:
        """Counters of this process's half. For tests."""
        half = self._scheduler or self._worker
        stats: dict[str, Any] = dict(half.stats()) if half is not None else {}
        stats["config_refusal"] = self._refusal
        return stats
