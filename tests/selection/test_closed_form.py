"""The closed form against least squares in float64, and what a fit on a real model is worth."""

from __future__ import annotations

import pytest
import torch

from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.bypass import AffineBypass, image_features
from shiva_search.search.fidelity import fidelity
from shiva_search.selection.closed_form import fit_bypasses, gates_for
from shiva_search.selection.normal_equations import NormalEquations, cross_validated_ridge, ridge, set_gates, solve
from shiva_search.selection.training import tune

WIDTH, CONDITION = 6, 4


def sums_of(
    x: torch.Tensor, f: torch.Tensor, c: torch.Tensor, ranks: tuple[int, ...], g: torch.Tensor
) -> NormalEquations:
    sums = NormalEquations.empty(WIDTH, CONDITION, len(ranks), g.shape[1], torch.device("cpu"))
    image = image_features(x, c)
    for rows in torch.arange(len(x)).chunk(5):  # streamed
        sums.add(x[rows], f[rows], image[rows], g[rows])
    return sums


def fitted(
    x: torch.Tensor, f: torch.Tensor, c: torch.Tensor, rank: int, ranks: tuple[int, ...], gates: int = 0
) -> AffineBypass:
    bypass = AffineBypass(WIDTH, CONDITION, rank, ranks, gates=gates).double()
    set_gates(bypass, [sums_of(x, f, c, ranks, x[:, 0, :0])], None)
    solve(bypass, sums_of(x, f, c, ranks, bypass.gates_of(c)), 0)
    return bypass


def problem(true_rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, c = drawn(40, 30, WIDTH) * (1 + drawn(40, 30, 1).abs()), drawn(40, CONDITION)
    u = torch.nn.functional.layer_norm(x, (WIDTH,)) @ drawn(WIDTH, true_rank) + x @ drawn(WIDTH, true_rank)
    u = u + (image_features(x, c) @ drawn(CONDITION + WIDTH, true_rank))[:, None]
    return x, u @ drawn(true_rank, WIDTH) + drawn(WIDTH), c


def update(bypass: AffineBypass, x: torch.Tensor, c: torch.Tensor, rank: int) -> torch.Tensor:
    return bypass.move(x, bypass.read(x, c), rank) - x


def test_without_noise_the_full_rank_fit_is_the_least_squares_solution() -> None:
    x, f, c = problem(WIDTH)
    bypass = fitted(x, f, c, WIDTH, (0, WIDTH))
    n = torch.nn.functional.layer_norm(x, (WIDTH,))
    image = image_features(x, c)[:, None].expand(-1, x.shape[1], -1)
    design = torch.cat([n, x, image, torch.ones_like(x[..., :1])], -1).flatten(0, 1)
    solution = torch.linalg.lstsq(design, f.flatten(0, 1), driver="gelsd").solution
    expected = (design @ solution).view_as(f)
    found = update(bypass, x, c, WIDTH)
    # The penalty, 1e-4 of each feature's variance, is all that lies between them; read() works in float32.
    assert (found - expected).norm() < 2e-3 * expected.norm()


def test_with_noise_it_is_least_squares_within_images() -> None:
    x, f, c = problem(WIDTH)
    f = f + torch.randn(f.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    n = torch.nn.functional.layer_norm(x, (WIDTH,))

    def within(values: torch.Tensor) -> torch.Tensor:
        return values - values.mean(1, keepdim=True)

    design = within(torch.cat([n, x], -1)).flatten(0, 1)
    expected = design @ torch.linalg.lstsq(design, within(f).flatten(0, 1), driver="gelsd").solution
    found = within(update(fitted(x, f, c, WIDTH, (0, WIDTH)), x, c, WIDTH)).flatten(0, 1)
    assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize(("count", "noise"), [(400, 1e-6), (60, 2.0), (20, 2.0)])
def test_the_cross_validated_penalty_grows_with_noise(count: int, noise: float) -> None:
    """Thirty features, of which three matter: on new samples at least as good as least squares, and as nothing."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(30, 4, dtype=torch.float64)
    truth[:3] = torch.randn(3, 4, generator=generator, dtype=torch.float64)

    def draw(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.randn(samples, 30, generator=generator, dtype=torch.float64)
        return z, z @ truth + noise * torch.randn(samples, 4, generator=generator, dtype=torch.float64)

    z, y = draw(count)
    z, y = z - z.mean(0), y - y.mean(0)
    found = cross_validated_ridge(z.T @ z / count, z.T @ y / count, float(y.square().sum() / count), count)
    least_squares = torch.linalg.lstsq(z, y, driver="gelsd").solution
    new_z, new_y = draw(2000)

    def error(weights: torch.Tensor) -> float:
        return float((new_y - new_z @ weights).square().mean())

    assert error(found) < 1.02 * error(torch.zeros_like(truth))
    if noise < 1:
        assert torch.allclose(found, least_squares, atol=1e-3)
    else:
        assert error(found) < 0.9 * error(least_squares)


def test_gates_are_the_main_components_of_the_condition() -> None:
    x, f, _ = problem(2)
    _, _, c = problem(2)
    bypass = fitted(x, f, c, 2, (0, 2), gates=2)
    gates_BJ = bypass.gates_of(c)
    n = torch.nn.functional.layer_norm(c, (CONDITION,))
    left, size, _ = torch.linalg.svd(n - n.mean(0), full_matrices=False)
    assert torch.allclose(gates_BJ.mean(0), torch.zeros(2, dtype=c.dtype), atol=1e-6)
    assert torch.allclose(gates_BJ.square().mean(0), torch.ones(2, dtype=c.dtype), atol=1e-6)
    assert torch.allclose(gates_BJ.abs(), (left[:, :2] * len(c) ** 0.5).abs(), atol=1e-6)
    assert size[1] > size[2]


def test_maps_that_vary_with_the_condition_take_gates() -> None:
    x, f, c = problem(2)
    gate_B1 = fitted(x, f, c, 2, (0, 2), gates=1).gates_of(c).detach()
    base, gated = torch.randn(2, WIDTH, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    f = x @ base + gate_B1[..., None] * (x @ gated)
    for gates, error in ((0, 0.3), (1, 2e-3)):
        bypass = fitted(x, f, c, WIDTH, (0, WIDTH), gates)
        left = float((update(bypass, x, c, WIDTH).detach() - f).norm() / f.norm())
        assert left > error if gates == 0 else left < error


def test_where_all_conditions_are_alike_gates_do_nothing() -> None:
    x, f, c = problem(2)
    c = c[:1].expand_as(c)
    bypass = fitted(x, f, c, WIDTH, (0, WIDTH), gates=2)
    assert torch.equal(bypass.gates_of(c), torch.zeros(len(c), 2, dtype=c.dtype))
    assert torch.allclose(
        update(bypass, x, c, WIDTH), update(fitted(x, f, c, WIDTH, (0, WIDTH)), x, c, WIDTH), atol=1e-6
    )


def test_wide_models_get_fewer_gates() -> None:
    found = [gates_for(width, width) for width in (128, 1152, 3072)]
    assert found == [4, 2, 0] and gates_for(1152, 1152, memory_mib=16384) == 4


def test_a_rank_above_the_true_one_changes_nothing() -> None:
    x, f, c = problem(2)
    bypass = fitted(x, f, c, 5, (0, 2, 5))
    assert (update(bypass, x, c, 2) - f).norm() < 2e-3 * f.norm()
    assert (update(bypass, x, c, 5) - update(bypass, x, c, 2)).norm() < 2e-3 * f.norm()
    below = update(bypass, x, c, 1)
    assert (below - f).norm() > 0.05 * f.norm()


def test_ridge_without_a_penalty_is_least_squares_and_ignores_constants() -> None:
    x, f, _ = problem(3)
    a, b = x.flatten(0, 1), f.flatten(0, 1)
    a, b = torch.cat([a - a.mean(0), torch.zeros(len(a), 1, dtype=a.dtype)], 1), b - b.mean(0)
    found = ridge(a.T @ a / len(a), a.T @ b / len(a), 0.0 + 1e-12)
    assert torch.allclose(found[:-1], torch.linalg.lstsq(a[:, :-1], b).solution, atol=1e-6)
    assert not found[-1].any()


def test_scores_order_tokens_by_what_is_missed() -> None:
    x, _, c = problem(2)
    # Tokens that point one way are updated much, by noise no affine map can know.
    size = torch.exp(1.5 * x[..., :1])
    f = size * torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bypass = fitted(x, f, c, 2, (0, 2))
    scores = bypass.scores(bypass.read(x, c), 0)
    kept = scores.topk(15, dim=1).indices
    found = f.square().sum(-1).gather(1, kept).sum() / f.square().sum()
    assert found > 0.8


def test_fitting_a_model_beats_standing_still_and_tuning_helps(tiny: Model) -> None:
    bank, report = fit_bypasses(tiny, ranks=(4, 16), samples=48, passes=2, tokens_per_sample=32)
    assert bank.ranks == (0, 4, 16)
    for layer in range(1, tiny.layer_count):
        missed = report.missed[layer]
        assert missed[0] == pytest.approx(1.0) and missed[16] < missed[4] < 0.9
    k = tiny.tokens // 2

    def error(rank: int) -> float:
        row = [Kept(tiny.tokens), *[Kept(k, rank)] * (tiny.layer_count - 1)]
        return fidelity(tiny, Plan.from_rows(tiny, [row]), bank, split="evaluation", samples=16)

    still, moved = error(0), error(16)
    assert moved < 0.6 * still
    plan = Plan.from_rows(tiny, [[Kept(tiny.tokens), *[Kept(k, 16)] * (tiny.layer_count - 1)]])
    _, rows = tune(tiny, bank, plan, steps=30, batch_size=12)
    assert error(16) < moved
    assert len(rows) == 30 and not any(parameter.requires_grad for parameter in bank.parameters())


def test_the_same_seed_gives_the_same_bypass_and_all_layers_at_once_or_not(tiny: Model) -> None:
    settings = {"ranks": (4,), "samples": 16, "passes": 2, "tokens_per_sample": 16}
    first, _ = fit_bypasses(tiny, **settings)
    again, _ = fit_bypasses(tiny, **settings)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    one_by_one, _ = fit_bypasses(tiny, **settings, memory_mib=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), one_by_one.parameters(), strict=True))


def test_segments_have_bypasses_of_their_own(tiny: Model) -> None:
    bank, _ = fit_bypasses(tiny, ranks=(4,), samples=32, passes=2, segments=2, tokens_per_sample=16)
    bypass = bank.bypasses[2]
    assert bypass.mean.shape[0] == 2 and not torch.allclose(bypass.mean[0], bypass.mean[1])
    rows = [[tiny.tokens, *[Kept(8, 4)] * (tiny.layer_count - 1)]] * 2
    assert fidelity(tiny, Plan.from_rows(tiny, rows), bank, samples=8) > 0


def test_a_mean_bypass_is_on_or_off(tiny: Model) -> None:
    bank, _ = fit_bypasses(tiny, "mean", samples=16, passes=2, tokens_per_sample=16)
    assert bank.ranks == (0, 1)
    bypass, x = bank.bypasses[1], torch.randn(2, 5, bank.widths[0])
    moved = bypass.move(x, bypass.read(x, torch.zeros(2, bank.widths[1])), 1)
    assert torch.allclose(moved - x, bypass.mean[0].expand_as(x), atol=1e-6)


def test_bad_settings_are_refused(tiny: Model) -> None:
    with pytest.raises(InputError, match="at least 2 passes"):
        fit_bypasses(tiny, passes=1)
    with pytest.raises(InputError, match="mean or affine"):
        fit_bypasses(tiny, "cubic")
