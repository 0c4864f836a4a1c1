"""Grids of counts, and steps found in curves whose steps are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiva_search.profiling.staircase import Point, alignment_of, edges, next_counts, token_grid


def explore(curve: Callable[[int], float], tokens: int, alignment: int, error: float = 0.001) -> dict[int, Point]:
    """Measure the grid, then whatever is asked for, until nothing more is."""
    points = {k: Point(curve(k), error) for k in token_grid(tokens, alignment)}
    for _ in range(30):
        wanted = next_counts(points, tokens, alignment)
        if not wanted:
            return points
        points |= {k: Point(curve(k), error) for k in wanted}
    raise AssertionError("the search for steps does not end")


@given(st.integers(1, 5000), st.sampled_from([1, 2, 8, 16, 64]))
def test_a_grid_has_both_ends_and_no_more_than_asked_for(tokens: int, alignment: int) -> None:
    grid = token_grid(tokens, alignment)
    assert list(grid) == sorted(set(grid))
    assert grid[0] == 0 and grid[-1] == tokens
    assert 1 in grid
    assert len(grid) <= 20


def test_alignment_never_outgrows_the_tokens() -> None:
    assert alignment_of("cpu", 784) == 16
    assert alignment_of("cuda", 4096) == 64
    assert alignment_of("cuda", 256) == 16
    assert alignment_of("cpu", 4) == 1


@pytest.mark.parametrize("tile", [64, 128])
def test_steps_at_aligned_counts_are_found_exactly(tile: int) -> None:
    points = explore(lambda k: 0.1 + 0.9 * (-(-k // tile) * tile) / 1024, 1024, 64)
    assert edges(points, 1024, 64) == tuple(range(tile, 1024, tile))


def test_a_single_step_anywhere_is_found_to_an_eighth_of_a_tile() -> None:
    points = explore(lambda k: 0.1 + 0.4 * k / 1024 + (0.3 if k > 437 else 0.0), 1024, 64)
    [edge] = edges(points, 1024, 64)
    assert 437 - 8 <= edge <= 437


def test_a_smooth_curve_has_no_steps() -> None:
    points = explore(lambda k: 0.1 + 0.6 * k / 1024 + 0.3 * (k / 1024) ** 2, 1024, 64)
    assert edges(points, 1024, 64) == ()
    assert set(points) == set(token_grid(1024, 64))


def test_noise_within_its_error_is_no_step() -> None:
    points = explore(lambda k: 0.1 + 0.9 * k / 1024 + 0.03 * ((k * 7919) % 13 / 13 - 0.5), 1024, 64, error=0.02)
    assert edges(points, 1024, 64) == ()
