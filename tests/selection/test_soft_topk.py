"""Soft ranks, inclusion scores and hard selection against their definitions (eq. 3, 5, 6, 18, 19, 24)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from shiva_search.errors import InputError
from shiva_search.selection.soft_topk import hard_top_k, inclusion, perturb, soft_rank


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def materialised_rank(scores_BN: Tensor, tau: float) -> Tensor:
    """Eq. 5 as printed, with the whole N x N comparison and autograd's own backward."""
    beats_BNN = torch.sigmoid((scores_BN[:, None, :] - scores_BN[:, :, None]) / tau)
    others_NN = 1 - torch.eye(scores_BN.shape[1], dtype=scores_BN.dtype)
    return 1 + (beats_BNN * others_NN).sum(dim=2)


@pytest.mark.parametrize("chunk", [1, 7, 16, 36, 37, 128])  # N = 37: dividing, not dividing, all but one, all, more
@pytest.mark.parametrize("tau", [0.02, 0.2, 5.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_chunks_equal_the_materialised_comparison(chunk: int, tau: float, dtype: torch.dtype, tolerance: float) -> None:
    weights_BN = draw(3, 37, seed=1)
    reference = draw(3, 37).requires_grad_()
    expected_BN = materialised_rank(reference, tau)
    (expected_BN * weights_BN).sum().backward()
    scores = reference.detach().to(dtype).requires_grad_()
    ranks_BN = soft_rank(scores, tau, chunk)
    (ranks_BN * weights_BN).sum().backward()
    assert ranks_BN.dtype == dtype
    assert reference.grad is not None
    assert scores.grad is not None
    torch.testing.assert_close(ranks_BN.double(), expected_BN, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scores.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [4, 5, 64])
def test_gradients_of_scores_and_k_by_finite_differences(chunk: int) -> None:
    scores_BN, k = draw(2, 12).requires_grad_(), torch.tensor(5.3, dtype=torch.float64, requires_grad=True)
    per_sample_k = torch.tensor([[3.5], [9.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_rank(s, 0.3, chunk), (scores_BN,))
    for keep in (k, per_sample_k):
        assert torch.autograd.gradcheck(lambda s, k: inclusion(soft_rank(s, 0.3, chunk), k, 0.1, 12), (scores_BN, keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_signs_of_the_jacobian(dtype: torch.dtype, seed: int) -> None:
    """Eq. 18: a higher score lowers the own rank number, always. Eq. 19: it raises that of every other token."""
    scores_N = draw(20, seed=seed, dtype=dtype)
    jacobian_NN = torch.autograd.functional.jacobian(lambda s: soft_rank(s[None], 0.2, chunk=6)[0], scores_N)
    own = torch.eye(20, dtype=torch.bool)
    assert (jacobian_NN[own] < 0).all()
    assert (jacobian_NN[~own] > 0).all()


scores_lists = st.lists(st.floats(-50, 50), min_size=1, max_size=40)


@given(scores_lists, st.floats(0.01, 10), st.integers(1, 50), st.floats(-100, 100))
def test_ranks_share_a_fixed_sum_and_ignore_a_shift(values: list[float], tau: float, chunk: int, shift: float) -> None:
    scores_BN = torch.tensor([values], dtype=torch.float64)
    ranks_BN = soft_rank(scores_BN, tau, chunk)
    tokens = len(values)
    assert ranks_BN.sum().item() == pytest.approx(tokens * (tokens + 1) / 2)
    torch.testing.assert_close(soft_rank(scores_BN + shift, tau, chunk), ranks_BN, rtol=1e-6, atol=1e-6)


@given(st.permutations(list(range(15))), st.integers(1, 20))
def test_low_temperature_gives_the_hard_rank(order: list[int], chunk: int) -> None:
    ranks_BN = soft_rank(torch.tensor([order], dtype=torch.float32), tau=1e-3, chunk=chunk)
    assert ranks_BN.tolist() == [[15 - value for value in order]]


def test_equal_scores_share_the_middle_rank() -> None:
    assert soft_rank(torch.zeros(2, 9), 0.2, chunk=4).tolist() == [[5.0] * 9] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_ranked_in_float32(dtype: torch.dtype) -> None:
    scores_BN = (torch.arange(600) / 4).to(dtype)[None].requires_grad_()
    wide_BN = scores_BN.detach().float().requires_grad_()
    ranks_BN, expected_BN = soft_rank(scores_BN, 0.2), soft_rank(wide_BN, 0.2)
    ranks_BN.square().sum().backward()
    expected_BN.square().sum().backward()
    assert ranks_BN.dtype == torch.float32
    assert torch.equal(ranks_BN, expected_BN)
    assert scores_BN.grad is not None
    assert wide_BN.grad is not None
    assert scores_BN.grad.dtype == dtype
    assert torch.equal(scores_BN.grad, wide_BN.grad.to(dtype))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that tensors made during `run` held at one moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_memory_stays_far_below_the_full_comparison() -> None:
    tokens, chunk, float_bytes = 4096, 128, 4
    scores_BN = draw(1, tokens, dtype=torch.float32).requires_grad_()
    chunked = peak_bytes(lambda: soft_rank(scores_BN, 0.2, chunk).sum().backward())
    # Two chunk-sized tensors at once in the backward pass, and a few vectors of N.
    assert chunk * tokens * float_bytes <= chunked <= 2.1 * chunk * tokens * float_bytes
    materialised = peak_bytes(lambda: materialised_rank(scores_BN.detach(), 0.2))
    assert materialised >= tokens * tokens * float_bytes > 10 * chunked


def test_inclusion_is_a_half_at_rank_k_and_does_not_depend_on_resolution() -> None:
    ranks_BN = torch.tensor([[1.0, 5.0, 10.0]])
    pi_BN = inclusion(ranks_BN, 5, tau=0.1, tokens=10)
    torch.testing.assert_close(pi_BN, torch.sigmoid(torch.tensor([[4.0, 0.0, -5.0]])))
    torch.testing.assert_close(inclusion(ranks_BN * 64, 5 * 64, tau=0.1, tokens=640), pi_BN)


def test_gradient_of_k_is_the_sum_over_tokens() -> None:
    """Eq. 24: dL/dk = sum_i dL/dpi_i * dpi_i/dk, per sample where k is per sample."""
    ranks_BN, upstream_BN = soft_rank(draw(3, 20), 0.2), draw(3, 20, seed=1)
    shared = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    each = torch.full((3, 1), 7.0, dtype=torch.float64, requires_grad=True)
    for k in (shared, each):
        (inclusion(ranks_BN, k, 0.05, 20) * upstream_BN).sum().backward()
    pi_BN = inclusion(ranks_BN, 7, 0.05, 20)
    expected_B = (upstream_BN * pi_BN * (1 - pi_BN) / (0.05 * 20)).sum(dim=1)
    torch.testing.assert_close(each.grad, expected_B[:, None])
    torch.testing.assert_close(shared.grad, expected_B.sum())


@given(st.data())
def test_hard_top_k_is_a_set_of_the_highest_in_token_order(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 30))
    k = data.draw(st.integers(0, tokens))
    few_levels = st.lists(st.integers(0, 5), min_size=tokens, max_size=tokens)  # so that ties occur
    scores_BN = torch.tensor([data.draw(few_levels), data.draw(few_levels)], dtype=torch.float32)
    kept_BK = hard_top_k(scores_BN, k)
    assert kept_BK.dtype == torch.int64
    assert kept_BK.shape == (2, k)
    assert (kept_BK.diff(dim=1) > 0).all()
    highest_BK = scores_BN.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(scores_BN.gather(1, kept_BK).sort(dim=1, descending=True).values, highest_BK)
    assert torch.equal(kept_BK, hard_top_k(scores_BN, k))


def test_kept_tokens_are_those_with_the_highest_inclusion() -> None:
    scores_BN = draw(4, 50)
    kept_BK = hard_top_k(scores_BN, 17)
    assert torch.equal(kept_BK, hard_top_k(inclusion(soft_rank(scores_BN, 0.2), 17, 0.1, 50), 17))


def test_perturb_adds_gaussian_noise_of_the_given_size_and_passes_gradients() -> None:
    scores = draw(200, 100).requires_grad_()
    noisy = perturb(scores, 0.3, torch.Generator().manual_seed(3))
    noise = (noisy - scores).detach()
    assert abs(noise.mean().item()) < 0.01
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.equal(noisy, perturb(scores, 0.3, torch.Generator().manual_seed(3)))
    noisy.sum().backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.ones_like(scores))


def test_perturb_with_sigma_zero_leaves_scores_and_generator_alone() -> None:
    generator, scores = torch.Generator().manual_seed(3), draw(2, 5)
    state = generator.get_state()
    assert perturb(scores, 0.0, generator) is scores
    assert torch.equal(generator.get_state(), state)


def test_compiles_in_one_graph() -> None:
    """The k stays an integer and no value is read back, so that a training step can be compiled."""

    def step(scores_BN: Tensor, k: Tensor) -> Tensor:
        return inclusion(soft_rank(scores_BN, 0.2, chunk=8), k, 0.1, 20).gather(1, hard_top_k(scores_BN, 5)).sum()

    inputs = (draw(2, 20).requires_grad_(), torch.tensor(5.0, dtype=torch.float64, requires_grad=True))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(step(*inputs), inputs)
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("refused", "rule"),
    [
        (lambda: soft_rank(torch.zeros(4), 0.2), r"scores must be .*\[B, N\]"),
        (lambda: soft_rank(torch.zeros(1, 4, dtype=torch.int64), 0.2), "floating point"),
        (lambda: soft_rank(torch.zeros(1, 4), 0.0), "tau must be positive"),
        (lambda: soft_rank(torch.zeros(1, 4), float("nan")), "tau must be positive"),
        (lambda: soft_rank(torch.zeros(1, 4), 0.2, chunk=0), "chunk must be at least 1"),
        (lambda: inclusion(torch.ones(2, 4), 2, -0.1, 4), "tau must be positive"),
        (lambda: inclusion(torch.ones(2, 4), 2, 0.1, 0), "tokens must be at least 1"),
        (lambda: inclusion(torch.ones(4, 4), torch.ones(4), 0.1, 4), r"k must have shape \[\] or \[B, 1\]"),
        (lambda: hard_top_k(torch.zeros(1, 4), 5), "k = 5 with N = 4"),
        (lambda: hard_top_k(torch.zeros(1, 4), -1), "k = -1 with N = 4"),
        (lambda: perturb(torch.zeros(1, 4), -1.0, torch.Generator()), "sigma must be finite"),
    ],
)
def test_refusals_name_the_rule(refused: Callable[[], object], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        refused()
