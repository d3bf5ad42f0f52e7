"""The tier's manager. vLLM calls it on the scheduler's thread, under one lock: nothing here waits, but for `drain_jobs` and `shutdown`,
which vLLM wants to wait for what is being copied. Whatever goes wrong is a miss or a failed job."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import Locality, LookupResult, OffloadKey, ReqContext, RequestOffloadingContext, ScheduleEndContext
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvdaemon import identity
from kvdaemon._native import KvdError, opaque_block
from kvdaemon.vllm import caches, capabilities
from kvdaemon.vllm_tier import record
from kvdaemon.vllm_tier.lookups import Lookups
from kvdaemon.vllm_tier.options import Options
from kvdaemon.vllm_tier.threads import Job, Threads

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

logger = init_logger("vllm.kvdaemon")

if "transfer_bytes" not in JobResult.__dataclass_fields__:
    raise ImportError("kvdaemon.vllm_tier needs vLLM 0.31 or newer; KvdConnector (kvdaemon.vllm) works with 0.30")


class KvdSecondaryTier(SecondaryTierManager):
    """Chunks kept by the node's kvd daemon, below vLLM's CPU tier: see the package's documentation."""

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        **options: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._options = chosen = Options.parse(options)
        self.locality = Locality.LOCAL
        self._rows = primary_kv_view.cast("B")
        self._row_bytes = len(self._rows) // max(len(primary_kv_view), 1)
        self._record: dict[str, str] = {}
        self._requests: set[str] = set()
        self._outdated: set[str] = set()
        self._mixed: bool | None = False
        """Whether vLLM's own caches may hold KV of before the last reset; None: not known yet."""
        self._lookup_deadline_s = chosen.lookup_deadline_ms / 1000
        self._job_deadline_s = chosen.load_deadline_ms / 1000
        self._lookups = Lookups(self._lookup_deadline_s)
        self._threads = Threads(
            chosen.socket_path,
            chosen.label or f"{offloading_spec.config.model.name} tier",
            self._job_deadline_s,
            chosen.threads,
            self._rows,
            self._row_bytes,
            self._lookups.answer,
            _notice,
        )
        self._epoch = ""
        self._record_lock = threading.Lock()
        self._finder = identity.Finder(logger.warning)
        self._begin(offloading_spec)

    # --- who this is ------------------------------------------------------------------------------------------------------

    def _begin(self, spec: OffloadingSpec) -> None:
        """Finds out on the side what the rows are; until that is known the tier holds nothing."""
        vllm_config, kv_cache_config = record.engine_config()
        self._finder.start("kvd-tier-identity", lambda: self._find_record(spec, vllm_config, kv_cache_config))

    def _refusal(self, vllm_config: Any, kv_cache_config: Any) -> str | None:
        try:
            opaque_block(self._row_bytes)
        except KvdError as error:
            return str(error)
        if vllm_config is None:
            return None
        return caches.refuse_wrong_kv(vllm_config, kv_cache_config)

    def _find_record(self, spec: OffloadingSpec, vllm_config: Any, kv_cache_config: Any) -> None:
        options = self._options
        if (why := self._refusal(vllm_config, kv_cache_config)) is not None:
            logger.warning("kvd tier: nothing is stored or loaded: %s", why)
            return
        if (why := record.private_because(vllm_config)) is not None:
            logger.warning("kvd tier: chunks are shared with no other engine start: %s", why)
            weights = f"private:{uuid.uuid4()}"
        else:
            weights = self._finder.weights(vllm_config.model_config, vllm_config.load_config, options.weights_id)
        none_hash = b""
        if vllm_config is not None:
            none_hash = self._finder.wait(lambda: capabilities.none_hash(vllm_config), 600.0)
            if none_hash is None:
                logger.warning("kvd tier: nothing is stored or loaded: the seed of vLLM's block hashes is not known")
                return
        found = record.fields(spec, self._row_bytes, vllm_config, kv_cache_config, options.tenant, weights, none_hash, logger.warning)
        self._serve(record=found)

    def _serve(self, **changed: Any) -> None:
        """The record or the weights epoch is another one now."""
        with self._record_lock:
            self._record = changed.get("record", self._record)
            self._epoch = changed.get("epoch", self._epoch)
            if self._record:
                self._threads.start(self._record | ({"weights_epoch": self._epoch} if self._epoch else {}))

    # --- what vLLM asks ---------------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._is_mixed()
        self._requests.add(req_context.req_id)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._requests.discard(req_context.req_id)
        self._outdated.discard(req_context.req_id)
        self._lookups.finished(req_context.req_id)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        now = time.monotonic()
        may_ask = self._threads.answers(now, self._lookup_deadline_s)
        found = self._lookups.find(key, req_context.req_id, now, may_ask)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._is_mixed()
        self._lookups.send(self._threads.ask)

    def submit_store(self, job_metadata: TransferJob) -> None:
        job = self._job(job_metadata, is_load=False)
        if self._is_mixed() or job_metadata.req_context.req_id in self._outdated:
            self._threads.refuse(job)
        else:
            self._threads.submit(job)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._threads.submit(self._job(job_metadata, is_load=True))

    def _job(self, given: TransferJob, *, is_load: bool) -> Job:
        deadline = time.monotonic() + self._job_deadline_s
        return Job(given.job_id, is_load, list(given.keys), [int(one) for one in given.chunk_ids], deadline)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        return [self._result(job) for job in self._threads.finished()]

    def _result(self, job: Job) -> JobResult:
        good: Collection[OffloadKey] | None = None
        sound = len(job.good) == len(job.keys)
        if job.is_load and not sound:
            good = tuple(OffloadKey(key) for key in job.good) or None
            self._lookups.missing(set(job.keys).difference(job.good))
        return JobResult(
            job_id=job.number,
            success=sound,
            successful_keys=good,
            transfer_time=job.seconds,
            transfer_bytes=len(job.good) * self._row_bytes,
        )

    def drain_jobs(self) -> None:
        """vLLM drops its caches, perhaps because weights were replaced in place: what was stored before is not loaded by this engine
        again, and requests that have KV of before store nothing more. Nobody's blocks are deleted.

        With requests there, it may not have dropped what they have, and later requests may find KV of before in its own caches: nothing
        more is stored then, until it drops them with no request there. (That it preempted them all, and did drop everything, a tier
        can't see.)"""
        self._threads.drain()
        self._lookups.forget()
        self._outdated |= self._requests
        self._mixed = None
        self._serve(epoch=str(uuid.uuid4()))

    def _is_mixed(self) -> bool:
        """Of requests that had finished before a reset vLLM tells us after it, and before its next step."""
        if self._mixed is None:
            self._mixed = bool(self._outdated)
            if self._mixed:
                logger.warning("kvd tier: vLLM reset its caches with requests there; nothing more is stored until it does so without any")
        return self._mixed

    def shutdown(self) -> None:
        self._finder.stop()
        self._threads.stop()
        self._rows.release()


def _notice(warning: bool, text: str) -> None:
    (logger.warning if warning else logger.info)("kvd tier: %s", text)
