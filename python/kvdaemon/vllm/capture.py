"""Which blocks of vLLM's requests may be stored: those that are full, computed, final, and still what they were when vLLM named them.

A running request outgrows blocks of sliding windows and recurrent states, and vLLM gives them to others at once. Those that are to be
stored are kept by a reference in vLLM's block pool, from the step that computes them until they are copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvdaemon._native import SchedulerHalf
    from kvdaemon.vllm.caches import Rule
    from kvdaemon.vllm.room import Room


class Capture:
    """The scheduler half's eyes on vLLM's requests."""

    def __init__(self, half: SchedulerHalf, rules: list[Rule], room: Room) -> None:
        self._half, self._room = half, room
        self.requests: dict[str, Request] = {}
        self.manager: Any = None
        """vLLM's manager of KV-cache blocks, once it is bound: tells those of a request."""
        self._tables: list[dict[str, list[Any]]] = []
        """Where it has them, by vLLM's groups, if that is known: to ask it is slow."""
        self.pool: Any = None
        """vLLM's block pool, once it is bound."""
        self._outgrows = any(rule.outgrown for rule in rules)

    def bind_pool(self, pool: Any) -> None:
        self.pool = pool
        # A share of the pool that requests don't miss.
        self._half.limit_held(max(int(pool.num_gpu_blocks) // 8, 1))

    def bind_manager(self, manager: Any) -> None:
        self.manager, self._tables = manager, []
        tables = [getattr(one, "req_to_blocks", None) for one in getattr(getattr(manager, "coordinator", None), "single_type_managers", ())]
        if tables and all(isinstance(one, dict) for one in tables) and _are_what_it_tells(tables, manager):
            self._tables = tables

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
        half = self._half
        if self._outgrows:
            if self.pool is None and half.refusal() is None:
                half.refuse("vLLM has not said where its blocks are kept (bind_gpu_block_pool)")
            self._room.step(output)
        return half.step(output, self.requests, self.manager, self._tables, self.pool, make_block_hash_with_group_id)

    # --- the end of a request ---------------------------------------------------------------------------------------------

    def finished(self, request: Request, block_ids: tuple[list[int], ...]) -> bool:
        """Whether vLLM must hold the request's blocks until they are reported as sent."""
        name = request.request_id
        self.requests.pop(name, None)
        self._room.gone(name)
        return self._half.finished(name, request, block_ids)


def _are_what_it_tells(tables: list[dict[str, list[Any]]], manager: Any) -> bool:
    """Whether vLLM's manager tells a request's blocks from these: tried with one that there is not."""
    name, marks = "kvd probes", [[object()] for _ in tables]
    try:
        for table, mark in zip(tables, marks):
            table[name] = mark
        told = manager.get_blocks(name).blocks
        return len(told) == len(marks) and all(one is mark for one, mark in zip(told, marks))
    except Exception:
        return False
    finally:
        for table in tables:
            table.pop(name, None)
