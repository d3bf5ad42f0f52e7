"""Which chunks does the daemon have? Questions and answers as the scheduler's thread sees them; it never waits.

Questions of a step are sent together when the step ends. Until an answer is there the scheduler is told to ask again, and after the
deadline that the chunk is missing. An answer holds as long as a request that asked lives, so that a chunk that could not be loaded
is not tried again and again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

Question = tuple[int, bytes]
"""Serial number, and vLLM's key of a chunk."""


class _State:
    __slots__ = ("serial", "since", "found", "requests")

    def __init__(self, serial: int, since: float) -> None:
        self.serial, self.since = serial, since
        self.found: bool | None = None
        self.requests: set[str] = set()


class Lookups:
    """Called under vLLM's lock of its tiers; other threads call `answer` only."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._states: dict[bytes, _State] = {}
        self._by_request: dict[str, set[bytes]] = {}
        self._unsent: list[Question] = []
        self._serial = 0
        self._answers: deque[list[tuple[Question, bool]]] = deque()

    def answer(self, answers: list[tuple[Question, bool]]) -> None:
        """Takes what the daemon said. From any thread."""
        self._answers.append(answers)

    def find(self, key: bytes, request: str, now: float, may_ask: bool) -> bool | None:
        """Whether the chunk is there; None: ask again. Without `may_ask` what is not known is not there."""
        self._take_answers()
        state = self._states.get(key)
        if state is None:
            if not may_ask:
                return False
            self._serial += 1
            state = self._states[key] = _State(self._serial, now)
            self._unsent.append((state.serial, key))
        state.requests.add(request)
        self._by_request.setdefault(request, set()).add(key)
        if state.found is not None:
            return state.found
        return False if now - state.since >= self._deadline_s else None

    def send(self, post: Callable[[list[Question]], None]) -> None:
        """The step is over: its questions go out."""
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            post([one for one in unsent if self._is_open(one)])

    def _is_open(self, question: Question) -> bool:
        state = self._states.get(question[1])
        return state is not None and state.serial == question[0]

    def missing(self, keys: Iterable[bytes]) -> None:
        """These could not be loaded."""
        for key in keys:
            if (state := self._states.get(key)) is not None:
                state.found = False
                state.serial = 0  # whatever is on its way is of before

    def finished(self, request: str) -> None:
        """Nobody asks for this request any more."""
        for key in self._by_request.pop(request, ()):
            state = self._states.get(key)
            if state is not None:
                state.requests.discard(request)
                if not state.requests:
                    del self._states[key]

    def forget(self) -> None:
        """All answers are of before."""
        self._states.clear()
        self._by_request.clear()
        self._unsent.clear()

    def _take_answers(self) -> None:
        while self._answers:
            for question, found in self._answers.popleft():
                if self._is_open(question):
                    self._states[question[1]].found = found
