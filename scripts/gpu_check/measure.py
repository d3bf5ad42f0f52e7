"""Repeating, rows of results, the table they make, and the checksum's reference. Knows neither the driver nor the sections."""

from __future__ import annotations

import json
import random
import statistics
import time

CRC_CHECK = 0xAE8B14860A799888  # of b"123456789", by the CRC-64/NVME specification


def repeat(times: int, do) -> list:
    """One warm-up, then the seconds of each of `times` calls."""
    do()
    out = []
    for _ in range(times):
        begin = time.perf_counter()
        do()
        out.append(time.perf_counter() - begin)
    return out


def rates(nbytes: int, seconds: list) -> list:
    """GB/s, 1 GB = 1e9 bytes."""
    return [nbytes / s / 1e9 for s in seconds]


def send(**message) -> None:
    """From a section to the parent: one line of JSON."""
    print(json.dumps(message), flush=True)


def row(section: str, what: str, values=(), unit: str = "", limit: float = 0, ok=None, note: str = "", **keys) -> dict:
    """One measurement. `limit`: the most that this run could have. `ok`: were the bytes right; None where none are checked."""
    out = {"section": section, "what": what, "unit": unit, "ok": ok, "note": note, "n": len(values), **keys}
    if values:
        out.update(median=statistics.median(values), min=min(values), max=max(values))
        if limit:
            out["ratio"] = out["median"] / limit
    return out


def table(rows: list) -> str:
    """A Markdown table, aligned so that it reads well in a terminal."""
    cells = [["what", "median", "min to max", "unit", "of limit", "bytes", "note"]]
    for r in rows:
        some, right = "median" in r, {None: "", True: "right", False: "WRONG"}[r["ok"]]
        cells.append([
            r["what"],
            f"{r['median']:.4g}" if some else "",
            f"{r['min']:.4g} to {r['max']:.4g}" if some else "",
            r["unit"],
            f"{r['ratio']:.2f}" if "ratio" in r else "",
            right,
            r["note"],
        ])
    cells = [[c.replace("|", "/").replace("\n", " ") for c in line] for line in cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    cells.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells)


def crc_steps() -> list:
    steps = list(range(256))
    for _ in range(8):
        steps = [(c >> 1) ^ (0x9A6C9329AC4BC9B5 if c & 1 else 0) for c in steps]
    return steps


def crc64nvme_slow(data: bytes) -> int:
    """CRC-64/NVME by a table of bytes, to hold the fast one against."""
    crc, steps = (1 << 64) - 1, crc_steps()
    for b in data:
        crc = steps[(crc ^ b) & 0xFF] ^ (crc >> 8)
    return crc ^ (1 << 64) - 1


def native_crc():
    """The wheel's (function, ""), or (None, why not)."""
    try:
        from kvdaemon._native import crc64nvme
    except ModuleNotFoundError:
        return None, "wheel not given"
    except ImportError as e:
        return None, f"wheel does not load: {e}"
    sample = random.Random(7).randbytes(65_537)
    if crc64nvme(b"123456789") != CRC_CHECK or crc64nvme(memoryview(sample)[1:]) != crc64nvme_slow(sample[1:]):
        return None, "WRONG: the wheel's crc64nvme disagrees with the specification"
    return crc64nvme, ""
