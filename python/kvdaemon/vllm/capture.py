"""Which blocks of vLLM's requests may be stored: those that are full, computed, final, and still what they were when vLLM named them.

A running request outgrows blocks of sliding windows and recurrent states, and vLLM gives them to others at once. Those that are to be
stored are kept by a reference in vLLM's block pool, from the step that computes them until they are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvdaemon._native import SchedulerHalf
    from kvdaemon.vllm.caches import Rule
    from kvdaemon.vllm.room import Room

View = tuple[str, Sequence[bytes], Sequence[Sequence[Any]], int, int]
"""A request's id, hashes, blocks by vLLM's groups, and tokens before a step and with it."""


class Capture:
    """The scheduler half's eyes on vLLM's requests."""

    def __init__(self, half: SchedulerHalf, rules: list[Rule], hash_tokens: int, room: Room) -> None:
        self._half, self._rules, self._hash_tokens, self._room = half, rules, hash_tokens, room
        self.requests: dict[str, Request] = {}
        self.manager: Any = None
        """vLLM's manager of KV-cache blocks, once it is bound: tells those of a request."""
        self.pool: Any = None
        """vLLM's block pool, once it is bound."""
        self._offers = any(rule.offered for rule in rules)
        self._outgrows = any(rule.outgrown for rule in rules)

    def bind_pool(self, pool: Any) -> None:
        self.pool = pool
        # A share of the pool that requests don't miss.
        self._half.limit_held(max(int(pool.num_gpu_blocks) // 8, 1))

    def pool_is_empty(self) -> bool:
        """Whether no block is in use or findable by its hash."""
        pool = self.pool
        try:
            return pool.num_gpu_blocks - pool.get_num_free_blocks() == 1 and not len(pool.cached_block_hash_to_block)
        except (AttributeError, TypeError):
            return False

    # --- one step -------------------------------------------------------------------------------------------------------

    def step(self, output: SchedulerOutput) -> tuple[bytes, bool]:
        """A step's orders, and whether there are notices."""
        half, cached = self._half, output.scheduled_cached_reqs
        ids, computed = cached.req_ids, cached.num_computed_tokens
        if new := output.scheduled_new_reqs:
            ids = [one.req_id for one in new] + ids
            computed = [one.num_computed_tokens for one in new] + computed
        preempted = list(output.preempted_req_ids or ())
        ahead: list[int] = []
        offers: dict[str, list[tuple[int, int, int]]] = {}
        if self._outgrows:
            if self.pool is None and half.refusal() is None:
                half.refuse("vLLM has not said where its blocks are kept (bind_gpu_block_pool)")
            ahead = [output.num_scheduled_tokens.get(one, 0) for one in ids]
            offers = self._offered(output)
            self._room.step(ids, computed, ahead, preempted)
        wanted, ended, notices = half.step(preempted, ids, computed, ahead, bool(offers))
        if ended is None:
            views = [self._view(output, ids[at], computed[at], ahead[at] if ahead else 0) for at in wanted]
            kept, *ended = half.end_step(views, [one for name, states in offers.items() for one in self._states(name, states)])
            if kept:
                # Not to be given to others until they are copied.
                self.pool.touch([self.pool.blocks[one] for one in kept])
        orders, released = ended
        self._free(released)
        return orders, notices

    def _view(self, output: SchedulerOutput, name: str, computed: int, ahead: int) -> View | None:
        """A running request, as the half reads it: how many of its tokens have final KV before this step, and with it."""
        request = self.requests.get(name)
        if request is None:
            return None
        final = self._final(request)
        return name, request.block_hashes, self._tables(output, name), min(computed, final), min(computed + ahead, final)

    def _final(self, request: Request) -> int:
        """Tokens that are hashed, and whose KV is final once it is computed. The last token does not count: its KV may not be computed
        (async scheduling), and in a streaming session the token may still be replaced."""
        return int(min(request.num_tokens - 1, len(request.block_hashes) * self._hash_tokens))

    def _tables(self, output: SchedulerOutput, name: str) -> tuple[Sequence[Any], ...]:
        """A request's blocks, or their numbers, by vLLM's groups. Not copied where that can be helped: they are many."""
        if self.manager is not None:
            blocks: tuple[Sequence[Any], ...] = self.manager.get_blocks(name).blocks
            return blocks
        return tuple(output.kv_connector_block_state.resolve_block_ids(name))

    # --- recurrent states -----------------------------------------------------------------------------------------------

    def _offered(self, output: SchedulerOutput) -> dict[str, list[tuple[int, int, int]]]:
        """Recurrent states that this step leaves in blocks of their own: per request (vLLM's group, block, tokens that led to it)."""
        state = getattr(output, "kv_connector_block_state", None) if self._offers else None
        return dict(getattr(state, "boundary_state_offloads", None) or {})

    def _states(self, name: str, states: list[tuple[int, int, int]]) -> Iterator[tuple[str, int, bytes, int]]:
        request = self.requests.get(name)
        if request is None:
            return
        # The last token counts here: a state is offered once, with the step that computes it or (drafts) when its output has come.
        final = min(request.num_tokens, len(request.block_hashes) * self._hash_tokens)
        for of, block, tokens in states:
            for group, rule in enumerate(self._rules):
                span = rule.block_tokens
                if rule.of == of and tokens % span == 0 and 0 < tokens <= final and self._is_still(request, of, block, tokens):
                    yield name, group, request.block_hashes[tokens // self._hash_tokens - 1], block

    def _is_still(self, request: Request, of: int, block: int, tokens: int) -> bool:
        """Whether an offered block of vLLM's group is what it was offered as. With async scheduling and drafts vLLM offers a state when a step's
        output has come, and may give its block to another request before the next step tells us."""
        known = self.pool.blocks[block].block_hash if self.pool is not None else None
        return known == make_block_hash_with_group_id(request.block_hashes[tokens // self._hash_tokens - 1], of)

    # --- references -----------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Lets go what is copied, or will not be."""
        if self._outgrows:
            self._free(self._half.released())

    def _free(self, ids: list[int]) -> None:
        if ids:
            pool = self.pool
            pool.free_blocks([pool.blocks[one] for one in ids])

    # --- the end of a request ---------------------------------------------------------------------------------------------

    def finished(self, request: Request, block_ids: tuple[list[int], ...]) -> bool:
        """Whether vLLM must hold the request's blocks until they are reported as sent."""
        name = request.request_id
        self.requests.pop(name, None)
        self._room.gone(name)
        tokens = min(request.num_computed_tokens, self._final(request))
        return self._half.finished(name, request.block_hashes, block_ids, tokens)
