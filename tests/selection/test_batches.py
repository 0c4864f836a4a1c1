"""What a training step sees: stratified shares of tokens, plausible rows, samples that keep their own inputs."""

from __future__ import annotations

import pytest
import torch

from shiva_search.models.model import Batch
from shiva_search.records.plan import Plan
from shiva_search.selection.batches import LEVELS, draw_batch, draw_row, planned_groups, stratified_groups


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(times):
    t_B = torch.tensor(times)
    inputs = {"x": t_B[:, None] * 10, "nested": {"t": t_B * 100}, "flag": True, "scale": torch.tensor(2.0)}
    return Batch(inputs, t_B, t_B * 1000)


def test_groups_cover_the_range_one_part_each(smaller):
    batch = smaller.batch("train", 10)
    shares = []
    for seed in range(40):
        groups = list(stratified_groups(smaller, batch, 4, (0.2, 1.0), generator(seed)))
        assert [len(group.batch) for group in groups] == [2, 3, 2, 3]
        assert sum(group.share for group in groups) == pytest.approx(1)
        uniform = [(index, group.row) for index, group in enumerate(groups) if len(set(group.row[1:])) == 1]
        shares += [(index, row[1] / smaller.tokens) for index, row in uniform]
    assert len(shares) > 20
    for index, keep in shares:
        low = 0.2 + 0.2 * index
        assert low - 1 / LEVELS - 1 / smaller.tokens < keep < low + 0.2 + 1 / LEVELS


def test_rows_look_like_plans():
    rows = [draw_row(10, 100, 0.5, (0.1, 0.9), generator(seed)) for seed in range(300)]
    assert all(row[0] == 100 and len(row) == 10 and all(0 <= k <= 100 for k in row) for row in rows)
    even = sum(len(set(row[1:])) == 1 for row in rows)
    entries = [k for row in rows for k in row[1:]]
    assert 60 < even < 140
    assert 0.03 < entries.count(0) / len(entries) < 0.1 and 0.03 < entries.count(100) / len(entries) < 0.12
    assert {k for k in entries if k not in (0, 100)} == set(range(10, 91, 100 // LEVELS))
    assert abs(sum(entries) / len(entries) - 50) < 4


def test_rows_with_bypasses_leave_more_blocks_alone_and_replace_more_of_them():
    variants = [[("kept", 0), ("kept", 16)]] * 10
    for keep, skipped, dense in ((0.3, 0.19, 0.15), (0.9, 0.06, 0.45)):
        rows = [draw_row(10, 100, keep, (0.1, 0.9), generator(seed), variants) for seed in range(300)]
        entries = [k for row in rows for k in row[1:]]
        assert sum(int(k) == 0 for k in entries) / len(entries) == pytest.approx(skipped, abs=0.04)
        assert sum(int(k) == 100 for k in entries) / len(entries) == pytest.approx(dense, abs=0.06)
        assert {k.rank for k in entries if k < 100} == {0, 16}


def test_a_step_draws_the_same_samples_again_and_others_than_its_neighbours(smaller):
    first = draw_batch(smaller, 4, seed=1, step=7)
    again, after, other = (draw_batch(smaller, 4, *pair) for pair in ((1, 7), (1, 8), (2, 7)))
    images = first.inputs["hidden_states"]
    assert torch.equal(images, again.inputs["hidden_states"])
    assert not torch.equal(images, after.inputs["hidden_states"])
    assert not torch.equal(images, other.inputs["hidden_states"])
    assert sorted((first.t_B * 4).long().tolist()) == [0, 1, 2, 3]  # one per interval (eq. 15)


def test_planned_groups_follow_the_segments():
    plan = Plan(10, ((10, 4), (10, 8)), segments=((0.0, 0.5), (0.5, 1.0)))
    batch = batch_of([0.9, 0.1, 0.5, 0.3, 0.7])
    groups = list(planned_groups(plan, batch, 2))
    assert [(group.row, group.batch.t_B.tolist()) for group in groups] == [
        ((10, 4), pytest.approx([0.1, 0.3])),
        ((10, 8), pytest.approx([0.9, 0.5])),
        ((10, 8), pytest.approx([0.7])),
    ]
    assert [group.share for group in groups] == pytest.approx([0.4, 0.4, 0.2])
