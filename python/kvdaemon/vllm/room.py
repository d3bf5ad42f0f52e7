"""Room in vLLM's block pool for those that wait with what they have loaded.

A request whose load is over holds its blocks until vLLM finds room for the rest of its prompt, and vLLM waits for the first of them. For
full attention it admits a load only if that leaves room for the rest of all others. Of sliding windows and recurrent states it counts too
little for requests that hold blocks already (0.32): loads may fill the pool until nobody can go on, and with nobody running that is
for good. So all that wait with loads must have room together, to the ends of their prompts; else a load is put off.

And vLLM (0.31 to 0.33) wants room for a step's drafts beside a load, which a prompt that is computed may do without: a load that leaves none
in an empty pool would be asked for again and again, with all others behind. Such a hit is none. Nor is one that vLLM does not take for
long in a pool that is all free, whatever the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from kvdaemon.vllm.caches import Rule


UNTAKEN_S = 10.0
"""How long a hit is offered to an engine that has its whole pool free. Another connector beside ours, or one for what encoders make, may have
vLLM ask again for a while."""


@dataclass
class Waits:
    """A request that has loaded, or does so."""

    own: int
    """Blocks of its own, to the end of its prompt."""
    common: list[bytes]
    """Hashes of the blocks of full attention that vLLM had for it: others may have the same."""
    end: int
    """Tokens of its prompt."""


class Room:
    """Counts what waits. Only for models with groups that are outgrown: in others vLLM counts right."""

    def __init__(self, rules: list[Rule], hash_tokens: int, step_tokens: int, draft_tokens: int, ahead_tokens: int = 0) -> None:
        """`rules`: one for each of vLLM's groups. `step_tokens`: most tokens that are computed at a time, in all steps under way.
        `ahead_tokens`: how far beyond its step a draft model writes."""
        self._rules, self._step_tokens, self._draft_tokens = rules, step_tokens, draft_tokens
        self._counts = any(rule.outgrown for rule in rules)
        drafts = 1 + draft_tokens + ahead_tokens if draft_tokens else 0
        # So many in every group, from 0.32 on; before, once.
        self._beside_load = -(-drafts // max(rule.block_tokens for rule in rules))
        whole = [rule.block_tokens for rule in rules if not rule.outgrown]
        self._ratio = max(whole, default=hash_tokens) // hash_tokens
        self._hash_tokens = hash_tokens
        self._at_each_hash = sum(max(whole) // one for one in whole)
        self._waiting: dict[str, Waits] = {}
        self._own = 0
        self._common: dict[bytes, int] = {}
        """How many of those that wait have this block in common."""
        self._offered = Waits(0, [], 0)
        """Of the request that last fitted."""
        self._untaken = ("", 0.0)
        """The request that was offered a hit, and since when nothing has been taken since, in a pool that was all free."""
        self.full = False
        """A load was put off in this step. Those behind it are not asked about: else they would overtake it, step by step."""

    def _rest(self, tokens: int) -> int:
        """Most blocks that so many tokens beyond those that are there need; each group may begin one more. What is outgrown needs them
        for what is computed at a time, a state in two places and one for each draft."""
        needs = 0
        for rule in self._rules:
            if rule.offered:
                needs += 3 + self._draft_tokens
            else:
                window = rule.kind == "sliding_window"
                needs += -(-(min(tokens, self._step_tokens) if window else tokens) // rule.block_tokens) + 2
                needs += self._draft_tokens if rule.kind == "state" else 0
        return needs

    def _loaded(self, local: int, loaded: int) -> int:
        """Most blocks that a load beyond `local` tokens needs."""
        needs = 0
        for rule in self._rules:
            blocks = -(-loaded // rule.block_tokens)
            if rule.kind == "sliding_window":
                blocks -= max(0, loaded - rule.window + 1) // rule.block_tokens
            elif rule.kind == "state":
                blocks = 1
            else:
                blocks -= local // rule.block_tokens
            needs += blocks
        return needs

    def never(self, name: str, loaded: int, pool: Any) -> bool:
        """Whether vLLM will not take a hit of so many tokens that this request is offered, though nobody else had a block."""
        # Of a state vLLM may want more than is counted, and of drafts. One block of the pool is nobody's.
        if pool is not None and self._loaded(0, loaded) + self._beside_load >= int(pool.num_gpu_blocks):
            return True
        if pool is None or pool.get_usage():
            self.taken()
            return False
        if self._untaken[0] != name:
            self._untaken = (name, monotonic())
        return monotonic() - self._untaken[1] > UNTAKEN_S

    def taken(self) -> None:
        """vLLM has blocks for somebody, or may have."""
        self._untaken = ("", 0.0)

    def fits(self, request: Request, local: int, loaded: int, pool: Any) -> bool:
        """Whether a request that has `local` tokens may load up to `loaded`. One that nobody else waits with always may: vLLM knows."""
        if not self._counts:
            return True
        if self.full:
            return False
        self._waits_no_more(request.request_id)
        own = self._loaded(local, loaded) + self._rest(request.num_tokens - loaded)
        common = request.block_hashes[self._ratio - 1 : local // self._hash_tokens : self._ratio]
        self._offered = Waits(own, common, request.num_tokens)
        if not self._waiting or pool is None:
            return True
        blocks = len(self._common) + sum(one not in self._common for one in common)
        self.full = self._own + own + blocks * self._at_each_hash >= int(pool.num_gpu_blocks)
        return not self.full

    def loads(self, request: Request) -> None:
        """The request that was last asked about loads."""
        if self._counts:
            one = self._waiting[request.request_id] = self._offered
            self._own += one.own
            for hash in one.common:
                self._common[hash] = self._common.get(hash, 0) + 1

    def step(self, output: SchedulerOutput) -> None:
        """A step begins. What runs to the end of its prompt waits no more, nor what has lost its blocks."""
        self.full = False
        if self._waiting:
            cached = output.scheduled_cached_reqs
            computed = {one.req_id: one.num_computed_tokens for one in output.scheduled_new_reqs}
            computed.update(zip(cached.req_ids, cached.num_computed_tokens))
            for name, before in computed.items():
                waits = self._waiting.get(name)
                if waits is not None and before + output.num_scheduled_tokens.get(name, 0) >= waits.end:
                    self._waits_no_more(name)
            for name in output.preempted_req_ids or ():
                self._waits_no_more(name)

    def gone(self, name: str) -> None:
        """The request is over."""
        if name == self._untaken[0]:
            self.taken()
        self._waits_no_more(name)

    def _waits_no_more(self, name: str) -> None:
        one = self._waiting.pop(name, None)
        if one is None:
            return
        self._own -= one.own
        for hash in one.common:
            self._common[hash] -= 1
            if not self._common[hash]:
                del self._common[hash]
