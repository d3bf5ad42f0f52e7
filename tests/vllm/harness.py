"""vLLM's real Scheduler or AsyncScheduler, driven without a model.

`ScriptedModel` stands where the model runner stands. It "computes" KV that is a function of the whole prefix, writes it
through block tables into real tensors, and before each step reads back everything the step would attend to: a block that was
loaded wrongly, overwritten while it was copied, or stored before its tokens were verified is noticed the moment it is used. Tokens
are a function of the prefix too, so the right answer of every request is known beforehand (`continuation`).

What is deliberately absent: tensor parallelism (one rank), more than one KV-cache group, and time: a step is a call.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

LAYERS, HEADS, HEAD_SIZE, BLOCK = 4, 2, 64, 32
CELL_WORDS = 2 * HEAD_SIZE * 2 // 8
VOCABULARY = 512
MASK = (1 << 64) - 1


# What the scripted model computes ---------------------------------------------------------------------------------
def fold(state: int, token: int) -> int:
    """State of a prefix one token longer."""
    x = (state ^ (token + 0x9E3779B97F4A7C15)) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def states(tokens: list[int]) -> list[int]:
    out, state = [], 1
    for token in tokens:
        state = fold(state, token)
        out.append(state)
    return out


def next_token(state: int) -> int:
    return 2 + (state >> 17) % (VOCABULARY - 2)


def continuation(prompt: list[int], count: int) -> list[int]:
    """The only right answer to `prompt`."""
    state = states(prompt)[-1]
    out = []
    for _ in range(count):
        out.append(next_token(state))
        state = fold(state, out[-1])
    return out


_KEYS = np.random.Generator(np.random.PCG64(7)).integers(1, MASK, (LAYERS, 1, HEADS, CELL_WORDS), dtype=np.uint64, endpoint=True) | np.uint64(1)


def cells(prefix_states: list[int]) -> np.ndarray:
    """KV of the given positions: [layer, position, head, word]."""
    return np.array(prefix_states, dtype=np.uint64)[None, :, None, None] * _KEYS


class WrongCache(AssertionError):
    """The model would have attended to something that is not the KV of its tokens."""


@dataclasses.dataclass
class _Known:
    """What a model runner remembers of a request."""

    prompt: int
    tokens: list[int]
    blocks: list[int]
    states: list[int]
    drafts: list[int]


class ScriptedModel:
    """The worker's side of an engine: KV memory, the worker half of the connector, and steps."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig, spec_tokens: int) -> None:
        self.config, self.kv, self.spec_tokens = config, kv, spec_tokens
        tensor = kv.kv_cache_tensors[0]
        self.raw = torch.zeros(tensor.size, dtype=torch.uint8)
        whole = self.raw.view(torch.bfloat16).view(LAYERS, kv.num_blocks, HEADS, BLOCK, 2 * HEAD_SIZE)
        self.caches = {name: whole[i] for i, name in enumerate(tensor.layers)}
        self.words = self.raw.numpy().view(np.uint64).reshape(LAYERS, kv.num_blocks, HEADS, BLOCK, CELL_WORDS)
        self.words[:] = 0xDEADBEEF
        self.connector: Any = None
        if config.kv_transfer_config is not None:
            self.connector = KVConnectorFactory.create_connector(config=config, role=KVConnectorRole.WORKER, kv_cache_config=kv)
            self.connector.register_kv_caches(self.caches)
        self.known: dict[str, _Known] = {}
        self.computed_tokens = 0
        # Whether a step without a forward pass ends without `wait_for_save`, as before 0.31.
        self.quiet = False
        self.before_execute: list[Callable[[Any], None]] = []

    # KV memory: positions of a request <-> cells.
    def _where(self, blocks: list[int], first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(first, first + count)
        return np.array(blocks)[positions // BLOCK], positions % BLOCK

    def _write(self, r: _Known, first: int, values: list[int]) -> None:
        block, offset = self._where(r.blocks, first, len(values))
        self.words[:, block, :, offset, :] = cells(values).transpose(1, 0, 2, 3)

    def _check(self, name: str, r: _Known, count: int) -> None:
        if count == 0:
            return
        block, offset = self._where(r.blocks, 0, count)
        have = self.words[:, block, :, offset, :].transpose(1, 0, 2, 3)
        bad = np.argwhere((have != cells(r.states[:count])).any(axis=(0, 2, 3))).ravel()
        if len(bad):
            raise WrongCache(
                f"{name}: {len(bad)} of {count} positions hold other bytes, first {bad[0]} (block {r.blocks[bad[0] // BLOCK]}, index {bad[0] // BLOCK})"
            )

    # One step.
    def execute(self, out: Any) -> tuple[ModelRunnerOutput, DraftTokenIds | None]:
        meta = pickle.loads(pickle.dumps(out.kv_connector_metadata))  # it travels between processes
        for act in self.before_execute:
            act(out)
        if self.connector is not None:
            self.connector.handle_preemptions(meta)
        self._update(out)
        if self.connector is None:
            return self._forward(out)
        self.connector.bind_connector_metadata(meta)
        if out.has_sync_kv_loads:
            self.connector.start_load_kv(None)
            for layer in self.caches:
                self.connector.wait_for_layer_load(layer)
        result, drafts = self._forward(out)
        for layer, cache in self.caches.items() if out.total_num_scheduled_tokens else ():
            self.connector.save_kv_layer(layer, cache, None)
        if not out.has_sync_kv_loads:
            self.connector.start_load_kv(None)
        if out.total_num_scheduled_tokens or not self.quiet:
            self.connector.wait_for_save()
        transfers = self.connector.get_transfer_results(out.finished_req_ids)
        result.kv_connector_output = KVConnectorOutput(
            finished_sending=transfers.finished_sending, finished_recving=transfers.finished_recving,
            failed_recving=transfers.failed_recving, invalid_block_ids=self.connector.get_block_ids_with_load_errors(),
            kv_connector_stats=self.connector.get_kv_connector_stats(),
            kv_connector_worker_meta=pickle.loads(pickle.dumps(self.connector.build_connector_worker_meta())),
        )
        self.connector.clear_connector_metadata()
        return result, drafts

    def _update(self, out: Any) -> None:
        for name in out.finished_req_ids:
            self.known.pop(name, None)
        for new in out.scheduled_new_reqs:
            tokens = list(new.prompt_token_ids)
            self.known[new.req_id] = _Known(len(tokens), tokens, list(new.block_ids[0]), states(tokens), [])
        cached = out.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            r = self.known[name]
            if name in cached.resumed_req_ids:
                r.blocks, r.drafts = [], []
                if name in cached.all_token_ids:
                    r.tokens = list(cached.all_token_ids[name])
                    r.states = states(r.tokens)
            if cached.new_block_ids[i] is not None:
                r.blocks += cached.new_block_ids[i][0]

    def _forward(self, out: Any) -> tuple[ModelRunnerOutput, DraftTokenIds | None]:
        first = {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
        first |= dict(zip(out.scheduled_cached_reqs.req_ids, out.scheduled_cached_reqs.num_computed_tokens))
        names = list(out.num_scheduled_tokens)
        sampled, drafts = [], []
        for name in names:
            given, proposed = self._one(name, first[name], out.num_scheduled_tokens[name], out.scheduled_spec_decode_tokens.get(name, []))
            sampled.append(given)
            drafts.append(proposed)
        result = ModelRunnerOutput(req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=sampled)
        return result, DraftTokenIds(names, drafts) if self.spec_tokens and names else None

    def _one(self, name: str, first: int, count: int, scheduled_drafts: list[int]) -> tuple[list[int], list[int]]:
        r = self.known[name]
        first = min(first, len(r.tokens) - 1)  # with async scheduling the scheduler counts drafts before they are verified
        if scheduled_drafts and scheduled_drafts[0] == -1:
            scheduled_drafts = (r.drafts + [0] * len(scheduled_drafts))[: len(scheduled_drafts)]
        self._check(name, r, first)
        tokens = (r.tokens + scheduled_drafts)[first : first + count]
        if len(tokens) != count:
            raise AssertionError(f"{name}: {count} tokens scheduled from {first}, {len(r.tokens)} known")
        state = r.states[first - 1] if first else 1
        values = []
        for token in tokens:
            state = fold(state, token)
            values.append(state)
        self._write(r, first, values)
        self.computed_tokens += count
        if first + count < len(r.tokens):
            return [], []
        # Verify drafts as greedy sampling would; one more token comes for free.
        given, state = [], r.states[-1]
        for draft in [*scheduled_drafts, None]:
            given.append(next_token(state))
            state = fold(state, given[-1])
            r.tokens.append(given[-1])
            r.states.append(state)
            if draft != given[-1]:
                break
        proposed = []
        right = state % (self.spec_tokens + 1) if self.spec_tokens else 0
        for i in range(self.spec_tokens):
            token = next_token(state) if i < right else (next_token(state) + 1) % VOCABULARY
            proposed.append(token)
            state = fold(state, token)
        r.drafts = proposed
        return given, proposed


# The engine ---------------------------------------------------------------------------------------------------
class _Layer:
    """As much of an attention layer as a connector may ask for."""

    isa = "vec"
    _k_scale_float = _v_scale_float = 1.0

    @staticmethod
    def get_attn_backend() -> Any:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend


def layer_names() -> list[str]:
    return [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]


def make_config(
    model: pathlib.Path, connector: dict[str, Any] | None, *, async_scheduling: bool, blocks: int = 64, spec_tokens: int = 0,
    budget: int = 512, max_seqs: int = 8, **args: Any,
) -> VllmConfig:
    if spec_tokens:
        args["speculative_config"] = {"method": "ngram", "num_speculative_tokens": spec_tokens, "prompt_lookup_max": 2}
    if connector is not None:
        from vllm.config.kv_transfer import KVTransferConfig

        args["kv_transfer_config"] = KVTransferConfig(**connector)
    config = EngineArgs(
        model=str(model), skip_tokenizer_init=True, enforce_eager=True, max_model_len=4096, block_size=BLOCK, num_gpu_blocks_override=blocks,
        max_num_batched_tokens=budget, max_num_seqs=max_seqs, prefix_caching_hash_algo="sha256_cbor", generation_config="vllm",
        kv_cache_memory_bytes=64 << 20, **args,
    ).create_engine_config()
    config.scheduler_config.async_scheduling = async_scheduling
    config.cache_config.num_gpu_blocks = blocks
    config.compilation_config.static_forward_context.update((name, _Layer()) for name in layer_names())
    return config


def make_kv(blocks: int) -> KVCacheConfig:
    page = HEADS * BLOCK * CELL_WORDS * 8
    names = layer_names()
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16)
    assert spec.page_size_bytes == page
    tensor = KVCacheTensor(size=page * blocks * LAYERS, layers=names, layer_stride=page * blocks, block_stride=page)
    # 0.32 and newer say how many tokens a hash covers.
    hashes = {"hash_block_size": BLOCK} if "hash_block_size" in KVCacheConfig.__dataclass_fields__ else {}
    return KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[tensor], kv_cache_groups=[KVCacheGroupSpec(names, spec)], kv_cache_layout="LBHNC", **hashes,
    )


class HookTimes:
    """Wraps the hooks that run on the scheduler's thread, and keeps how long each call took, in nanoseconds."""

    HOOKS = (
        "on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "update_connector_output",
        "request_finished_all_groups", "request_finished", "take_events", "has_pending_push_work", "has_pending_block_frees", "reset_cache",
    )

    def __init__(self, connector: Any) -> None:
        self.ns: dict[str, list[int]] = collections.defaultdict(list)
        for name in self.HOOKS:
            if hasattr(connector, name):
                setattr(connector, name, self._timed(name, getattr(connector, name)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return call(*args, **kwargs)
            finally:
                self.ns[name].append(time.perf_counter_ns() - begin)

        return timed

    def percentile(self, q: float) -> float:
        """Microseconds over all hooks together."""
        return float(np.percentile([n for one in self.ns.values() for n in one], q)) / 1000


class ScriptedEngine:
    """A scheduler, its connector and a scripted model, stepped as vLLM's engine core steps them."""

    def __init__(self, config: VllmConfig, *, spec_tokens: int = 0) -> None:
        self.config = config
        blocks = config.cache_config.num_gpu_blocks
        self.model = ScriptedModel(config, make_kv(blocks), spec_tokens)
        algorithm = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(algorithm)
        self.hasher = get_request_block_hasher(BLOCK, algorithm)
        self.is_async = config.scheduler_config.async_scheduling
        kind = AsyncScheduler if self.is_async else Scheduler
        self.scheduler = kind(
            vllm_config=config, kv_cache_config=make_kv(blocks), structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK, hash_block_size=BLOCK, log_stats=True,
        )
        self.connector = self.scheduler.connector
        self.times: HookTimes | None = None
        self.aggregator: KVOutputAggregator | None = None
        if self.connector is not None:
            self.times = HookTimes(self.connector)
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

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def add(self, prompt: list[int], max_tokens: int = 8, **params: Any) -> str:
        self.serial += 1
        name = f"r{self.serial}"
        skip = params.pop("skip_reading_prefix_cache", None)
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, skip_reading_prefix_cache=skip, **params)
        request = Request(name, list(prompt), sampling, None, block_hasher=self.hasher)
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
        out = self.queue.pop()
        result, drafts = self.model.execute(out)
        if self.aggregator is not None:
            result = self.aggregator.aggregate([result])
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
            out = self.scheduler.schedule()
            self.queue.appendleft(out)
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
