"""Starts, asks and ends a kvd daemon of its own in a directory of its own. Standard library only: the demo uses it, too."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pathlib
import re
import signal
import subprocess
from typing import Any

from engine import wait_until

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def binary() -> pathlib.Path:
    """The daemon's program: KVD_BIN, or the release build of this tree."""
    return pathlib.Path(os.environ.get("KVD_BIN") or REPOSITORY / "target" / "release" / "kvd")


_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    """Runs in the child before its program: it gets SIGKILL when the starter is gone, however that happened."""
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Daemon:
    """One daemon. `kill` and `start` again on the same socket is a restart after a crash."""

    def __init__(self, where: pathlib.Path, capacity: str = "256MiB", program: pathlib.Path | None = None, *flags: str) -> None:
        self.where = where
        self.socket = where / "run" / "default" / "kvd.sock"
        self.log = where / "kvd.log"
        self.capacity, self.flags = capacity, flags
        self.program = program or binary()
        self.process: subprocess.Popen[bytes] | None = None
        self.http: str | None = None
        self.starts = 0

    def _env(self) -> dict[str, str]:
        """Nothing of the caller's configuration. (KVD_BIN and KVD_TEST_* are the tests' own; kvd refuses variables it does not know.)"""
        return {k: v for k, v in os.environ.items() if not k.startswith("KVD_")} | {
            "KVD_RUNTIME_DIR": str(self.where / "run"), "KVD_NVME": "off", "HOME": str(self.where)
        }

    def start(self, wait: bool = True) -> Daemon:
        assert self.process is None
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        os.chmod(self.socket.parent.parent, 0o700)
        command = [str(self.program), "serve", "--socket", str(self.socket), "--host-capacity", self.capacity, "--http", "127.0.0.1:0", *self.flags]
        if self.starts == 0:  # nobody can have a former daemon's arena
            command += ["--adopt-grace", "1ms"]
        begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._env(), start_new_session=True, preexec_fn=_die_with_parent
            )
        self.starts += 1
        if wait:
            line = wait_until("the daemon is ready", lambda: self._ready_line(begin), 20.0)
            found = re.search(r"http=(\S+)", line)
            self.http = found.group(1) if found else None
        return self

    def _ready_line(self, begin: int) -> str | None:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"the daemon ended with {self.process.returncode}:\n{self.tail()}")
        with self.log.open("rb") as f:
            f.seek(begin)
            for line in f.read().decode(errors="replace").splitlines():
                if re.search(r"\bready\b.*socket=", line):
                    return line
        return None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def pause(self) -> None:
        """SIGSTOP, and until the kernel says it stands still."""
        self.signal(signal.SIGSTOP)
        wait_until("the daemon is stopped", lambda: self._state() in "Tt", 5.0)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def _state(self) -> str:
        text = pathlib.Path(f"/proc/{self.pid}/stat").read_text()
        return text[text.rindex(")") + 2]

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> int:
        """SIGTERM; gives the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(20.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self.process = None

    def close(self) -> None:
        self.kill()

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    # What it says ---------------------------------------------------------------------------------------------
    def run(self, *args: str) -> str:
        done = subprocess.run([str(self.program), *args, "--socket", str(self.socket)], capture_output=True, text=True, timeout=20, env=self._env())
        if done.returncode != 0:
            raise RuntimeError(f"kvd {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout

    def whole_status(self) -> dict[str, Any]:
        """All of `kvd status --json`."""
        whole: dict[str, Any] = json.loads(self.run("status", "--json"))
        return whole

    def status(self) -> dict[str, Any]:
        """The default tenant's part of `kvd status --json`."""
        return self.whole_status()["tenants"][0]

    def resident(self) -> int:
        """Blocks that can be loaded."""
        return int(self.status()["tiers"]["host"]["slots"]["resident"])

    def no_store_is_open(self) -> bool:
        """Every store that was begun is visible, or was given up."""
        slots = self.status()["tiers"]["host"]["slots"]
        return int(slots["reserved"]) + int(slots["filling"]) == 0

    def counts(self) -> dict[str, int]:
        return {k: int(v) for k, v in self.status().get("counts", {}).items()}

    def memory(self, *engines: int) -> int:
        """Bytes of memory in this daemon's arenas and in those that the given processes keep open, each counted once."""
        files: dict[tuple[int, int], int] = {}
        for pid in (self.pid, *engines):
            for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir():
                try:
                    if "memfd:" in os.readlink(fd):
                        found = os.stat(fd)
                        files[found.st_dev, found.st_ino] = found.st_blocks * 512
                except OSError:
                    continue
        return sum(files.values())

    # Damage -----------------------------------------------------------------------------------------------------
    def arena(self) -> pathlib.Path:
        """The arena's memfd, by its size: the generation table is much smaller in use, and sealed against writing."""
        best, size = None, 0
        for fd in sorted(pathlib.Path(f"/proc/{self.pid}/fd").iterdir()):
            try:
                if "memfd:" in os.readlink(fd) and "gen" not in os.readlink(fd) and os.stat(fd).st_size > size:
                    best, size = fd, os.stat(fd).st_size
            except OSError:
                continue
        if best is None:
            raise RuntimeError("the daemon has no arena")
        return best

    def flip_byte(self, skip: int = 0) -> int:
        """Flips one byte of stored data: in the middle of the page of the arena with data that comes after `skip` others. Gives its offset."""
        with self.arena().open("r+b", buffering=0) as f:
            offset, seen = 0, 0
            while True:
                try:
                    offset = os.lseek(f.fileno(), offset, os.SEEK_DATA)
                except OSError as error:
                    raise RuntimeError("the arena holds no data") from error
                offset -= offset % 4096
                page = os.pread(f.fileno(), 4096, offset)
                if any(page):
                    if seen == skip:
                        where = offset + 2048
                        with mmap.mmap(f.fileno(), 0) as memory:  # a file of huge pages can't be written to
                            memory[where] ^= 0x40
                        return where
                    seen += 1
                offset += 4096

    def punch_hole(self, offset: int, length: int) -> None:
        """What a rogue client could do: the bytes are gone, and read as zero."""
        with self.arena().open("r+b", buffering=0) as f:
            keep_size_and_punch = 0x01 | 0x02
            if _libc.fallocate(f.fileno(), keep_size_and_punch, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
                raise OSError(ctypes.get_errno(), "fallocate")

    def __enter__(self) -> Daemon:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()
