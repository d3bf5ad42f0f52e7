"""The parent's side: runs sections in processes of their own, collects what they send, and writes it down."""

from __future__ import annotations

import json
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time

from .copying import PIECES
from .driver import NoGpu
from .host import size_name
from .measure import table
from .registering import LAUNCHER

STOPPED = -1000  # no exit status: a child that the kernel killed has -9


class Report:
    def __init__(self) -> None:
        self.begin, self.facts, self.rows, self.problems, self.notes, self.set = time.monotonic(), {}, [], [], [], {}

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def say(self, text: str) -> None:
        print(f"[gpu-check {self.elapsed():5.1f} s] {text}", flush=True)

    def take(self, message: dict) -> None:
        self.facts.update(message.get("facts", {}))
        self.set.update(message.get("set", {}))
        if r := message.get("row"):
            self.rows.append(r)
            self.say(f"{r['section']}: {r['what']}: " + (f"{r['median']:.4g} {r['unit']}" if "median" in r else r["note"]))
            if r["ok"] is False:
                self.problems.append(f"{r['section']}: {r['what']}: wrong. {r['note']}".strip())

    def section(self, name: str, config: dict, seconds: float) -> int:
        """Runs one section; its exit status, STOPPED when it had to be killed."""
        order = json.dumps({**config, **self.set, "section": name})
        child = subprocess.Popen([sys.executable, LAUNCHER, "--child", order], stdout=subprocess.PIPE, text=True)
        lines: queue.Queue = queue.Queue()

        def read() -> None:
            for line in child.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        end, last, code = time.monotonic() + seconds, "nothing", STOPPED
        try:
            while (line := lines.get(timeout=max(0.01, end - time.monotonic()))) is not None:
                if not line.startswith("{"):
                    continue
                message = json.loads(line)
                if "no_gpu" in message:
                    raise NoGpu(message["no_gpu"])
                self.take(message)
                last = message.get("row", {}).get("what", last)
            code = child.wait(timeout=10)
        except (queue.Empty, subprocess.TimeoutExpired):
            self.problems.append(f"section {name} hung for {seconds:.0f} s; the last it said was: {last}")
        finally:
            child.kill()
        if code not in (0, STOPPED):
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
            self.problems.append(f"section {name} died {how}; the last it said was: {last}")
        return code

    def all(self, **want) -> list:
        """Rows with a median and these keys."""
        return [r for r in self.rows if "median" in r and all(r.get(k) == v for k, v in want.items())]

    def registration_answers(self, kinds: list) -> list:
        out = []
        for kind in kinds:
            tried = [r for r in self.rows if r.get("kind") == kind and r.get("step") == "register"]
            times = [f"{size_name(r['region'])} regions {'prefaulted' if r['prefault'] else 'untouched'} {r['median']:.4g}"
                     for r in tried if "median" in r and r["flags"] == "default"]
            if times:
                out.append(f"{kind} memfd registers: yes, ms/GiB: " + ", ".join(times))
            elif tried:
                out.append(f"{kind} memfd registers: no, {tried[0]['note']}")
        return out + [f"{r['what']}: {r['note']}" for r in self.rows if r["section"] == "behaviour"]

    def answers(self, kinds: list) -> list:
        """The open questions, each answered from the rows in a line."""
        out = self.registration_answers(kinds)
        for d in ("H2D", "D2H"):
            for r in self.all(section="copies", direction=d, method="peak"):
                out.append(f"{d} peak, {r['kind']}: {r['median']:.4g} GB/s")
            for piece in PIECES:
                plain = self.all(piece=piece, direction=d, method="plain calls")
                batched = self.all(section="batch", piece=piece, direction=d)
                if plain:
                    text = f"{d} {size_name(piece)}: plain calls {plain[0]['median']:.4g} GB/s ({plain[0]['ratio']:.2f} of peak)"
                    if batched:
                        best = max(batched, key=lambda r: r["median"])
                        how = f"{best['ratio']:.2f}; {best['method']}, {best['kind']}"
                        text += f"; batched at best {best['median']:.4g} GB/s ({how})"
                    out.append(text)
        for r in self.all(section="crc", method="crc64nvme"):
            out.append(f"{r['what']}: {r['median']:.4g} GB/s ({r['ratio']:.2f} of a core's read)")
        return out

    def show(self, sections: list, kinds: list) -> None:
        print("\n## Machine\n")
        print("\n".join(f"- {k}: {v}" for k, v in self.facts.items()))
        for name in sections:
            if mine := [r for r in self.rows if r["section"] == name]:
                print(f"\n## {name}\n\n{table(mine)}")
        for title, lines in (("Notes", self.notes), ("Answers", self.answers(kinds)), ("Problems", self.problems)):
            if lines:
                print(f"\n## {title}\n\n" + "\n".join(f"- {x}" for x in lines))

    def write(self, path: str, kinds: list) -> None:
        content = {"version": 1, "facts": self.facts, "notes": self.notes, "rows": self.rows, "answers": self.answers(kinds),
                   "problems": self.problems, "seconds": round(self.elapsed(), 1)}
        pathlib.Path(path).write_text(json.dumps(content, indent=1) + "\n")
