"""States of shared prefixes: what is worth keeping, what is found, and what leaves when room is short."""

from __future__ import annotations

import torch

from shiva_search.records.plan import Kept
from shiva_search.runtime.pruned_block import Resume
from shiva_search.search.prefixes import Prefixes

ROW = (64, 32, 0, 16, 64)


def state(layer: int) -> Resume:
    return Resume(layer, torch.zeros(256, 1024), None)  # 1 MiB


def test_the_longest_shared_start_is_found() -> None:
    kept = Prefixes(16)
    for layer in (0, 1, 3):
        kept.put(0, ROW, state(layer))
    assert kept.longest(0, (64, 32, 0, 16, 0)).layer == 3
    assert kept.longest(0, (64, 32, 8, 16, 0)).layer == 1
    assert kept.longest(0, (64, 0, 0, 16, 0)).layer == 0
    assert kept.longest(1, ROW) is None


def test_skipped_blocks_and_the_last_one_are_not_worth_keeping() -> None:
    assert Prefixes(16).worth_keeping(ROW, 0) == {0, 1, 3}
    assert Prefixes(16).worth_keeping(ROW, 2) == {3}
    with_bypass = (Kept(64), Kept(32), Kept(0, 8), Kept(16), Kept(64))
    assert Prefixes(16).worth_keeping(with_bypass, 0) == {0, 1, 2, 3}
    assert Prefixes(0).worth_keeping(ROW, 0) == frozenset()


def test_no_more_is_kept_of_one_forward_than_there_is_room_for() -> None:
    kept = Prefixes(2)
    kept.put(0, ROW, state(0))
    assert kept.worth_keeping((64,) * 9, 1) == {1, 2}


def test_what_was_used_stays_and_short_starts_stay_longest() -> None:
    kept = Prefixes(3)
    for layer in (3, 1, 0):
        kept.put(0, ROW, state(layer))
    kept.longest(0, ROW)
    other = (64, 48, 48, 48, 64)
    kept.put(0, other, state(1))
    assert kept.longest(0, ROW).layer == 1  # layer 3 left
    kept.put(0, other, state(2))
    assert kept.longest(0, ROW).layer == 1  # used since, so the other's was older
    assert kept.longest(0, other).layer == 2
