"""The program that holds one vLLM engine, driven by JSON lines over two inherited pipes (see engine.py for the parent).

It uses nothing but vLLM's public engine API, and steps the engine itself instead of calling `LLM.generate`, so that the parent
can act between two tokens. vLLM's own output goes to stdout and stderr, which the parent keeps in a log file.
Logprobs travel as float hex: tests compare bits, not decimals.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, Callable

import hooks


def adjust_platform(mla_prefix_caching: bool, spawn: bool, yields: bool) -> None:
    """Three choices of vLLM that tests need otherwise.

    Its CPU platform switches prefix caching off for its reference MLA backend; `mla_prefix_caching` allows it again, because the local
    prefix hit is what a load is compared with. It starts its processes by spawn, which imports everything again in each; unless `spawn`,
    they are forked here (nothing has run on OpenMP threads in the forking process).

    Its processes poll each other with sched_yield. With Linux 6.18.44, where two ranks and one more busy process had two cores, that kept
    others from running for up to 13 s (seen by a process that did nothing but sleep 5 ms at a time); here they sleep, unless `yields`."""
    from vllm.distributed import utils
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms.cpu import CpuPlatform

    def rest() -> None:
        time.sleep(0.0001)

    if not yields:
        utils.sched_yield = shm_broadcast.sched_yield = rest

    usual = CpuPlatform.check_and_update_config.__func__

    def patched(cls: Any, config: Any) -> None:
        before = (config.cache_config.enable_prefix_caching, config.scheduler_config.enable_chunked_prefill)
        usual(cls, config)
        if mla_prefix_caching:
            config.cache_config.enable_prefix_caching, config.scheduler_config.enable_chunked_prefill = before
        if not spawn:
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(patched)


def expose_hook_times() -> None:
    """Lets `hooks` ask the engine's core, which may be a process of its own (forked, so that it has this too)."""
    from vllm.v1.engine.core import EngineCore

    def hook_times(core: Any, beside: bool) -> dict[str, dict[str, float]]:
        times = getattr(core, "kvd_hook_times", None)
        if times is None:
            times = core.kvd_hook_times = hooks.HookTimes(core.scheduler.connector, hooks.SCHEDULER)
            if beside:
                times.watch_scheduler(core.scheduler)
        spread: dict[str, dict[str, float]] = times.spread()
        times.clear()
        return spread

    EngineCore.hook_times = hook_times


def name_nixl() -> None:
    """vLLM looks for the package `nixl`, a 12 KB chooser among backends. We install one backend only, under its own name."""
    import importlib

    import nixl_cu12

    sys.modules["nixl"] = nixl_cu12
    for name in ("_api", "_bindings"):
        sys.modules[f"nixl.{name}"] = importlib.import_module(f"nixl_cu12.{name}")


# What the parent asks the workers to run. They are looked up by name in the worker's process.
def dump_blocks(worker: Any, request: str, blocks: int) -> dict[str, Any]:
    """The first `blocks` KV blocks of a running request, as vLLM's logical [B, H, N, C] view shows them, one digest per
    (block, head), layer by layer in model order."""
    import torch

    runner = worker.model_runner
    name = next((n for n in runner.requests if n == request or n.startswith(request + "-")), None)
    if name is None:
        raise LookupError(f"request {request} is over: it needs more tokens for its blocks to be dumped meanwhile")
    ids = runner.requests[name].block_ids[0][:blocks]
    layers = []
    for group in runner.kv_cache_config.kv_cache_groups[:1]:
        for layer in group.layer_names:
            cache = runner.compilation_config.static_forward_context[layer].kv_cache
            picked = cache[torch.tensor(ids)]
            if picked.dim() == 3:  # one latent head
                picked = picked.unsqueeze(1)
            raw = picked.contiguous().view(torch.uint8).cpu().numpy()
            layers.append([[hashlib.sha256(raw[b, h].tobytes()).hexdigest()[:16] for h in range(raw.shape[1])] for b in range(len(ids))])
    return {"layers": layers, "blocks": len(ids), "shape": list(picked.shape), "dtype": str(cache.dtype), "strides": list(cache.stride())}


def picture(seed: int) -> Any:
    """An image of 56 by 56 pixels that no other seed has."""
    import numpy

    return numpy.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=numpy.uint8)


def worker_pid(worker: Any) -> int:
    return os.getpid()


def watch_steps(worker: Any) -> None:
    """From now on keeps, for each step of this worker, when it began and how long all hooks of its connector had taken until then."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    times, steps, run = hooks.HookTimes(get_kv_transfer_group(), hooks.WORKER, cpu=False), [], worker.model_runner.execute_model

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        steps.append((time.perf_counter_ns(), times.total))
        return run(*args, **kwargs)

    worker.model_runner.execute_model = execute_model
    worker.kvd_watched_steps = steps


def watched_steps(worker: Any) -> list[tuple[int, int]]:
    """The steps since the last call of this."""
    steps = list(worker.kvd_watched_steps)
    worker.kvd_watched_steps.clear()
    return steps


class Pipe:
    """The two pipes to the parent."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._in = os.fdopen(read_fd, "r", encoding="utf-8")
        self._out = os.fdopen(write_fd, "w", encoding="utf-8")

    def send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def receive(self) -> dict[str, Any] | None:
        line = self._in.readline()
        return json.loads(line) if line else None


class Child:
    def __init__(self, pipe: Pipe, options: dict[str, Any]) -> None:
        self.pipe = pipe
        if "NixlConnector" in json.dumps(options["args"].get("kv_transfer_config")):
            name_nixl()
        adjust_platform(options["mla_prefix_caching"], options["spawn"], options["yields"])
        expose_hook_times()
        from vllm import LLM

        begin = time.monotonic()
        self.llm = LLM(**options["args"])
        self.engine = self.llm.llm_engine
        self.serial = 0
        self.ready_s = time.monotonic() - begin

    def facts(self) -> dict[str, Any]:
        import vllm

        config = self.engine.vllm_config
        cache = config.cache_config
        return {
            "pid": os.getpid(), "ready_s": self.ready_s, "vllm": vllm.__version__, "block_size": cache.block_size,
            "num_blocks": cache.num_gpu_blocks, "prefix_caching": cache.enable_prefix_caching,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill, "async_scheduling": config.scheduler_config.async_scheduling,
            "layout": str(getattr(cache, "kv_cache_layout", None)), "cache_dtype": str(cache.cache_dtype),
            "workers": self.engine.collective_rpc(worker_pid),
        }

    def settle(self, deadline_s: float = 10.0) -> None:
        """An engine core in a process of its own goes on stepping while a connector has work. One that lives in this process steps only
        when it is called: do so here."""
        client = self.engine.engine_core
        core = getattr(client, "engine_core", None)
        end = time.monotonic() + deadline_s
        while core is not None and core.scheduler.has_requests() and time.monotonic() < end:
            client.get_output()
            time.sleep(0.001)

    def reset(self, command: dict[str, Any]) -> bool:
        self.settle()
        return self.llm.reset_prefix_cache(reset_running_requests=command.get("running", False), reset_connector=command.get("connector", False))

    def counters(self) -> dict[str, float]:
        """All counters and gauges of vLLM's Prometheus registry, and how much its histograms have seen; labels other than the model's and
        engine's are kept."""
        out: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            value = getattr(metric, "value", getattr(metric, "count", None))
            if value is None:
                continue
            labels = {k: v for k, v in metric.labels.items() if k not in ("model_name", "engine")}
            name = metric.name + ("{" + ",".join(f"{k}={v}" for k, v in sorted(labels.items())) + "}" if labels else "")
            out[name] = out.get(name, 0.0) + float(value)
        return out

    def hooks(self, beside: bool) -> dict[str, dict[str, float]]:
        """How long the connector's hooks took on the scheduler's thread since the last call, microseconds, by hook. The first call
        begins to watch them, and what hooks.py has `beside` them."""
        client = self.engine.engine_core
        core = getattr(client, "engine_core", None)
        return client.call_utility("hook_times", beside) if core is None else core.hook_times(beside)

    def stats(self) -> dict[str, Any]:
        """Counters of our connector's scheduler half, of an engine that is all in this process."""
        stats = self.engine.engine_core.engine_core.scheduler.connector.debug_stats()
        return {name: value for name, value in stats.items() if isinstance(value, int)}

    def submit(self, one: dict[str, Any]) -> str:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest

        self.serial += 1
        name = f"t{self.serial}"
        prompt = TokensPrompt(prompt_token_ids=one["tokens"])
        if one.get("images"):
            prompt["multi_modal_data"] = {"image": [picture(seed) for seed in one["images"]]}
        if one.get("salt"):
            prompt["cache_salt"] = one["salt"]
        params = SamplingParams(
            temperature=one.get("temperature", 0.0), max_tokens=one.get("max_tokens", 8), logprobs=one.get("logprobs", 4),
            prompt_logprobs=one.get("prompt_logprobs"), ignore_eos=True, detokenize=False, n=one.get("n", 1), seed=one.get("seed"),
            extra_args=one.get("extra_args"),
        )
        lora = LoRARequest(one["lora"]["name"], one["lora"]["id"], one["lora"]["path"]) if one.get("lora") else None
        self.engine.add_request(name, prompt, params, lora_request=lora)
        return name

    @staticmethod
    def result(output: Any, first: float | None, begin: float) -> dict[str, Any]:
        samples = []
        for completion in output.outputs:
            logprobs = [
                sorted((token, float(lp.logprob).hex()) for token, lp in position.items()) for position in (completion.logprobs or [])
            ]
            samples.append({"tokens": list(completion.token_ids), "logprobs": logprobs, "finish": completion.finish_reason})
        return {
            "samples": samples, "cached": output.num_cached_tokens, "ttft_s": None if first is None else first - begin,
            "total_s": time.monotonic() - begin, "prompt": len(output.prompt_token_ids),
        }

    def generate(self, command: dict[str, Any]) -> dict[str, Any]:
        """Runs all prompts at once, or so many (`at_once`): then the next comes when one is done. With `progress`, sends a line for every new token.
        `dump` = blocks of each to digest after its first token. `stop_after` aborts a request that has that many tokens. `preempt_after`: once the first request has that many
        tokens and the connector keeps no blocks (vLLM could not forget those) and copies none, all requests lose their blocks, and vLLM its prefix cache."""
        before = self.counters()
        begin = time.monotonic()
        left = iter(command["prompts"])
        names = [self.submit(one) for one in itertools.islice(left, command.get("at_once"))]
        first: dict[str, float] = {}
        done: dict[str, dict[str, Any]] = {}
        dumps: dict[str, Any] = {}
        preempted_at = 0
        while len(done) < len(command["prompts"]):
            for output in self.engine.step():
                index = names.index(output.request_id)
                tokens = max((len(c.token_ids) for c in output.outputs), default=0)
                if tokens and output.request_id not in first:
                    first[output.request_id] = time.monotonic()
                    if command.get("dump"):
                        dumps[output.request_id] = self.engine.collective_rpc(dump_blocks, args=(output.request_id, command["dump"]))
                if command.get("progress") and tokens:
                    self.pipe.send({"event": "token", "request": index, "count": tokens})
                stop = command.get("stop_after")
                wanted = command.get("preempt_after") if index == 0 and not preempted_at else None
                if wanted and tokens >= wanted and self.stats()["blocks_held"] == self.stats()["blocks_in_flight"] == 0:
                    preempted_at = tokens
                    self.llm.reset_prefix_cache(reset_running_requests=True)
                if not output.finished and stop and tokens >= stop:
                    self.engine.abort_request([output.request_id])
                    output.finished = True
                if output.finished:
                    done[output.request_id] = self.result(output, first.get(output.request_id), begin)
                    names += [self.submit(one) for one in itertools.islice(left, 1)]
        seconds = time.monotonic() - begin
        self.settle()
        after = self.counters()
        delta = {k: v - before.get(k, 0.0) for k, v in after.items() if v != before.get(k, 0.0)}
        return {
            "outputs": [done[n] for n in names], "dumps": [dumps.get(n) for n in names], "delta": delta,
            "external": int(delta.get("vllm:external_prefix_cache_hits", 0)), "seconds": seconds, "preempted_at": preempted_at,
        }

    def run(self) -> None:
        verbs: dict[str, Callable[[dict[str, Any]], Any]] = {
            "facts": lambda c: self.facts(),
            "generate": self.generate,
            "counters": lambda c: self.counters(),
            "hooks": lambda c: self.hooks(c["beside"]),
            "stats": lambda c: self.stats(),
            "watch_steps": lambda c: self.engine.collective_rpc(watch_steps),
            "watched_steps": lambda c: self.engine.collective_rpc(watched_steps)[0],
            "reset": self.reset,
        }
        while True:
            command = self.pipe.receive()
            if command is None or command["verb"] == "exit":
                return
            try:
                self.pipe.send({"reply": verbs[command["verb"]](command)})
            except Exception as error:  # the parent decides; an engine that died is a result, too
                self.pipe.send({"error": f"{type(error).__name__}: {error}"})


def serve_engine(read_fd: int, write_fd: int, options: dict[str, Any]) -> None:
    """One engine, until the parent says `exit` or goes away; leaves nothing of its process group behind."""
    pipe = Pipe(read_fd, write_fd)
    try:
        child = Child(pipe, options)
        pipe.send({"reply": child.facts()})
        child.run()
        child.llm.llm_engine.engine_core.shutdown()
    except BaseException as error:
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {error}"})
    finally:
        sys.stdout.flush()
        os.killpg(0, signal.SIGKILL)


def become_engine(request: dict[str, Any], fds: list[int]) -> None:
    """In a fork of the nursery: take the engine's pipes, log and environment, then serve."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(request["env"])
    import torch

    torch.set_num_threads(int(request["env"]["OMP_NUM_THREADS"]))
    serve_engine(fds[0], fds[1], request["options"])


def nursery(control: socket.socket) -> None:
    """Imports vLLM once, and forks an engine for every request: the import is most of an engine's start. It must stay a process of
    one thread that has run nothing in parallel, or its forks could hang."""
    import transformers.models.auto  # noqa: F401
    import vllm.entrypoints.llm  # noqa: F401
    import vllm.model_executor.models.llama  # noqa: F401
    import vllm.v1.engine.core  # noqa: F401
    import vllm.v1.engine.llm_engine  # noqa: F401
    import vllm.v1.executor.multiproc_executor  # noqa: F401
    import vllm.v1.worker.cpu_worker  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control.send(json.dumps({"threads": threading.active_count()}).encode())
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 20, 2)
        if not data:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            become_engine(json.loads(data), fds)
            os._exit(1)
        for fd in fds:
            os.close(fd)
        control.send(json.dumps({"pid": pid}).encode())


def main() -> None:
    if sys.argv[1] == "nursery":
        nursery(socket.socket(fileno=int(sys.argv[2])))
    else:
        serve_engine(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))


if __name__ == "__main__":
    main()
