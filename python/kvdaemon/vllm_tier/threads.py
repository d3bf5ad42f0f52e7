"""The threads that talk to the daemon: one that asks, and some that copy.

Whether the daemon answers is known here in one place (`alive`). While it does not, nothing waits for it: questions are answered with
no, jobs fail at once, and the asking thread alone goes on trying. What fails on these threads becomes an answer or a result.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import kvdaemon
from kvdaemon._calm import calm_threads
from kvdaemon.vllm_tier.line import Line, by_group, hashes
from kvdaemon.vllm_tier.lookups import Question

_WINDOW_BYTES = 64 << 20
_ASK_TIMEOUT_S = 1.0
_HEARTBEAT_S = 1.0
_FIRST_RETRY_S = 0.05
_KEPT = ("stored", "present", "filling")


@dataclass
class Job:
    """Chunks to be copied between rows of vLLM's CPU tier and the daemon."""

    number: int
    is_load: bool
    keys: list[bytes]
    rows: list[int]
    deadline: float
    """When it must have begun."""
    good: list[bytes] = field(default_factory=list)
    """Chunks of which the copy succeeded."""
    seconds: float = 0.0


class Threads:
    """Started by `start`, once the record is known."""

    def __init__(
        self,
        socket: str,
        label: str,
        timeout_s: float,
        count: int,
        rows: memoryview,
        row_bytes: int,
        answer: Callable[[list[tuple[Question, bool]]], None],
        notice: Callable[[bool, str], None],
    ) -> None:
        self._socket, self._label, self._timeout_s, self._count = socket, label, timeout_s, count
        self._rows, self._row_bytes = rows, row_bytes
        self._answer, self._notice = answer, notice
        self._record: dict[str, str] = {}
        self._changed = threading.Condition()
        self._questions: deque[list[Question]] = deque()
        self._loads: deque[Job] = deque()
        self._stores: deque[Job] = deque()
        self._busy = 0
        self._done: deque[Job] = deque()
        self._stopped = False
        self._turn = 0
        self._threads: list[threading.Thread] = []
        self.alive = False
        """The daemon answered when it was last asked."""
        self._asking_since = 0.0
        self._suspect = False

    # --- for the scheduler's thread ---------------------------------------------------------------------------------------

    def start(self, record: dict[str, str]) -> None:
        """Begins to serve the namespaces of this record; what another start said before is over."""
        with self._changed:
            self._record = record
            self._turn += 1
            if self._stopped or self._threads:
                self._changed.notify_all()
                return
            work = [("kvd-tier-ask", self._ask), *((f"kvd-tier-copy-{i}", self._copy) for i in range(self._count))]
            with calm_threads():
                for name, run in work:
                    one = threading.Thread(target=run, name=name, daemon=True)
                    self._threads.append(one)
                    one.start()

    def answers(self, now: float, deadline_s: float) -> bool:
        """Whether a question would be answered soon, as far as one can tell."""
        since = self._asking_since
        return self.alive and not (since and now - since >= deadline_s)

    def ask(self, questions: list[Question]) -> None:
        """The answers come through `answer`."""
        with self._changed:
            self._questions.append(questions)
            self._changed.notify_all()

    def submit(self, job: Job) -> None:
        """The job comes back through `finished`, in any case."""
        with self._changed:
            if self._stopped or not self.alive:
                self._done.append(job)
                return
            (self._loads if job.is_load else self._stores).append(job)
            self._changed.notify_all()

    def refuse(self, job: Job) -> None:
        """The job is over: nothing of it was done."""
        self._done.append(job)

    def finished(self) -> list[Job]:
        """Jobs that are over since the last call."""
        done = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def drain(self) -> None:
        """Until no row is being copied and no job waits. Those that had not begun fail."""
        with self._changed:
            self._cancel()
            self._changed.wait_for(lambda: not self._busy)

    def stop(self) -> None:
        """Ends the threads; each is done with what it does within its deadlines."""
        with self._changed:
            self._stopped = True
            self.alive = False
            self._cancel()
            self._changed.notify_all()
        for one in self._threads:
            one.join()

    def _cancel(self) -> None:
        for queue in (self._loads, self._stores):
            self._done.extend(queue)
            queue.clear()

    # --- the asking thread ------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        line: Line | None = None
        pause = 0.0
        said: str | None = None
        while (questions := self._next_questions(pause, line)) is not None:
            if line is not None and line.turn != self._turn:
                line.close()
                line = None
            found = [False] * len(questions)
            began = self._asking_since = time.monotonic()
            try:
                if line is None:
                    line = self._connect(_ASK_TIMEOUT_S)
                    line.space(0)
                if questions:
                    found = line.find([key for _, key in questions])
                else:
                    line.ping()
                pause, trouble = _HEARTBEAT_S, None
            except Exception as error:  # whatever it is: the engine must not notice
                trouble = str(error)
                pause = min(max(2 * pause, _FIRST_RETRY_S), _HEARTBEAT_S) if not self.alive else _FIRST_RETRY_S
                # A daemon that hangs may come back, and knows then what is going on in this session; one that is gone does not.
                if line is not None and time.monotonic() - began < 0.9 * _ASK_TIMEOUT_S:
                    line.close()
                    line = None
            self._asking_since = 0.0
            self._now_alive(trouble is None, gone=trouble is not None and line is None)
            if questions:
                self._answer(list(zip(questions, found)))
            said = self._say(said, trouble)
        if line is not None:
            line.close()

    def _next_questions(self, pause: float, line: Line | None) -> list[Question] | None:
        """All questions there are, after at most `pause` seconds; None: it is over."""
        with self._changed:
            stale = line is not None and line.turn != self._turn
            self._changed.wait_for(lambda: self._stopped or self._questions or (self._suspect and self.alive), 0 if stale else pause)
            if self._stopped:
                return None
            self._suspect = False
            questions = [one for batch in self._questions for one in batch]
            self._questions.clear()
            return questions

    def _now_alive(self, alive: bool, gone: bool) -> None:
        with self._changed:
            if self.alive != alive or gone:
                self.alive = alive and not self._stopped
                if gone:
                    self._turn += 1  # the other lines are dead, too: their arena is let go of
                if not alive:
                    self._cancel()
                self._changed.notify_all()

    def _say(self, said: str | None, trouble: str | None) -> str | None:
        """One line when things change."""
        if trouble is None and said != "":
            self._notice(False, f"attached to {self._socket}")
            return ""
        if trouble is not None and (said is None or said == ""):
            self._notice(True, f"nothing is loaded or stored for now, and the engine recomputes; daemon at {self._socket}: {trouble}")
            return trouble
        return said

    def _connect(self, timeout_s: float) -> Line:
        with self._changed:
            record, turn = self._record, self._turn
        return Line(self._socket, self._label, timeout_s, record, self._row_bytes, turn)

    # --- the copying threads ----------------------------------------------------------------------------------------------

    def _copy(self) -> None:
        line: Line | None = None
        while True:
            job = self._next_job(line)
            if line is not None and (job is None or line.turn != self._turn):
                line.close()
                line = None
            if job is None:
                if self._stopped:
                    return
                continue
            began = time.monotonic()
            try:
                line = line or self._connect(self._timeout_s)
                sound = self._work(job, line)
            except Exception as error:  # whatever it is: the job has failed, and the engine goes on
                sound = False
                if not isinstance(error, kvdaemon.KvdError):
                    self._notice(True, f"a {'load' if job.is_load else 'store'} failed: {type(error).__name__}: {error}")
                if line is not None:
                    line.close()
                    line = None
            job.seconds = time.monotonic() - began
            with self._changed:
                self._busy -= 1
                self._done.append(job)
                self._suspect |= not sound
                self._changed.notify_all()

    def _next_job(self, line: Line | None) -> Job | None:
        """The next job, loads first; None: the line is to be closed."""
        with self._changed:
            while True:
                if self._stopped or (line is not None and line.turn != self._turn):
                    return None
                queue = self._loads or self._stores
                if queue:
                    self._busy += 1
                    return queue.popleft()
                self._changed.wait()

    def _work(self, job: Job, line: Line) -> bool:
        """Copies, a window at a time; whether the daemon answered.

        Raises:
            KvdError: the session is over.
        """
        if time.monotonic() >= job.deadline:
            return True
        most = max(_WINDOW_BYTES // self._row_bytes, 1)
        for group, places in by_group(job.keys).items():
            space = line.space(group)
            for at in range(0, len(places), most):
                if self._stopped or not self.alive or line.turn != self._turn:
                    return True
                keys = [job.keys[i] for i in places[at : at + most]]
                rows = [self._row(job.rows[i]) for i in places[at : at + most]]
                words = (space.load if job.is_load else space.store)(hashes(keys), rows)
                job.good += [key for key, word in zip(keys, words) if word == "loaded" or word in _KEPT]
                if "failed:lost" in words:
                    raise kvdaemon.KvdError("the session is over")
                if "failed:timeout" in words:
                    return False
        return True

    def _row(self, number: int) -> memoryview:
        return self._rows[number * self._row_bytes : (number + 1) * self._row_bytes]
