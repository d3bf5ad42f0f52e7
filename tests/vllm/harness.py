"""vLLM's real Scheduler or AsyncScheduler, driven without a model: `ScriptedModel` stands where the model runner stands.

`Watch` keeps account of the blocks that the connector keeps and of those that are loaded, so that a step that writes one of them is noticed at
once, whatever becomes of the bytes.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import pathlib
import pickle
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import hooks
from scripted import BLOCK, FULL, SHAPES, ScriptedModel, Shape, WrongCache, continuation, hash_tokens, make_kv
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, generate_scheduler_kv_cache_config, get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

__all__ = ["BLOCK", "FULL", "SHAPES", "Careless", "ScriptedEngine", "Shape", "Watch", "WrongCache", "continuation", "make_config", "make_kv", "smallest_pool"]


# The engine ---------------------------------------------------------------------------------------------------
class _Layer:
    """As much of an attention layer as a connector may ask for."""

    isa = "vec"
    _k_scale_float = _v_scale_float = 1.0

    @staticmethod
    def get_attn_backend() -> Any:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend


def make_config(
    model: pathlib.Path, connector: dict[str, Any] | None, *, async_scheduling: bool, blocks: int = 64, spec_tokens: int = 0,
    budget: int = 512, max_seqs: int = 8, shape: Shape = FULL, **args: Any,
) -> VllmConfig:
    if spec_tokens:
        args["speculative_config"] = {"method": "ngram", "num_speculative_tokens": spec_tokens, "prompt_lookup_max": 2}
    if connector is not None:
        from vllm.config.kv_transfer import KVTransferConfig

        args["kv_transfer_config"] = KVTransferConfig(**connector)
    config = EngineArgs(
        model=str(model), skip_tokenizer_init=True, enforce_eager=True, max_model_len=4096, block_size=shape.block, num_gpu_blocks_override=blocks,
        max_num_batched_tokens=budget, max_num_seqs=max_seqs, prefix_caching_hash_algo="sha256_cbor", generation_config="vllm",
        kv_cache_memory_bytes=64 << 20, **dict(shape.args), **args,
    ).create_engine_config()
    config.scheduler_config.async_scheduling = async_scheduling
    cache = config.cache_config
    cache.num_gpu_blocks, cache.kv_cache_layout = blocks, shape.layout
    if shape.states:
        cache.mamba_cache_mode = "align"
    config.compilation_config.static_forward_context.update((name, _Layer()) for name in shape.layers())
    return config


def smallest_pool(config: VllmConfig, kv: KVCacheConfig, longest: int) -> int:
    """Blocks of the smallest pool with which vLLM starts if its longest request has so many tokens. (One of them is nobody's.)"""
    with mock.patch.object(config.model_config, "max_model_len", longest):
        specs = [group.kv_cache_spec for group in kv.kv_cache_groups]
        return 1 + sum(cdiv(one.max_memory_usage_bytes(config), one.page_size_bytes) for one in specs)


def longest_request(config: VllmConfig, kv: KVCacheConfig) -> int:
    """Tokens of the longest request with which vLLM starts, as `--max-model-len -1` finds it. One that outgrows the pool would wait for ever."""
    lengths = range(1, config.model_config.max_model_len + 1)
    return bisect.bisect_right(lengths, kv.num_blocks, key=lambda longest: smallest_pool(config, kv, longest))


class Watch:
    """What blocks the connector keeps, and which are loaded: nobody may write them meanwhile.

    A block that is kept may be written by the step in which it was taken: that is the step that computes it.
    """

    def __init__(self) -> None:
        self.step = 0
        self.kept: dict[int, list[int]] = {}
        """Steps in which each block was taken."""
        self.loads: dict[str, list[int]] = {}
        self.most_kept = 0
        self.careless = False
        """What the connector keeps is counted, but not kept."""
        self._inside = False

    def over(self, connector: Any, pool: Any) -> None:
        if hasattr(connector, "_capture"):
            assert connector._capture.pool is pool, "vLLM has not bound its own"
        count, watch = vars(KVCacheBlock)["ref_cnt"], self

        class Watched(KVCacheBlock):
            """A block whose references tell when the connector takes or gives one back."""

            __slots__ = ()

            @property
            def ref_cnt(self) -> int:
                return int(count.__get__(self))

            @ref_cnt.setter
            def ref_cnt(self, now: int) -> None:
                before = self.ref_cnt
                if watch._inside:
                    watch._counted(self, before, now)
                if not (watch._inside and watch.careless):
                    count.__set__(self, now)

        for block in pool.blocks:
            block.__class__ = Watched
        for name in ("build_connector_meta", "update_connector_output"):
            setattr(connector, name, self._within(getattr(connector, name)))
        usual = connector.update_state_after_alloc

        def noted(request: Any, blocks: Any, tokens: int) -> None:
            if tokens:
                self.loads[request.request_id] = [one for group in blocks.get_unhashed_block_ids_all_groups() for one in group]
            usual(request, blocks, tokens)

        connector.update_state_after_alloc = noted

    def _within(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any) -> Any:
            self._inside = True
            try:
                return hook(*args)
            finally:
                self._inside = False

        return inside

    def _counted(self, block: Any, before: int, now: int) -> None:
        if now > before:
            # What is findable by its hash is as it was, though its request has given it up.
            assert block.block_id and (before > 0 or block.block_hash is not None), "the connector keeps a block that nobody has"
            self.kept.setdefault(block.block_id, []).append(self.step)
            self.most_kept = max(self.most_kept, len(self.kept))
        else:
            taken = self.kept[block.block_id]
            taken.pop(0)
            if not taken:
                del self.kept[block.block_id]

    def loaded(self, output: Any) -> None:
        for name in output.finished_recving or () if output is not None else ():
            self.loads.pop(name, None)

    def busy(self) -> dict[int, str]:
        """What the step that has just been scheduled must not write."""
        busy = {block: "the connector keeps it" for block, taken in self.kept.items() if min(taken) < self.step}
        return busy | {block: f"it is loaded for {name}" for name, blocks in self.loads.items() for block in blocks}


class Careless:
    """A block pool that lets nobody keep a block, beside a watch that takes it as kept."""

    def __init__(self, pool: Any, watch: Watch) -> None:
        self._pool = pool
        watch.careless = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def touch(self, blocks: Any) -> None:
        for one in blocks:
            one.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        for one in blocks:
            one.ref_cnt -= 1


class ScriptedEngine:
    """A scheduler, its connector and a scripted model, stepped as vLLM's engine core steps them."""

    def __init__(self, config: VllmConfig, *, spec_tokens: int = 0, shape: Shape = FULL) -> None:
        # The scripted model copies one block after the other, as vLLM's runner should: what kvd refuses for its sake is right here.
        within = "prefix_match_unit" in dict(shape.args)
        with mock.patch("kvdaemon.vllm.caches.refuse_hits_within_blocks", lambda *_: None) if within else contextlib.nullcontext():
            self._make(config, spec_tokens, shape)

    def _make(self, config: VllmConfig, spec_tokens: int, shape: Shape) -> None:
        self.config, self.shape = config, shape
        kv = make_kv(config, shape)
        hashes = hash_tokens(config, kv)
        config.model_config.max_model_len = self.longest = longest_request(config, kv)
        self.model = ScriptedModel(config, kv, spec_tokens)
        algorithm = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(algorithm)
        self.hasher = get_request_block_hasher(hashes, algorithm)
        self.is_async = config.scheduler_config.async_scheduling
        kind = AsyncScheduler if self.is_async else Scheduler
        self.scheduler = kind(
            vllm_config=config, kv_cache_config=generate_scheduler_kv_cache_config([make_kv(config, shape)]), structured_output_manager=StructuredOutputManager(config),
            block_size=shape.unit, hash_block_size=hashes, log_stats=True,
        )
        self.connector = self.scheduler.connector
        self.times: hooks.HookTimes | None = None
        self.watch = Watch()
        self.aggregator: KVOutputAggregator | None = None
        if self.connector is not None:
            self.watch.over(self.connector, self.scheduler.kv_cache_manager.block_pool)
            self.times = hooks.HookTimes(self.connector, hooks.SCHEDULER)
            self.aggregator = KVOutputAggregator.from_connector(self.connector, 1)
            hello = self.model.connector.get_handshake_metadata()
            if hello is not None:
                self.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): pickle.loads(pickle.dumps(hello))})
        self.queue: collections.deque[Any] = collections.deque()
        self.depth = config.max_concurrent_batches
        self.free_at_start = self.free_blocks()
        self.answers: dict[str, list[int]] = collections.defaultdict(list)
        self.finish: dict[str, str] = {}
        self.stats: dict[str, Any] = {}
        self.external_hits = 0
        self.steps = 0
        self.serial = 0
        self.requests: dict[str, tuple[list[int], int]] = {}

    @property
    def ours(self) -> Any:
        """Our connector, also where it is one of a MultiConnector's."""
        return next((one for one in getattr(self.connector, "sub_connectors", ()) if hasattr(one, "debug_stats")), self.connector)

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def add(self, prompt: list[int], max_tokens: int = 8, **params: Any) -> str:
        self.serial += 1
        name = f"r{self.serial}"
        skip, priority = params.pop("skip_reading_prefix_cache", None), params.pop("priority", 0)
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, skip_reading_prefix_cache=skip, **params)
        request = Request(name, list(prompt), sampling, None, block_hasher=self.hasher, priority=priority)
        assert len(prompt) + max_tokens <= self.longest, f"the pool has room for {self.longest} tokens of a request: vLLM takes none that is longer"
        self.requests[name] = (list(prompt), max_tokens)
        self.scheduler.add_request(request)
        return name

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def request(self, name: str) -> Request | None:
        return self.scheduler.requests.get(name)

    def _settle(self) -> None:
        """Runs the oldest scheduled step and gives its output to the scheduler. A real worker runs while the scheduler goes on; here
        it runs as late as it may."""
        out, self.model.busy = self.queue.pop()
        result, drafts = self.model.execute(out)
        if self.aggregator is not None:
            result = self.aggregator.aggregate([result])
            self.watch.loaded(result.kv_connector_output)
        for core in self.scheduler.update_from_output(out, result).values():
            if core.scheduler_stats and core.scheduler_stats.connector_prefix_cache_stats:
                self.external_hits += core.scheduler_stats.connector_prefix_cache_stats.hits
            if core.scheduler_stats and core.scheduler_stats.kv_connector_stats:
                self.stats = core.scheduler_stats.kv_connector_stats
            for one in core.outputs:
                self.answers[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    self.finish[one.request_id] = str(one.finish_reason)
        if drafts is not None and not self.is_async:
            self.scheduler.update_draft_token_ids(drafts)

    def settle(self) -> None:
        """Runs the steps that are scheduled, and schedules no more."""
        while self.queue:
            self._settle()

    def step(self) -> bool:
        """One turn of the engine core's loop. False: nothing to do."""
        if self.scheduler.has_requests():
            self.steps += 1
            self.watch.step += 1
            out = self.scheduler.schedule()
            self.queue.appendleft((out, self.watch.busy()))
            if self.is_async and len(self.queue) < self.depth and (out.total_num_scheduled_tokens or self.scheduler.has_requests()):
                return True
        elif not self.queue:
            return False
        self._settle()
        return True

    def run_until(self, what: str, done: Callable[[], bool], deadline_s: float = 30.0) -> None:
        """Steps until `done`; idle engines do not step, as in vLLM, but copies elsewhere may still make it true."""
        end = time.monotonic() + deadline_s
        while not done():
            if not self.step():
                time.sleep(0.001)  # as the engine core yields to transfer threads
            if time.monotonic() > end:
                raise TimeoutError(f"not within {deadline_s:.0f} s: {what}")

    def drain(self, deadline_s: float = 30.0) -> None:
        """Steps until the scheduler has nothing left, then checks that no block and no request stayed behind."""
        end = time.monotonic() + deadline_s
        while self.step():
            if time.monotonic() > end:
                raise TimeoutError(f"requests left behind: {list(self.scheduler.requests)}")
            if not self.scheduler.running:
                time.sleep(0.0005)
        assert not self.scheduler.requests, self.scheduler.requests
        assert self.free_blocks() == self.free_at_start, f"{self.free_at_start - self.free_blocks()} blocks are held for ever"

    def check_answers(self, skip: set[str] | None = None) -> None:
        """Every request that was not aborted has exactly the tokens the model's function gives."""
        for name, (prompt, count) in self.requests.items():
            want = continuation(prompt, count)
            have = self.answers[name]
            if name in (skip or set()):
                assert have == want[: len(have)], name
            else:
                assert have == want, f"{name}: {have} != {want}"

    def ask(self, prompt: list[int], max_tokens: int = 8, **params: Any) -> tuple[str, int]:
        """One request to its end; how many tokens of it came through the connector."""
        before = self.external_hits
        name = self.add(prompt, max_tokens, **params)
        self.drain()
        self.check_answers(skip={n for n in self.requests if n != name})
        return name, self.external_hits - before

    def reset(self) -> None:
        assert self.scheduler.reset_prefix_cache(), "blocks are held"

    def close(self) -> None:
        self.scheduler.shutdown()
        if self.model.connector is not None:
            self.model.connector.shutdown()
