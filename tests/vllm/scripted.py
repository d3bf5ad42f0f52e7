"""A model runner without a model, for vLLM's real scheduler.

`ScriptedModel` "computes" KV that is a function of the whole prefix, writes it through block tables into real tensors, and before each step
reads back everything the step would attend to: all positions before it (full attention), those within the window (sliding windows), the last
state (recurrent layers). A block that was loaded wrongly, overwritten while it was copied, or stored before its tokens were verified
is noticed the moment it is used. Tokens are a function of the prefix too, so the right answer of every request is known beforehand (`continuation`).

A `Shape` says which layers there are. vLLM's own functions make the KV-cache groups and the tensors of them, so that groups alias the same memory as
in an engine. Recurrent layers do what vLLM's runner does in mamba mode "align": the state goes from block to block, and is in a block of its own
wherever a step ended at a block's end. With drafts the states after each of them are in blocks of their own, and that at a block's end is moved to
its place once the tokens are accepted.

What is deliberately absent: tensor parallelism (one rank), and time: a step is a call.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched import output
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.utils import allocate_kv_cache

try:
    from vllm.v1.core import kv_cache_planning as planning  # since 0.33
except ImportError:
    planning = kv_cache_utils

HEADS, HEAD_SIZE, BLOCK = 2, 64, 32
STATES_OFFERED = hasattr(output, "KVConnectorBlockState") and "boundary_state_offloads" in output.KVConnectorBlockState.__annotations__
"""Whether this vLLM tells a connector of recurrent states. What the model does with drafts beside states is as in such a vLLM."""
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


class WrongCache(AssertionError):
    """The model would have attended to something that is not the KV of its tokens, or would have written where a copy is under way."""


# Which layers there are --------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Shape:
    """Layers of a model: how many of each kind, and of how many heads (of which a block's tokens follow: pages are of one size)."""

    name: str
    full: int = 2
    full_heads: int = HEADS
    small: int = 0
    """Layers of full attention with one head, in the same group as the others."""
    windows: int = 0
    window: int = 0
    window_heads: int = HEADS
    states: int = 0
    state_bytes: int = 0
    block: int = BLOCK
    """Tokens of a block, as the user sets it."""
    unit: int = BLOCK
    """Tokens of which every hit of all groups is a multiple."""
    layout: str = "LBHNC"
    """In which order vLLM lays pages: layers or blocks outermost."""
    args: tuple[tuple[str, Any], ...] = ()

    @property
    def outgrows(self) -> bool:
        """Whether running requests give up blocks that they need no more."""
        return bool(self.windows or self.states)

    def layers(self, spec_tokens: int = 0) -> dict[str, KVCacheSpec]:
        kinds = [("small", self.small), ("full", self.full), ("window", self.windows), ("state", self.states)]
        names = [kind for kind, count in kinds for _ in range(count)]
        return {f"model.layers.{i}.{'mixer' if kind == 'state' else 'self_attn.attn'}": self._spec(kind, spec_tokens) for i, kind in enumerate(names)}

    def _spec(self, kind: str, spec_tokens: int = 0) -> KVCacheSpec:
        common: dict[str, Any] = {"block_size": self.block, "head_size": HEAD_SIZE, "dtype": torch.bfloat16}
        if kind in ("full", "small"):
            return FullAttentionSpec(num_kv_heads=self.full_heads if kind == "full" else 1, **common)
        if kind == "window":
            return SlidingWindowSpec(num_kv_heads=self.window_heads, sliding_window=self.window, **common)
        shapes, dtypes = ((self.state_bytes // 8,), (self.state_bytes // 4,)), (torch.float32, torch.bfloat16)
        page = self._spec("full").page_size_bytes
        return MambaSpec(
            block_size=self.block, shapes=shapes, dtypes=dtypes, mamba_cache_mode="align", page_size_padded=page, num_speculative_blocks=spec_tokens
        )


FULL = Shape("full", full=4)
SHAPES = {
    one.name: one
    for one in (
        FULL,
        Shape("sizes", small=1),
        Shape("sizes-windows", small=2, windows=4, window=64, layout="BLHNC"),
        Shape("windows", windows=4, window=64),
        Shape("windows-odd", windows=4, window=100),
        Shape("windows-long-full", windows=4, window=70, full_heads=1, unit=64),
        Shape("windows-long", windows=4, window=150, window_heads=1, unit=64),
        Shape("states", states=6, state_bytes=12_000),
        Shape("states-fine", states=4, state_bytes=20_000, block=64, unit=64, args=(("prefix_match_unit", 32),)),
        Shape("all", windows=2, window=96, states=2, state_bytes=8_000),
    )
}


def make_kv(config: VllmConfig, shape: Shape) -> KVCacheConfig:
    """The KV-cache groups that vLLM makes of these layers, as its workers see them."""
    register_all_kvcache_specs(config)
    drafts = config.speculative_config.num_speculative_tokens if config.speculative_config else 0
    groups = planning.get_kv_cache_groups(config, shape.layers(drafts))
    kv = planning.get_kv_cache_config_from_groups(config, groups, 1 << 30)
    kv.kv_cache_layout = config.cache_config.kv_cache_layout
    scheduler = kv_cache_utils.generate_scheduler_kv_cache_config([kv])
    unit, hashes = kv_cache_utils.resolve_kv_cache_block_sizes(scheduler, config)
    assert unit == shape.unit, (unit, shape)
    if hasattr(kv, "hash_block_size"):  # 0.32 and newer: before, a connector has to ask
        kv.hash_block_size = hashes
        kv.cache_hit_alignment_tokens = kv_cache_utils.resolve_cache_hit_alignment_tokens(scheduler, config, unit, hashes)
    return kv


def hash_tokens(config: VllmConfig, kv: KVCacheConfig) -> int:
    """How many tokens a block hash covers."""
    return int(kv_cache_utils.resolve_kv_cache_block_sizes(kv_cache_utils.generate_scheduler_kv_cache_config([kv]), config)[1])


@functools.cache
def _keys(layer: int, words: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(7 + layer)).integers(1, MASK, words, dtype=np.uint64, endpoint=True) | np.uint64(1)


class _Layer:
    """A layer's KV cache, as the words of [block, head, token] (of a state: one head, one token)."""

    def __init__(self, number: int, cache: torch.Tensor) -> None:
        self.words = cache.view(torch.int64).numpy().view(np.uint64)
        _, heads, _, cell = self.words.shape
        self.keys = _keys(number, heads * cell).reshape(heads, cell)

    def value(self, prefix_states: list[int]) -> np.ndarray:
        """[position, head, word]."""
        return np.array(prefix_states, dtype=np.uint64)[:, None, None] * self.keys


class _Group:
    """A KV-cache group: its kind, its layers, and what a step reads of it."""

    def __init__(self, spec: KVCacheSpec, layers: list[_Layer]) -> None:
        spec = getattr(spec, "first_spec", spec)  # of layers of several sizes
        self.block, self.layers = spec.block_size, layers
        self.window: int | None = getattr(spec, "sliding_window", None)
        self.is_state = isinstance(spec, MambaSpec)

    def where(self, blocks: list[int], first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(first, first + count)
        return np.array(blocks, dtype=np.int64)[positions // self.block], positions % self.block

    def first_read(self, position: int) -> int:
        """The first position that the token at `position` attends to."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def write(self, blocks: list[int], first: int, values: list[int]) -> None:
        block, offset = self.where(blocks, first, len(values))
        for layer in self.layers:
            layer.words[block, :, offset, :] = layer.value(values)

    def wrong(self, blocks: list[int], first: int, right: list[int]) -> np.ndarray:
        """Which positions hold something else."""
        block, offset = self.where(blocks, first, len(right))
        bad = np.zeros(len(right), dtype=bool)
        for layer in self.layers:
            bad |= (layer.words[block, :, offset, :] != layer.value(right)).any(axis=(1, 2))
        return np.argwhere(bad).ravel() + first


@dataclasses.dataclass
class _Known:
    """What a model runner remembers of a request. Block tables only grow: what vLLM has given up stays in them."""

    prompt: int
    tokens: list[int]
    blocks: list[list[int]]
    states: list[int]
    drafts: list[int]
    state_at: int | None = None
    """Index of the block with the running state, or the one after the last step's first token that could be a draft's guess."""
    accepted: int = 0
    """Drafts of the last step that were right: so many blocks further is the state after them."""


class ScriptedModel:
    """The worker's side of an engine: KV memory, the worker half of the connector, and steps."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig, spec_tokens: int) -> None:
        self.config, self.kv, self.spec_tokens = config, kv, spec_tokens
        self.caches = allocate_kv_cache(kv, torch.device("cpu"), config.cache_config.get_resolved_kv_cache_layout())
        raw = torch.empty(0, dtype=torch.uint8).set_(next(iter(self.caches.values())).untyped_storage()).numpy()
        # Of the layers of one group that are of one size: [layer, block, byte]. Those of other groups may lie over them.
        self.pages = [
            np.lib.stride_tricks.as_strided(raw[one.offset :], (len(one.layers), kv.num_blocks, page), (one.layer_stride, one.block_stride, 1))
            for one in kv.kv_cache_tensors
            for page in [min(one.layer_stride, one.block_stride)]
        ]
        raw.view(np.uint64)[:] = 0xDEADBEEF
        numbers = {name: i for i, name in enumerate(self.caches)}
        self.groups = [
            _Group(group.kv_cache_spec, [_Layer(numbers[name], self.caches[name]) for name in group.layer_names]) for group in kv.kv_cache_groups
        ]
        self.connector: Any = None
        if config.kv_transfer_config is not None:
            self.connector = KVConnectorFactory.create_connector(config=config, role=KVConnectorRole.WORKER, kv_cache_config=kv)
            self.connector.register_kv_caches(self.caches)
        self.known: dict[str, _Known] = {}
        self.computed_tokens = 0
        # Whether a step without a forward pass ends without `wait_for_save`, as before 0.31.
        self.quiet = False
        self.before_execute: list[Callable[[Any], None]] = []
        self.copied_blocks = self.zeroed_blocks = 0
        self.busy: dict[int, str] = {}
        """Blocks that this step must not write, and why."""

    # KV memory: positions of a request <-> cells.
    def _writes(self, what: str, blocks: Iterable[int]) -> None:
        for block in {int(one) for one in blocks}:
            if block == 0:
                raise WrongCache(f"{what} writes block 0, which is nobody's")
            if block in self.busy:
                raise WrongCache(f"{what} writes block {block}, and {self.busy[block]}")

    def _check(self, name: str, r: _Known, count: int) -> None:
        """Everything that a step from position `count` on reads."""
        for number, group in enumerate(self.groups):
            if group.is_state:
                continue
            first = group.first_read(count)
            bad = group.wrong(r.blocks[number], first, r.states[first:count]) if count > first else ()
            if len(bad):
                at = int(bad[0])
                raise WrongCache(
                    f"{name}: group {number}: {len(bad)} of {count - first} positions hold other bytes, first {at} "
                    f"(block {r.blocks[number][at // group.block]}, index {at // group.block})"
                )

    def _bring_states(self, name: str, r: _Known, first: int, count: int) -> list[tuple[int, int]]:
        """Before a step: the state comes to the block in which the step leaves it. Gives (group, block) of where it came from."""
        came: list[tuple[int, int]] = []
        for number, group in enumerate(self.groups):
            if not group.is_state:
                continue
            before = r.state_at if r.state_at is not None else (first - 1) // group.block
            now = (first + count - 1) // group.block
            blocks = r.blocks[number]
            source = blocks[before + r.accepted]
            if first:
                came.append((number, source))
            if first and before != now:
                self._writes(f"{name}: group {number}", [blocks[now]])
                came.append((number, blocks[now]))
                for layer in group.layers:
                    layer.words[blocks[now]] = layer.words[source]
        r.state_at = next(((first + count - 1) // one.block for one in self.groups if one.is_state), None)
        return came

    def _move_states(self, name: str, r: _Known, first: int, count: int, drafts: int, right: int) -> None:
        """After a step: the state at a block's end comes to its block, if so many drafts were right that it was passed. The scheduler
        knows nothing of it before the step's output."""
        r.accepted = right
        for number, group in enumerate(self.groups):
            if not group.is_state:
                continue
            assert r.state_at is not None
            known = first + count - drafts
            end = (known + right) // group.block * group.block
            if end < known:
                continue
            source, place = r.state_at + end - known, end // group.block - 1
            if source != place:
                blocks = r.blocks[number]
                self._writes(f"{name}: group {number}", [blocks[place]])
                for layer in group.layers:
                    layer.words[blocks[place]] = layer.words[blocks[source]]
            if place == r.state_at:
                r.accepted = 0

    def _check_states(self, name: str, r: _Known, first: int, came: list[tuple[int, int]]) -> None:
        """All states of a step are brought at once, so that none may come from a block that another goes to."""
        for number, block in came:
            for layer in self.groups[number].layers:
                if (layer.words[block, :, 0] != layer.value([r.states[first - 1]])[0]).any():
                    raise WrongCache(f"{name}: group {number}: block {block} does not hold the state after {first} tokens")

    def _write(self, name: str, r: _Known, first: int, values: list[int], drafts: int) -> None:
        for number, group in enumerate(self.groups):
            blocks = r.blocks[number]
            if group.is_state:
                assert r.state_at is not None
                own = blocks[r.state_at : r.state_at + drafts + 1]
                self._writes(f"{name}: group {number}", own)
                for layer in group.layers:
                    layer.words[own, :, 0] = layer.value(values[len(values) - drafts - 1 :])
            else:
                self._writes(f"{name}: group {number}", group.where(blocks, first, len(values))[0])
                group.write(blocks, first, values)

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
        if out.new_block_ids_to_zero:
            self._writes("zeroing", out.new_block_ids_to_zero)
            for pages in self.pages:
                pages[:, out.new_block_ids_to_zero] = 0
            self.zeroed_blocks += len(out.new_block_ids_to_zero)
        if out.kv_cache_block_copies:
            pairs = np.array(out.kv_cache_block_copies, dtype=np.int64)
            self._writes("a copy on write", pairs[:, 1])
            # One after the other, for a block may be copied on in the step that fills it. vLLM's own runner (0.32) reads all before it writes
            # any, and gets such chains wrong.
            for source, copy in pairs:
                for pages in self.pages:
                    pages[:, copy] = pages[:, source]
            self.copied_blocks += len(pairs)
        for new in out.scheduled_new_reqs:
            tokens = list(new.prompt_token_ids)
            self.known[new.req_id] = _Known(len(tokens), tokens, [list(one) for one in new.block_ids], states(tokens), [])
        cached = out.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            r = self.known[name]
            if name in cached.resumed_req_ids:
                r.blocks, r.drafts, r.state_at, r.accepted = [[] for _ in self.groups], [], None, 0
                if name in cached.all_token_ids:
                    r.tokens = list(cached.all_token_ids[name])
                    r.states = states(r.tokens)
            for blocks, more in zip(r.blocks, cached.new_block_ids[i] or ()):
                blocks += more

    def _forward(self, out: Any) -> tuple[ModelRunnerOutput, DraftTokenIds | None]:
        first = {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
        first |= dict(zip(out.scheduled_cached_reqs.req_ids, out.scheduled_cached_reqs.num_computed_tokens))
        names = list(out.num_scheduled_tokens)
        steps = []
        for name in names:
            r = self.known[name]
            start = min(first[name], len(r.tokens) - 1)  # with async scheduling the scheduler counts drafts before they are verified
            tokens, guesses = self._inputs(name, r, start, out.num_scheduled_tokens[name], out.scheduled_spec_decode_tokens.get(name, []))
            steps.append((name, r, start, tokens, guesses, self._bring_states(name, r, start, len(tokens))))
        for name, r, start, _, _, came in steps:
            self._check_states(name, r, start, came)
        # As in every layer of a model: first all tokens' KV is written, then it is read.
        for name, r, start, tokens, guesses, _ in steps:
            self._write(name, r, start, self._values(r, start, tokens), len(guesses))
        for name, r, start, _, _, _ in steps:
            self._check(name, r, start)
        sampled, drafts = [], []
        for name, r, start, tokens, guesses, _ in steps:
            self.computed_tokens += len(tokens)
            given, proposed = self._sample(r, guesses) if start + len(tokens) >= len(r.tokens) else ([], [])
            self._move_states(name, r, start, len(tokens), len(guesses), max(len(given) - 1, 0))
            sampled.append(given)
            drafts.append(proposed)
        result = ModelRunnerOutput(req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=sampled)
        return result, DraftTokenIds(names, drafts) if self.spec_tokens and names else None

    @staticmethod
    def _inputs(name: str, r: _Known, first: int, count: int, drafts: list[int]) -> tuple[list[int], list[int]]:
        """The tokens of a step, and the drafts among them."""
        if drafts and drafts[0] == -1:
            drafts = (r.drafts + [0] * len(drafts))[: len(drafts)]
        tokens = (r.tokens + drafts)[first : first + count]
        if len(tokens) != count:
            raise AssertionError(f"{name}: {count} tokens scheduled from {first}, {len(r.tokens)} known")
        return tokens, drafts

    @staticmethod
    def _values(r: _Known, first: int, tokens: list[int]) -> list[int]:
        state = r.states[first - 1] if first else 1
        values = []
        for token in tokens:
            state = fold(state, token)
            values.append(state)
        return values

    def _sample(self, r: _Known, drafts: list[int]) -> tuple[list[int], list[int]]:
        """Verifies drafts as greedy sampling would; one more token comes for free. And proposes others."""
        given, state = [], r.states[-1]
        for draft in [*drafts, None]:
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
