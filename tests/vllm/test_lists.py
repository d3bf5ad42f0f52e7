"""What the scheduler half reads of vLLM's lists, and what it does with others."""

from __future__ import annotations

import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from checks import planned

from kvdaemon import KvdError
from kvdaemon._native import SchedulerHalf

pytestmark = pytest.mark.plugin
FULL = ("full", 32, 0, False, 0)


def half(tmp_path: pathlib.Path, **changed: Any) -> SchedulerHalf:
    options: dict[str, Any] = {"world": 1, "groups": [FULL], "hash_tokens": 16} | changed
    return SchedulerHalf(tmp_path / "nobody.sock", bytes(16), "test", **options)


def request(hashes: Any, tokens: int = 65) -> SimpleNamespace:
    return SimpleNamespace(block_hashes=hashes, num_tokens=tokens, num_computed_tokens=tokens)


def test_hashes_as_vllm_has_them_are_taken(tmp_path: pathlib.Path) -> None:
    one = half(tmp_path)
    one.on_new_request("a", request([bytes([at]) * 32 for at in range(4)]), None, True)
    one.on_new_request("short hashes", request([bytes([at]) * 16 for at in range(4)]), None, True)
    one.on_new_request("no hashes", request([]), None, True)
    one.on_new_request("more hashes than tokens", request([bytes(32)] * 4, 20), None, True)
    one.on_new_request("no prefix caching", request([]), None, False)
    assert one.refusal() is None
    one.finished("a", request([]), ())
    one.close()


@pytest.mark.parametrize("hashes", [["h"] * 4, [b"h" * 33] * 4, None, 7], ids=["text", "too long", "none", "number"])
def test_another_form_of_hashes_is_refused_and_does_no_harm(tmp_path: pathlib.Path, hashes: Any) -> None:
    one = half(tmp_path)
    one.on_new_request("a", request(hashes), None, True)
    assert "keeps its lists of blocks in another form" in str(one.refusal())
    assert one.step(planned({"a": 64}), {}, None, [], None, []) == (b"", True)
    one.finished("a", request(hashes), ([1, 2],))
    one.close()


@pytest.mark.parametrize("bad", [SimpleNamespace(), planned({"a": "many"}), planned({7: 1}), planned({}, preempted=7)], ids=["nothing", "text", "number", "no set"])
def test_a_step_of_another_form_ends_the_half_and_not_the_engine(tmp_path: pathlib.Path, bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    one = half(tmp_path)
    orders, notices = one.step(bad, {}, None, [], None, [])
    assert orders and notices, "the workers are told to stop"
    assert isinstance(shown[0].exc_value, (AttributeError, TypeError))
    assert "failed by a bug" in str(one.notices())
    assert one.step(planned({}), {}, None, [], None, []) == (b"", False)
    one.close()


@pytest.mark.parametrize("hash_tokens", [0, 24])
def test_blocks_are_multiples_of_what_a_hash_covers(tmp_path: pathlib.Path, hash_tokens: int) -> None:
    with pytest.raises(KvdError, match="multiples of the tokens that a hash covers"):
        half(tmp_path, hash_tokens=hash_tokens)
