"""Room in vLLM's block pool for those that wait with what they have loaded.

A request whose load is over holds its blocks until vLLM finds room for the rest of its prompt, and vLLM waits for the first of them. For
full attention it admits a load only if that leaves room for the rest of all others. Of sliding windows and recurrent states it counts too
little for requests that hold blocks already (0.32): loads may fill the pool until nobody can go on, and with nobody running that is
for good. So all that wait with loads must have room together, to the ends of their prompts; else a load is put off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvdaemon.vllm.caches import Rule


class Room:
    """Counts what waits. Only for models with groups that are outgrown: in others vLLM counts right."""

    def __init__(self, rules: list[Rule], step_tokens: int, draft_tokens: int) -> None:
        self._rules, self._step_tokens, self._draft_tokens = rules, step_tokens, draft_tokens
        self._counts = any(rule.outgrown for rule in rules)
        self._waiting: dict[str, tuple[int, int]] = {}
        """Requests that have loaded or do so: blocks of their own to the end of their prompts, and those that vLLM had in common for them."""
        self._offered = (0, 0)
        """The same of the request that was last asked about."""

    def _rest(self, tokens: int) -> int:
        """Most blocks that so many tokens beyond those that are there need; each group may begin one more. What is outgrown needs them
        for one step at a time, a state in two places and one for each draft."""
        needs = 0
        for rule in self._rules:
            if rule.kind == "state":
                needs += 3 + self._draft_tokens
            else:
                needs += -(-(min(tokens, self._step_tokens) if rule.outgrown else tokens) // rule.block_tokens) + 2
        return needs

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
        if not self._counts:
            return True
        common = sum(local // rule.block_tokens for rule in self._rules if not rule.outgrown)
        self._offered = (self._loaded(local, loaded) + self._rest(request.num_tokens - loaded), common)
        if not self._waiting or pool is None:
            return True
        all_of_them = [*self._waiting.values(), self._offered]
        needs = sum(own for own, _ in all_of_them) + max(common for _, common in all_of_them)
        return needs < int(pool.num_gpu_blocks)

    def loads(self, request: Request) -> None:
        """The request that was last asked about loads."""
        if self._counts:
            self._waiting[request.request_id] = self._offered

    def ran(self, names: list[str]) -> None:
        """These are running: vLLM takes blocks from others for them, if need be."""
        if self._waiting:
            for name in names:
                self._waiting.pop(name, None)

    def gone(self, name: str) -> None:
        self._waiting.pop(name, None)
