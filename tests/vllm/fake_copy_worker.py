"""vLLM's TieringOffloadingSpec on a CPU, which vLLM refuses: its worker copies on CUDA streams. For tests only.

Only the worker is ours: it copies between the KV cache and the rows of the CPU tier by memcpy, at once. The scheduler's side, the CPU
tier and its shared memory, and the hand-over to secondary tiers are vLLM's own."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class FakeCopyWorker(OffloadingWorker):
    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._per_chunk, self._region, self._groups = blocks_per_chunk, region, kv_caches.group_data_refs
        self._tensors = [
            (one.tensor, region.create_next_worker_view(one.page_size_bytes * blocks_per_chunk), one.page_size_bytes)
            for one in kv_caches.tensors
        ]
        self._done: list[TransferResult] = []

    def _copy(self, job: int, blocks: GPULoadStoreSpec, chunks: CPULoadStoreSpec, out: bool) -> bool:
        at_block = at_chunk = 0
        for refs, size, first in zip(self._groups, blocks.group_sizes, blocks.block_indices):
            skip = first % self._per_chunk  # of the group's first chunk
            for i in range(skip, skip + size):
                block = int(blocks.block_ids[at_block + i - skip])
                chunk = int(chunks.chunk_ids[at_chunk + i // self._per_chunk])
                for ref in refs:
                    cache, rows, page = self._tensors[ref.tensor_idx]
                    begin = i % self._per_chunk * page
                    inside = cache[block, : ref.page_size_bytes]
                    outside = rows[chunk, begin : begin + ref.page_size_bytes]
                    (outside.copy_(inside) if out else inside.copy_(outside))
            at_block += size
            at_chunk += -(-(skip + size) // self._per_chunk) if size else 0
        self._done.append(TransferResult(job, True))
        return True

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._copy(job_id, src_spec, dst_spec, out=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, dst_spec, src_spec, out=False)

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """All is copied when it is submitted."""

    def shutdown(self) -> None:
        self._tensors.clear()
        self._region.cleanup()


class FakeCopyWorkerSpec(TieringOffloadingSpec):
    def get_worker(self, kv_caches: CanonicalKVCaches) -> Any:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id, num_chunks=self.num_chunks, rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk, cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = FakeCopyWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
