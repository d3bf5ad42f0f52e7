"""Six acts with a real vLLM: what one engine process computed, others reuse, through a daemon that may break.

Engines are real vLLM engines on the CPU with a random model, so answers are nonsense, but the same nonsense every time: an answer that used
kvd is held, tokens and logprobs bit by bit, against vLLM's own prefix hit of the same length. One helper process imports vLLM and forks
engines, which saves ten seconds each. Only processes started here are ended here, and always.
Drivers are shared with tests/vllm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "vllm")]

import models  # noqa: E402
from daemon import Daemon  # noqa: E402
from engine import Answer, Engine, Nursery, patient, wait_until  # noqa: E402
from show import Show, seconds  # noqa: E402

BLOCK = 32
VOCABULARY = 2048


@dataclasses.dataclass(frozen=True)
class Size:
    layers: int
    prompts: int
    tokens: int
    answer: int
    capacity: str
    nvme: str


FULL = Size(layers=12, prompts=3, tokens=1600 + 7, answer=60, capacity="1GiB", nvme="2GiB")
SHORT = Size(layers=4, prompts=2, tokens=640 + 7, answer=32, capacity="256MiB", nvme="512MiB")


# So that a prefix hit, a cold run and one that was cut short choose the same tokens: with bfloat16 two can come so close that rounding decides.
DTYPE = "float32"


class Demo:
    def __init__(self, size: Size, show: Show, kvd: pathlib.Path, where: pathlib.Path) -> None:
        self.size, self.show, self.where = size, show, where
        self.daemon = Daemon(where, size.capacity, kvd, "--nvme", str(where / "nvme"), "--nvme-capacity", size.nvme)
        self.nursery = Nursery(where / "nursery.log")
        self.engines: list[Engine] = []
        self.prompts = [models.prompt(i, size.tokens, VOCABULARY) for i in range(size.prompts)]
        self.hit_tokens = (size.tokens - 1) // BLOCK * BLOCK
        self.local: list[Answer] = []

    def close(self) -> None:
        for one in [*self.engines, self.nursery, self.daemon]:
            try:
                one.close()
            except Exception as error:  # go on: leave nothing behind
                self.show.line(f"    cleaning up: {error}")

    def explain(self) -> None:
        """The ends of the logs, before they are removed."""
        logs = [("daemon", self.daemon.tail(15)), *((one.log.stem, one.tail(15)) for one in self.engines)]
        for name, text in logs:
            self.show.line(f"\n--- {name}\n{text}")

    # Engines ------------------------------------------------------------------------------------------------------
    def engine(self, name: str, with_kvd: bool) -> Engine:
        self.show.step(f"starting engine {name}")
        one = Engine(
            self.model, self.where / f"engine-{name}.log", nursery=self.nursery, connector=patient(self.daemon.socket) if with_kvd else None,
            dtype=DTYPE, block_size=BLOCK, max_model_len=8192, max_num_batched_tokens=8192, kv_cache_memory_bytes=512 << 20,
        )
        self.engines.append(one)
        self.warm_up(one, with_kvd)
        return one

    def warm_up(self, one: Engine, with_kvd: bool) -> None:
        """First use of every kernel, and with kvd until the engine has registered: its weights are hashed in the background."""
        turn = 0

        def registered() -> bool:
            nonlocal turn
            turn += 1
            before = self.daemon.resident() if with_kvd else 0
            one.ask(models.prompt(10_000 + len(self.engines) * 1000 + turn, 70, VOCABULARY), max_tokens=2)
            return not with_kvd or self.daemon.resident() > before

        wait_until("the engine stores", registered, 120.0, every_s=0.2)

    def ask(self, one: Engine, prompt: list[int], tokens: int = 8) -> tuple[Answer, int]:
        batch = one.batch([prompt], max_tokens=tokens)
        return batch.answers[0], batch.external

    def ask_all(self, one: Engine) -> list[tuple[Answer, int]]:
        """All prompts, one after the other, each with a line of progress."""
        out = []
        for i, prompt in enumerate(self.prompts):
            out.append(self.ask(one, prompt))
            self.show.step(f"prompt {i + 1} of {len(self.prompts)}: first token after {seconds(out[-1][0].ttft_s)}")
        return out

    def stored(self, blocks: int) -> None:
        wait_until(f"{blocks} blocks are stored", lambda: self.daemon.resident() >= blocks, 60.0)

    def end(self, one: Engine) -> None:
        one.exit()
        self.engines.remove(one)

    # Acts ---------------------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        s = self.size
        self.show.line(f"kvd demo: {s.prompts} prompts of {s.tokens} tokens, {s.layers} layers, {DTYPE}, on {os.cpu_count()} CPU cores")
        self.show.step("making a random Llama-like model")
        self.model = models.make(models.demo(s.layers), self.where / "models")
        self.show.step("starting the daemon")
        self.daemon.start()

    def act_a(self) -> None:
        show, n = self.show, self.size.prompts
        show.act("a", "engine A computes long prompts and exits; engine B, a new process, reuses them")
        plain = self.engine("without kvd", False)
        show.step(f"computing {n} prompts without kvd")
        alone = [answer for answer, _ in self.ask_all(plain)]
        show.step("the same again: vLLM's own prefix hits")
        self.local = [answer for answer, _ in self.ask_all(plain)]
        self.end(plain)
        first = self.engine("A", True)
        before = self.daemon.resident()
        show.step(f"computing {n} prompts in A")
        cold = self.ask_all(first)
        self.stored(before + n * ((self.size.tokens + 7) // BLOCK))
        self.end(first)
        show.step("A has exited")
        self.b = self.engine("B", True)
        show.step("asking B for the same prompts")
        warm = self.ask_all(self.b)
        rows = []
        for name, answers, external in (
            ("without kvd", alone, [0] * n), ("vLLM's own prefix hit", self.local, [0] * n), ("kvd, cold (A)", *zip(*cold)), ("kvd, warm (B)", *zip(*warm)),
        ):
            ttft = [a.ttft_s for a in answers]
            rows.append([name, seconds(statistics.median(ttft)), str(sum(external)), f"{n * self.size.tokens}"])
            show.facts.setdefault("ttft_s", {})[name] = ttft
            show.facts.setdefault("tokens_from_kvd", {})[name] = sum(external)
        show.table(["", "TTFT (median)", "tokens from kvd", "prompt tokens"], rows)
        show.check(f"B took {self.hit_tokens} of {self.size.tokens} tokens of each prompt from kvd", all(e == self.hit_tokens for _, e in warm))
        show.check("B's tokens and logprobs are bit-equal to vLLM's own prefix hit", all(a.bits == l.bits for (a, _), l in zip(warm, self.local)))
        show.check("cold answers with kvd are bit-equal to those without", all(a.bits == l.bits for (a, _), l in zip(cold, alone)))

    def act_b(self) -> None:
        show = self.show
        show.act("b", "two engines alive at once share")
        self.c = self.engine("C", True)
        prompt = models.prompt(77, self.size.tokens, VOCABULARY)
        before = self.daemon.resident()
        show.step("B computes a new prompt and its answer")
        answer, _ = self.ask(self.b, prompt, 40)
        self.stored(before + (len(prompt) + 39) // BLOCK)
        turn = prompt + answer.tokens + models.prompt(78, 20, VOCABULARY)
        reply, external = self.ask(self.c, turn)
        want = (len(prompt) + 39) // BLOCK * BLOCK
        rows = [["B", "first turn", seconds(answer.ttft_s), "0"], ["C", "second turn", seconds(reply.ttft_s), str(external)]]
        show.table(["engine", "what", "TTFT", "tokens from kvd"], rows)
        show.check(f"C took the prompt and B's answer to it from kvd ({want} tokens)", external == want)
        self.end(self.c)

    def act_c(self) -> None:
        show = self.show
        show.act("c", "the daemon is killed with -9 in mid-answer")
        prompt = self.prompts[0]
        show.step(f"B gives the whole answer once, undisturbed ({self.size.answer} tokens)")
        right = self.ask(self.b, prompt, self.size.answer)[0]
        self.b.reset_local()
        self.b.begin([prompt], max_tokens=self.size.answer, progress=True)
        self.b.wait_tokens(self.size.answer // 4)
        self.daemon.kill()
        show.step(f"killed after {self.size.answer // 4} of {self.size.answer} tokens")
        answer = self.b.finish().answers[0]
        show.check("the answer went on, and its tokens are right", answer.tokens == right.tokens)
        self.b.reset_local()
        without, external = self.ask(self.b, prompt)
        show.check("without a daemon the engine computes by itself", external == 0 and without.tokens == right.tokens[:8])
        self.daemon.start()
        show.step("the daemon is back, its host memory empty, its store on disk not; the engine was not restarted")
        turns = 0

        def resumed() -> bool:
            nonlocal turns
            turns += 1
            self.b.reset_local()
            return self.ask(self.b, prompt)[1] == self.hit_tokens

        wait_until("reuse resumes", resumed, 120.0, every_s=0.1)
        show.check(f"reuse resumed by itself, at request {turns} after the return", True)
        show.facts["requests_until_reuse"] = turns

    def act_d(self) -> None:
        show = self.show
        show.act("d", "one byte of a stored block is flipped")
        prompt = self.prompts[0]
        self.b.reset_local()
        before, caught, external, right = self.failures(), 0, 0, True
        for slot in range(32):  # the arena may hold others' blocks in front: go on until one of this prompt's is hit
            where = self.daemon.flip_byte(skip=5 + slot * 64)
            show.step(f"flipped one bit at byte {where} of the arena")
            answer, external = self.ask(self.b, prompt)
            right = right and answer.tokens == self.local[0].tokens
            caught = self.failures() - before
            if caught:
                break
            self.b.reset_local()
        show.check("the answer's tokens are right", right)
        show.check(f"the checksum caught it ({caught} failed, counted apart from hits and misses); what it covered was computed again", caught > 0)
        show.facts["flipped"] = {"failed": caught, "external": external}

        def healed() -> bool:
            self.b.reset_local()
            return self.ask(self.b, prompt)[1] == self.hit_tokens

        wait_until("the block is there again", healed, 60.0, every_s=0.1)
        show.check("the block is there again, and loads", True)

    def failures(self) -> int:
        return sum(v for k, v in self.daemon.counts().items() if "crc" in k or "corrupt" in k)

    def act_e(self) -> None:
        show, n = self.show, self.size.prompts
        show.act("e", "everything is killed and started again; a new engine reuses what is on disk")
        wait_until("all that was stored is on disk", self.all_below, 60.0)
        self.b.kill()
        self.daemon.kill()
        self.daemon.start()
        store = self.daemon.whole_status()["stores"][0]
        show.step(f"the daemon is back: {store['recovered']} blocks found on disk in {store['open_s'] * 1000:.0f} ms")
        last = self.engine("D", True)
        show.step("asking D for the first prompts")
        warm = self.ask_all(last)
        rows = [["kvd, from disk (D)", seconds(statistics.median(a.ttft_s for a, _ in warm)), str(sum(e for _, e in warm)), f"{n * self.size.tokens}"]]
        show.table(["", "TTFT (median)", "tokens from kvd", "prompt tokens"], rows)
        show.facts["ttft_s"]["kvd, from disk (D)"] = [a.ttft_s for a, _ in warm]
        show.check(f"D took {self.hit_tokens} of {self.size.tokens} tokens of each prompt from disk", all(e == self.hit_tokens for _, e in warm))
        show.check("D's tokens and logprobs are bit-equal to vLLM's own prefix hit", all(a.bits == l.bits for (a, _), l in zip(warm, self.local)))

    def all_below(self) -> bool:
        tier = self.daemon.whole_status()["tier"]["counts"]
        return tier["offloaded"] + tier["recovered"] >= self.daemon.resident()

    def act_f(self) -> None:
        self.show.act("f", "kvd status")
        for line in self.daemon.run("status").splitlines():
            self.show.line("    " + line)
        self.show.facts["status"] = self.daemon.status()

    def play(self) -> None:
        self.prepare()
        for act in (self.act_a, self.act_b, self.act_c, self.act_d, self.act_e, self.act_f):
            act()


def result(show: Show) -> dict[str, Any]:
    return {"ok": show.good, "checks": [{"what": w, "ok": g} for w, g in show.checks], "seconds": round(show.seconds(), 1)} | show.facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvd", type=pathlib.Path, default=HERE.parent / "target" / "release" / "kvd", help="the daemon's program")
    parser.add_argument("--short", action="store_true", help="smaller model and prompts; what `make test` runs")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout, progress on stderr")
    args = parser.parse_args()
    show = Show(args.json)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    scratch = tempfile.TemporaryDirectory(prefix="kvd-demo-", ignore_cleanup_errors=True)
    demo: Demo | None = None
    try:
        demo = Demo(SHORT if args.short else FULL, show, args.kvd.resolve(), pathlib.Path(scratch.name))
        demo.play()
    except (KeyboardInterrupt, SystemExit):
        show.line("\ninterrupted")
        return 1
    except (subprocess.SubprocessError, RuntimeError, TimeoutError, OSError) as error:
        show.check(f"the demo came to its end: {type(error).__name__}: {error}", False)
        if demo is not None:
            demo.explain()
    finally:
        if demo is not None:
            demo.close()
        scratch.cleanup()
    show.line(f"\n{sum(g for _, g in show.checks)} of {len(show.checks)} claims held, {show.seconds():.0f} s")
    if args.json:
        print(json.dumps(result(show), indent=1))
    return 0 if show.good else 1


if __name__ == "__main__":
    sys.exit(main())
