"""A small connector that keeps blocks in a dictionary of its own process. It is not ours: it is here so that the harness is
known to be right (every scenario passes with it) and known to notice (each `fault` breaks one rule, and some scenario must fail).

`kv_connector_extra_config`: `delay` = steps that a load takes, `defer` = how often a lookup answers "ask again", `fault` = one of FAULTS,
`fail_block` = index of a loaded block that is reported as failed, once per request.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

FAULTS = ("store-unverified", "store-late", "load-wrong-block", "never-done")
STORE: dict[bytes, list[Any]] = {}


@dataclasses.dataclass
class Step(KVConnectorMetadata):
    stores: list[tuple[bytes, int]]
    loads: list[tuple[str, list[tuple[bytes, int]]]]


class MemoryConnector(KVConnectorBase_V1, SupportsHMA):
    requires_kv_delivery = False

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self.delay, self.defer, self.fault = extra.get("delay", 1), extra.get("defer", 0), extra.get("fault")
        self.fail_block = extra.get("fail_block")
        self.block = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        # Scheduler half.
        self.live: dict[str, Any] = {}
        self.asked: dict[str, int] = {}
        self.stored: dict[str, int] = {}
        self.tails: list[tuple[bytes, int]] = []
        self.loads: list[tuple[str, list[tuple[bytes, int]]]] = []
        # Worker half.
        self.caches: list[Any] = []
        self.running: list[list[Any]] = []
        self.errors: set[int] = set()
        self.late: list[list[tuple[bytes, int]]] = []

    # Scheduler half ---------------------------------------------------------------------------------------------
    def on_new_request(self, request: Any) -> None:
        self.live[request.request_id] = request

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        name = request.request_id
        if request.skip_reading_prefix_cache:
            return 0, False
        self.asked[name] = self.asked.get(name, 0) + 1
        if self.asked[name] <= self.defer:
            return None, False
        first = num_computed_tokens // self.block
        count = 0
        for key in request.block_hashes[first : (request.num_tokens - 1) // self.block]:
            if bytes(key) not in STORE:
                break
            count += 1
        return count * self.block, count > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            ids = blocks.get_block_ids()[0]
            count = num_external_tokens // self.block
            first = len(ids) - count if len(ids) * self.block == request.num_tokens else None
            have = [i for i, b in enumerate(blocks.blocks[0]) if b.block_hash is None]
            first = have[0] if first is None or have else first
            self.loads.append((request.request_id, [(bytes(request.block_hashes[i]), ids[i]) for i in range(first, first + count)]))

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        stores, self.tails = self.tails, []
        manager = self._kv_cache_manager
        for name in scheduler_output.num_scheduled_tokens:
            request = self.live[name]
            done = request.num_computed_tokens - request.num_in_flight_tokens  # before this step
            if self.fault == "store-unverified":
                done = request.num_computed_tokens + scheduler_output.num_scheduled_tokens[name]
            stores += self._new_blocks(request, manager.get_block_ids(name)[0], done)
        loads, self.loads = self.loads, []
        return Step(stores, loads)

    def _new_blocks(self, request: Any, ids: list[int], done: int) -> list[tuple[bytes, int]]:
        hashes = request.block_hashes
        if self.fault != "store-unverified":
            done = min(done, request.num_tokens - 1)
        last = min(done // self.block, len(hashes), len(ids))
        first = self.stored.get(request.request_id, 0)
        self.stored[request.request_id] = max(first, last)
        return [(bytes(hashes[i]), ids[i]) for i in range(first, last)]

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        done = request.num_computed_tokens - request.num_in_flight_tokens if request.status.name == "FINISHED_ABORTED" else request.num_tokens - 1
        # Blocks that the connector was still loading into hold nothing yet.
        if not any(name == request.request_id for name, _ in self.loads) and request.num_computed_tokens:
            self.tails += self._new_blocks(request, list(block_ids[0]), min(done, request.num_computed_tokens)) if self._settled(request) else []
        self.live.pop(request.request_id, None)
        return False, None

    @staticmethod
    def _settled(request: Any) -> bool:
        return request.status.name != "FINISHED_ABORTED"

    # Worker half ------------------------------------------------------------------------------------------------
    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.caches = list(kv_caches.values())

    def _store(self, orders: list[tuple[bytes, int]]) -> None:
        for key, block in orders:
            STORE.setdefault(key, [c[block].clone() for c in self.caches])

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self.fault == "store-late":  # steps later, when the block may be somebody else's
            self.late.append(kv_connector_metadata.stores)
        else:
            self._store(kv_connector_metadata.stores)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for name, pieces in self._get_connector_metadata().loads:
            self.running.append([name, self.delay, pieces])

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None:
        if len(self.late) > 64:
            self._store(self.late.pop(0))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        done = set()
        for load in list(self.running):
            load[1] -= 1
            if load[1] > 0 or self.fault == "never-done":
                continue
            self.running.remove(load)
            for index, (key, block) in enumerate(load[2]):
                if index == self.fail_block:
                    self.errors.add(block)
                    continue
                if self.fault == "load-wrong-block":
                    key = load[2][-1][0]
                for cache, saved in zip(self.caches, STORE[key]):
                    cache[block] = saved
            done.add(load[0])
        return set(), done

    def get_block_ids_with_load_errors(self) -> set[int]:
        out, self.errors = self.errors, set()
        return out
