"""How long a connector's hooks take, seen from outside: the connector knows nothing of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

SCHEDULER = (
    "on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "update_connector_output",
    "request_finished_all_groups", "request_finished", "take_events", "has_pending_push_work", "has_pending_block_frees", "reset_cache",
    "get_kv_connector_stats", "get_external_cache_hit_sources",
)
"""What vLLM calls on the scheduler's thread. Some are called in every step and do next to nothing; all count alike."""

WORKER = (
    "handle_preemptions", "bind_connector_metadata", "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save",
    "clear_connector_metadata", "get_transfer_results", "get_finished", "get_block_ids_with_load_errors", "build_connector_worker_meta",
    "get_kv_connector_stats",
)
"""What vLLM calls in a worker, around a step and in it."""


OWN = ("schedule", "update_from_output")
"""What vLLM's scheduler does in every step, our hooks in it."""


class HookTimes:
    """Wraps hooks of a connector, and keeps how long each call took: by the clock and of the thread's own time on a CPU, in nanoseconds. One
    that another hook calls is part of that one. What the watching costs is counted with them; less of it without `cpu`."""

    def __init__(self, connector: Any, names: tuple[str, ...], cpu: bool = True) -> None:
        self.calls: dict[str, list[tuple[int, int]]] = {}
        self.total = 0
        """By the clock, of all calls."""
        self.steps: list[tuple[int, int]] = []
        """What the calls since the last step took together, for each that computes something."""
        self.beside: dict[str, list[int]] = {}
        """What else took how long in the same thread: vLLM's own part of a step, and a loop of additions."""
        self._step = (0, 0)
        self._inside = False
        self._cpu: Callable[[], int] = time.thread_time_ns if cpu else int
        for name in names:
            if hasattr(connector, name):
                setattr(connector, name, self._timed(name, getattr(connector, name)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside = True
            begin, cpu = time.perf_counter_ns(), self._cpu()
            try:
                return call(*args, **kwargs)
            finally:
                cpu, took = self._cpu() - cpu, time.perf_counter_ns() - begin
                self._inside = False
                self.total += took
                self.calls.setdefault(name, []).append((took, cpu))
                self._step = (self._step[0] + took, self._step[1] + cpu)
                if name == "build_connector_meta":
                    if args[0].total_num_scheduled_tokens:
                        self.steps.append(self._step)
                    self._step = (0, 0)

        return timed

    def watch_scheduler(self, scheduler: Any) -> None:
        """Takes the times of vLLM's own part of a step, too, and after each step's orders those of a loop of additions: what happens to that
        is the machine's."""
        for name in OWN:
            setattr(scheduler, name, self._timed_beside(name, getattr(scheduler, name)))

    def _timed_beside(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            hooks, begin = self.total, time.perf_counter_ns()
            result = call(*args, **kwargs)
            took = time.perf_counter_ns() - begin
            self.beside.setdefault(name, []).append(took - (self.total - hooks))
            if name == OWN[0]:
                begin, total = time.perf_counter_ns(), 0
                for one in range(700):
                    total += one
                self.beside.setdefault("additions", []).append(time.perf_counter_ns() - begin)
            return result

        return timed

    def clear(self) -> None:
        self.calls.clear()
        self.steps.clear()
        self.beside.clear()
        self._step = (0, 0)

    def spread(self) -> dict[str, dict[str, float]]:
        """Calls, p50, p90, p99 and max (microseconds), and `cpu_p99`, by hook, of `all` together, and of all in a `step`. And, without times of
        a CPU, of `vllm`'s own part of a step and of `additions`, if they are watched."""
        whole = self.calls | {"all": [one for calls in self.calls.values() for one in calls], "step": self.steps}
        own = zip(*(self.beside.get(name, []) for name in OWN))
        whole |= {"vllm": [(sum(parts), 0) for parts in own], "additions": [(took, 0) for took in self.beside.get("additions", [])]}
        return {name: _spread(calls) for name, calls in whole.items() if calls}


def _spread(calls: list[tuple[int, int]]) -> dict[str, float]:
    walls, cpus = sorted(wall for wall, _ in calls), sorted(cpu for _, cpu in calls)

    def at(order: list[int], part: float) -> float:
        return order[min(len(order) - 1, int(len(order) * part))] / 1000

    parts = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {"calls": len(calls)} | {name: at(walls, part) for name, part in parts.items()} | {"cpu_p99": at(cpus, 0.99)}
