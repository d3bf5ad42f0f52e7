"""What the scheduler half reads of vLLM's lists, and what it does with others."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from kvdaemon import KvdError
from kvdaemon._native import SchedulerHalf

pytestmark = pytest.mark.plugin
FULL = ("full", 32, 0, False, 0)


def half(tmp_path: pathlib.Path, **changed: Any) -> SchedulerHalf:
    options: dict[str, Any] = {"world": 1, "groups": [FULL], "hash_tokens": 16} | changed
    return SchedulerHalf(tmp_path / "nobody.sock", bytes(16), "test", **options)


def test_hashes_as_vllm_has_them_are_taken(tmp_path: pathlib.Path) -> None:
    one = half(tmp_path)
    one.on_new_request("a", None, [bytes([at]) * 32 for at in range(4)], 2, False)
    one.on_new_request("short hashes", None, [bytes([at]) * 16 for at in range(4)], 2, False)
    one.on_new_request("no hashes", None, [], 0, False)
    one.on_new_request("no prefix caching", None, [], 2, True)
    assert one.refusal() is None
    one.finished("a", [], (), 64)
    one.close()


@pytest.mark.parametrize("hashes", [[b"h" * 32] * 3, ["h"] * 4, [b"h" * 33] * 4, None, 7], ids=["too few", "text", "too long", "none", "number"])
def test_another_form_of_hashes_is_refused_and_does_no_harm(tmp_path: pathlib.Path, hashes: Any) -> None:
    one = half(tmp_path)
    one.on_new_request("a", None, hashes, 2, False)
    assert "keeps its lists of blocks in another form" in str(one.refusal())
    assert one.step([], ["a"], [64], [], False) == ([], (b"", []), True)
    one.finished("a", hashes, ([1, 2],), 64)
    one.close()


@pytest.mark.parametrize("hash_tokens", [0, 24])
def test_blocks_are_multiples_of_what_a_hash_covers(tmp_path: pathlib.Path, hash_tokens: int) -> None:
    with pytest.raises(KvdError, match="multiples of the tokens that a hash covers"):
        half(tmp_path, hash_tokens=hash_tokens)
