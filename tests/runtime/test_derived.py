"""What is made of weights holds exactly as long as they do."""

from __future__ import annotations

import copy

import torch
from torch import nn

from shiva_search.runtime.bypass import AffineBypass
from shiva_search.runtime.derived import Derived, Tensors


class Doubled:
    """Twice a weight, and how often that was worked out."""

    def __init__(self, requires_grad: bool = False) -> None:
        self.weight = nn.Parameter(torch.ones(3), requires_grad=requires_grad)
        self.derived = Derived()
        self.times = 0

    def __call__(self) -> torch.Tensor:
        def make() -> Tensors:
            self.times += 1
            return (2 * self.weight,)

        return self.derived.get("twice", [self.weight], make)[0]


def test_made_once_while_the_weight_stays() -> None:
    doubled = Doubled()
    assert torch.equal(doubled(), doubled()) and doubled.times == 1


def test_made_anew_after_a_write_and_in_the_same_place() -> None:
    doubled = Doubled()
    before = doubled()
    with torch.no_grad():
        doubled.weight[1] = 5.0
    assert doubled().tolist() == [2.0, 10.0, 2.0]
    assert before.data_ptr() == doubled().data_ptr()
    assert doubled.times == 2


def test_made_anew_for_another_weight_of_the_same_values() -> None:
    doubled = Doubled()
    doubled()
    doubled.weight = nn.Parameter(torch.full((3,), 4.0), requires_grad=False)
    assert doubled().tolist() == [8.0] * 3


def test_gradients_flow_and_nothing_made_with_them_is_kept() -> None:
    doubled = Doubled(requires_grad=True)
    doubled().sum().backward()
    assert doubled.weight.grad is not None and doubled.weight.grad.tolist() == [2.0] * 3
    with torch.no_grad():
        assert not doubled().requires_grad
    assert doubled().requires_grad


def test_made_in_inference_mode_and_changed_outside() -> None:
    doubled = Doubled()
    with torch.inference_mode():
        doubled()
    with torch.no_grad():
        doubled.weight.add_(1.0)
    assert doubled().tolist() == [4.0] * 3


def test_a_bypass_follows_its_weights_wherever_they_go() -> None:
    torch.manual_seed(0)
    bypass = AffineBypass(8, 4, 2, (0, 2), gates=2).requires_grad_(False)
    x_BND, condition_BC = torch.randn(2, 5, 8), torch.randn(2, 4)

    def moved(of: AffineBypass, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        x, c = x_BND.to(dtype), condition_BC.to(dtype)
        return of.move(x, of.read(x, c, rank=2), 2)

    still = moved(bypass)
    for weight in bypass.parameters():
        nn.init.normal_(weight)
    drawn = moved(bypass)
    assert not torch.allclose(drawn, still)
    torch.testing.assert_close(moved(copy.deepcopy(bypass)), drawn)
    torch.testing.assert_close(moved(bypass.double(), torch.float64).float(), drawn)
    other = AffineBypass(8, 4, 2, (0, 2), gates=2).requires_grad_(False)
    moved(other)
    other.load_state_dict(bypass.float().state_dict(), assign=True)
    torch.testing.assert_close(moved(other), drawn)
