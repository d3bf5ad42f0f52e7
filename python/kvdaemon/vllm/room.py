"""Room in vLLM's block pool for those that wait with what they have loaded.

A request whose load is over holds its blocks until vLLM finds room for the rest of its prompt, and vLLM waits for the first of them. For
full attention it admits a load only if that leaves room for the rest of all others. Of sliding windows and recurrent states it counts too
little for requests that hold blocks already (0.32): loads may fill the pool until nobody can go on, and with nobody running that is
for good. So a load is put off where it would not leave that room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvdaemon.vllm.caches import Rule


class Room:
    """Counts what waits. Only for models with groups that are outgrown: in others vLLM counts right."""

    def __init__(self, rules: list[Rule], draft_tokens: int) -> None:
        self._rules, self._draft_tokens = rules, draft_tokens
        self._counts = any(rule.outgrown for rule in rules)
        self._waiting: dict[str, int] = {}
        """Requests that have loaded or do so, and the blocks that they need beyond to go on."""
        self._offered = 0
        """Tokens up to which the last request that fitted may load."""

    def _rest(self, tokens: int) -> int:
        """Most blocks that so many tokens beyond those that are there need: each group may begin one more, and keeps states of drafts."""
        return sum(-(-tokens // rule.block_tokens) + 2 + (self._draft_tokens if rule.kind == "state" else 0) for rule in self._rules)

    def _loaded(self, local: int, loaded: int) -> int:
        """Most blocks that a load beyond `local` tokens needs."""
        needs = 0
        for rule in self._rules:
            blocks = -(-loaded // rule.block_tokens)
            if rule.kind == "sliding_window":
                blocks = min(blocks, -(-rule.window // rule.block_tokens) + 1)
            elif rule.kind == "state":
                blocks = 1
            else:
                blocks -= local // rule.block_tokens
            needs += blocks
        return needs

    def fits(self, request: Request, local: int, loaded: int, pool: Any) -> bool:
        """Whether a request that has `local` tokens may load up to `loaded`. One that nobody else waits with always may: vLLM knows."""
        self._offered = loaded
        others = sum(self._waiting.values()) - self._waiting.get(request.request_id, 0)
        if not self._counts or not others or pool is None:
            return True
        needs = self._loaded(local, loaded) + self._rest(request.num_tokens - loaded)
        return bool(pool.get_num_free_blocks() >= needs + others)

    def loads(self, request: Request) -> None:
        """The request that was last asked about loads."""
        if self._counts:
            self._waiting[request.request_id] = self._rest(request.num_tokens - self._offered)

    def ran(self, names: list[str]) -> None:
        """These are running: vLLM takes blocks from others for them, if need be."""
        if self._waiting:
            for name in names:
                self._waiting.pop(name, None)

    def gone(self, name: str) -> None:
        self._waiting.pop(name, None)
