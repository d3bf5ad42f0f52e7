"""How the demo looks: progress lines, short tables, and the facts kept for `--json`."""

from __future__ import annotations

import sys
import time
from typing import Any


class Show:
    """Prints as things happen. With `json`, everything for people goes to stderr and stdout is left for the result."""

    def __init__(self, json: bool) -> None:
        self._out = sys.stderr if json else sys.stdout
        self._begin = time.monotonic()
        self.facts: dict[str, Any] = {}
        self.checks: list[tuple[str, bool]] = []

    def line(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    def act(self, letter: str, title: str) -> None:
        self.line(f"\n({letter}) {title}")

    def step(self, text: str) -> None:
        """Something that takes a while begins."""
        self.line(f"    [{time.monotonic() - self._begin:5.0f} s] {text}")

    def table(self, head: list[str], rows: list[list[str]]) -> None:
        widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
        for row in [head, ["-" * w for w in widths], *rows]:
            self.line("    " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))))

    def check(self, what: str, good: bool) -> None:
        """One claim of the demo, and whether it held."""
        self.checks.append((what, good))
        self.line(f"    {'ok  ' if good else 'FAIL'} {what}")

    @property
    def good(self) -> bool:
        return all(good for _, good in self.checks)

    def seconds(self) -> float:
        return time.monotonic() - self._begin


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
