"""Drives one vLLM engine in a process group of its own, so that a test can kill any part of it and nothing is left behind.

One engine serves many checks: starting one takes most of a test's time. This file imports neither torch nor vLLM, so the demo can
use it from any Python. No sleeping: every wait is for a line of the child, or polls a named condition with a deadline.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ON_GPU = os.environ.get("KVD_TEST_GPU") == "1"
"""Engines run on an NVIDIA GPU, of a vLLM that is built for it; else on a CPU, whatever the machine has."""
START_S = 240.0
CALL_S = 240.0


class EngineError(RuntimeError):
    """The child answered with an error or went away. Carries the end of its log."""


def wait_until(what: str, condition: Callable[[], Any], deadline_s: float = 30.0, every_s: float = 0.02) -> Any:
    """Polls `condition` until it is true and gives its value back; for what happens in other processes and can't be waited on."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            raise TimeoutError(f"not within {deadline_s:.0f} s: {what}")
        time.sleep(every_s)


def environment(extra: dict[str, str] | None = None, threads: int = 2, in_process: bool = False) -> dict[str, str]:
    """What an offline vLLM on a few CPU cores needs; or on a GPU, where what is set for vLLM holds (the tests' own level of its log, too)."""
    foreign = ("OMP_", "PYTEST_") if ON_GPU else ("VLLM_", "OMP_", "PYTEST_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    env |= {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": str(threads),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "VLLM_LOGGING_COLOR": "0",
    }
    if not ON_GPU:
        env |= {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    return env | (extra or {})


@dataclasses.dataclass
class Sample:
    tokens: list[int]
    logprobs: list[list[tuple[int, str]]]
    finish: str | None


@dataclasses.dataclass
class Answer:
    """What one request gave."""

    samples: list[Sample]
    cached: int
    ttft_s: float | None
    total_s: float
    prompt: int

    @property
    def tokens(self) -> list[int]:
        return self.samples[0].tokens

    @property
    def bits(self) -> list[tuple[list[int], list[list[tuple[int, str]]]]]:
        """Tokens and logprobs of all samples, comparable bit by bit."""
        return [(s.tokens, [[tuple(p) for p in position] for position in s.logprobs]) for s in self.samples]


@dataclasses.dataclass
class Batch:
    answers: list[Answer]
    dumps: list[Any]
    external: int
    delta: dict[str, float]
    seconds: float
    preempted_at: int = 0


def _answer(raw: dict[str, Any]) -> Answer:
    samples = [Sample(s["tokens"], [[(t, h) for t, h in p] for p in s["logprobs"]], s["finish"]) for s in raw["samples"]]
    return Answer(samples, raw["cached"] or 0, raw["ttft_s"], raw["total_s"], raw["prompt"])


def kv_transfer(socket: str | os.PathLike[str], **extra: Any) -> dict[str, Any]:
    """vLLM's kv_transfer_config for our connector, as users write it."""
    return {
        "kv_connector": "KvdConnector", "kv_connector_module_path": "kvdaemon.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"socket": str(socket)} | extra,
    }


def patient(socket: str | os.PathLike[str], **extra: Any) -> dict[str, Any]:
    """The same where a hit or a store is expected: on a busy machine of two cores 20 ms may not be enough for the daemon's answer to a lookup,
    two seconds not for a load, and one second not for the end of a finished request's stores."""
    return kv_transfer(socket, **{"lookup_deadline_ms": 5000, "load_deadline_ms": 30_000, "hold_deadline_ms": 30_000} | extra)


def multi(*children: dict[str, Any]) -> dict[str, Any]:
    """A MultiConnector of these."""
    return {
        "kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": list(children)},
    }


class Nursery:
    """A process that has imported vLLM once and forks engines: see engine_child.py. Saves about ten seconds an engine."""

    def __init__(self, log: str | os.PathLike[str], python: str = sys.executable, env: dict[str, str] | None = None) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, pathlib.Path(log).open("ab") as out:
            self.process = subprocess.Popen(
                [python, str(HERE / "engine_child.py"), "nursery", str(theirs.fileno())], stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, pass_fds=(theirs.fileno(),), start_new_session=True, env=environment(env),
            )
        self._ready = False

    def _receive(self) -> dict[str, Any]:
        self._control.settimeout(START_S)
        data = self._control.recv(1 << 16)
        if not data:
            raise EngineError("the process that starts engines is gone")
        return json.loads(data)

    def start(self, log: pathlib.Path, env: dict[str, str], options: dict[str, Any], fds: list[int]) -> int:
        """Forks an engine, which takes the two pipes; gives its pid."""
        if not self._ready:
            threads = self._receive()["threads"]
            if threads != 1:
                raise EngineError(f"importing vLLM left {threads} threads: forking is not safe")
            self._ready = True
        socket.send_fds(self._control, [json.dumps({"log": str(log), "env": env, "options": options}).encode()], fds)
        return self._receive()["pid"]

    def close(self) -> None:
        self._control.close()
        self.process.kill()
        self.process.wait()


class Engine:
    """A running engine. Use as a context manager, or call `close` whatever happens."""

    def __init__(
        self, model: str | os.PathLike[str], log: str | os.PathLike[str], *, connector: dict[str, Any] | None = None,
        python: str = sys.executable, env: dict[str, str] | None = None, in_process: bool = False, threads: int = 2,
        mla_prefix_caching: bool = False, spawn: bool = False, yields: bool = False, start: bool = True, nursery: Nursery | None = None, **args: Any,
    ) -> None:
        self.args: dict[str, Any] = {
            "model": str(model), "skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 4096, "max_num_seqs": 8,
            "block_size": 32, "kv_cache_memory_bytes": 64 << 20, "disable_log_stats": False, "seed": 0,
            "prefix_caching_hash_algo": "sha256_cbor", "generation_config": "vllm",
        } | ({"gpu_memory_utilization": 0.1} if ON_GPU else {}) | args
        if connector is not None:
            self.args["kv_transfer_config"] = connector
        options = {"args": self.args, "mla_prefix_caching": mla_prefix_caching, "spawn": spawn, "yields": yields}
        self.log = pathlib.Path(log)
        self.events: collections.deque[dict[str, Any]] = collections.deque()
        self._buffer = b""
        down_read, self._down = os.pipe()
        self._up, up_write = os.pipe()
        # vLLM's own sockets: it leaves them where they are when it is killed.
        self._sockets = tempfile.TemporaryDirectory(prefix="kvd-engine-")
        whole_env = environment(env, threads, in_process) | {"VLLM_RPC_BASE_PATH": self._sockets.name}
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if nursery is not None:
                self.pid = nursery.start(self.log, whole_env, options, [down_read, up_write])
            else:
                with self.log.open("ab") as out:
                    self._process = subprocess.Popen(
                        [python, str(HERE / "engine_child.py"), str(down_read), str(up_write), json.dumps(options)],
                        stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=(down_read, up_write), start_new_session=True,
                        env=whole_env,
                    )
                self.pid = self._process.pid
        finally:
            os.close(down_read)
            os.close(up_write)
        self.facts: dict[str, Any] = {}
        if start:
            self.wait_started()

    def wait_started(self, deadline_s: float = START_S) -> Engine:
        try:
            self.facts = self._reply(deadline_s)
        except BaseException:
            self.close()
            raise
        return self

    # The wire -------------------------------------------------------------------------------------------------
    def _line(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._up], [], [], left)[0]:
                raise EngineError(f"the engine did not answer in time\n{self.tail()}")
            data = os.read(self._up, 1 << 20)
            if not data:
                raise EngineError(f"the engine process is gone\n{self.tail()}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def _reply(self, deadline_s: float) -> Any:
        deadline = time.monotonic() + deadline_s
        while True:
            message = self._line(deadline)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise EngineError(f"{message['error']}\n{self.tail()}")
            else:
                return message["reply"]

    def send(self, verb: str, **fields: Any) -> None:
        """Sends a command without waiting; `receive` gets the reply."""
        self.events.clear()
        data = json.dumps({"verb": verb} | fields).encode() + b"\n"
        while data:
            data = data[os.write(self._down, data) :]

    def receive(self, deadline_s: float = CALL_S) -> Any:
        return self._reply(deadline_s)

    def call(self, verb: str, deadline_s: float = CALL_S, **fields: Any) -> Any:
        self.send(verb, **fields)
        return self._reply(deadline_s)

    def wait_tokens(self, count: int, request: int = 0, deadline_s: float = CALL_S) -> None:
        """Until request `request` of the batch that `begin` started has given `count` tokens."""
        deadline = time.monotonic() + deadline_s
        seen = max((e["count"] for e in self.events if e["request"] == request), default=0)
        while seen < count:
            message = self._line(deadline)
            if "event" not in message:
                raise EngineError(f"the batch ended before {count} tokens: {str(message)[:400]}")
            self.events.append(message)
            if message["request"] == request:
                seen = message["count"]

    # The verbs ------------------------------------------------------------------------------------------------
    def begin(self, prompts: Iterable[list[int]], **fields: Any) -> None:
        """Starts a batch; `finish` waits for it. `max_tokens` may be a list: one for each prompt."""
        if "dump" in fields:
            # The engine goes on while the dump is asked for; on a busy machine, for many tokens.
            fields = {"max_tokens": 64} | fields
        common = {k: fields.pop(k) for k in list(fields) if k in ("progress", "dump", "stop_after", "preempt_after", "at_once")}
        lengths = fields.pop("max_tokens", 8)
        each = lengths if isinstance(lengths, list) else itertools.repeat(lengths)
        self.send("generate", prompts=[{"tokens": p, "max_tokens": one} | fields for p, one in zip(prompts, each)], **common)

    def finish(self, deadline_s: float = CALL_S) -> Batch:
        raw = self._reply(deadline_s)
        return Batch([_answer(o) for o in raw["outputs"]], raw["dumps"], raw["external"], raw["delta"], raw["seconds"], raw["preempted_at"])

    def batch(self, prompts: Iterable[list[int]], **fields: Any) -> Batch:
        self.begin(prompts, **fields)
        return self.finish()

    def ask(self, tokens: list[int], **fields: Any) -> Answer:
        return self.batch([tokens], **fields).answers[0]

    def reset_local(self) -> None:
        """Forgets vLLM's own prefix cache, not the daemon's. Blocks may still be held by stores that are being finished."""
        wait_until("the engine lets go of its blocks", lambda: self.call("reset"), every_s=0.05)

    def counters(self) -> dict[str, float]:
        return self.call("counters")

    def hooks(self, beside: bool = False) -> dict[str, dict[str, float]]:
        """Calls, p50, p90, p99 and max (microseconds) of each scheduler hook of the connector since the last call of this; the first one
        begins to watch them, and what else a step takes, if that is wanted `beside` them. See hooks.py."""
        return self.call("hooks", beside=beside)

    def watch_steps(self) -> None:
        """From now on `watched_steps` can tell what the first worker's steps and the connector's hooks in them took."""
        self.call("watch_steps")

    def watched_steps(self) -> list[tuple[int, int]]:
        """Of each step of the first worker since the last call of this: when it began, and how long all hooks had taken until then
        (nanoseconds)."""
        return [(begin, hooks) for begin, hooks in self.call("watched_steps")]

    # The processes --------------------------------------------------------------------------------------------
    def group(self) -> list[tuple[int, str]]:
        """(pid, command or title) of every live process of this engine's group."""
        out = []
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                stat = (entry / "stat").read_text()
                fields = stat[stat.rindex(")") + 2 :].split()
                if int(fields[2]) == self.pid and fields[0] != "Z":
                    title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    out.append((int(entry.name), title))
            except (OSError, ValueError):
                continue
        return out

    def pid_of(self, role: str) -> int:
        """`core` (the scheduler's process) or `worker`, of an engine that is not all in one process."""
        worker = int(self.facts["workers"][0])
        if role == "worker":
            return worker
        text = pathlib.Path(f"/proc/{worker}/stat").read_text()
        parent = int(text[text.rindex(")") + 2 :].split()[1])
        if self.pid in (worker, parent):
            raise EngineError("scheduler and worker live in one process")
        return parent

    def tail(self, lines: int = 30) -> str:
        """The end of the engine's log, and before it the first error in it: of several processes the first to fail is not the last to speak."""
        try:
            log = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        errors = [line for line in log[:-lines] if " ERROR " in line][: 2 * lines]
        return "\n".join([*errors, *(["..."] if errors else []), *log[-lines:]])

    def exit(self, deadline_s: float = 60.0) -> None:
        """An orderly end: the engine shuts down, then its process goes."""
        self.send("exit")
        self._reap(deadline_s)
        self.close()

    def kill(self) -> None:
        """The whole engine at once."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _reap(self, deadline_s: float = 30.0) -> None:
        if self._process is not None:
            self._process.wait(deadline_s)
        wait_until("all processes of the engine are gone", lambda: not self.group(), deadline_s)

    def close(self) -> None:
        """Ends whatever is left. Safe to call twice."""
        self.kill()
        self._reap()
        for name in ("_down", "_up"):
            fd = self.__dict__.pop(name, None)
            if fd is not None:
                os.close(fd)
        self._sockets.cleanup()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
