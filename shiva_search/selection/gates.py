"""Straight-through gates: how the inclusion scores pi of a hard selection get a gradient.

In: the tokens around a block (kept, processed, rejected) and their inclusion scores. Out: the same tokens bit for
bit, with a gradient to pi attached. A runtime calls an estimator at three places:

    x_kept  = estimator.enter(x_kept, pi_kept)            # after gather, before the block
    y_kept  = estimator.leave(x_kept, block(x_kept), pi_kept)          # after the block, before scatter
    x_rest  = estimator.stay(x_rest, pi_rest)             # only where estimator.gates_rejected

One path runs per token and its own gradient is used; the backbone is never run a second time. Equation numbers are
those of Shiva-DiT, arXiv 2602.05605. Legend: B samples, K kept tokens, R rejected tokens, D features.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shiva_search.errors import InputError


class Estimator(Protocol):
    """A rule for dL/dpi. Every method returns its tokens bit for bit; only the backward pass knows of pi.

    Tokens may be of any floating dtype; inner products are taken in float32 or wider.

    Attributes:
        gates_rejected: whether rejected tokens get a gradient. Where false, `stay` does nothing and a runtime needs
            no gather of the rejected tokens.
    """

    gates_rejected: ClassVar[bool]

    def enter(self, x_kept_BKD: Tensor, pi_kept_BK: Tensor) -> Tensor:
        """The kept tokens [B, K, D] as the block is to receive them."""
        ...

    def leave(self, x_kept_BKD: Tensor, out_kept_BKD: Tensor, pi_kept_BK: Tensor) -> Tensor:
        """The block's output [B, K, D] as it is to be scattered back; x_kept_BKD is what entered the block."""
        ...

    def stay(self, x_rejected_BRD: Tensor, pi_rejected_BR: Tensor) -> Tensor:
        """The rejected tokens [B, R, D] as they are to be scattered back."""
        ...


class UpdateGated:
    """Gate the block's update: y_i = x_i + pi_i * f_i, with f_i = block(x)_i - x_i.

        dL/dpi_i = <dL/dy_i, f_i>   for kept tokens: the derivative of the mixture above at pi_i = 1
        dL/dpi_i = 0                for rejected tokens, whose update is unknown

    Our reading of eq. 7: both paths of a kept token are at hand, so their difference is used. A loss that is
    stationary in every kept output (a token-wise distance to the same block's dense output, say) gives no gradient.
    """

    gates_rejected: ClassVar[bool] = False

    def enter(self, x_kept_BKD: Tensor, pi_kept_BK: Tensor) -> Tensor:
        """The tokens themselves."""
        return x_kept_BKD

    def leave(self, x_kept_BKD: Tensor, out_kept_BKD: Tensor, pi_kept_BK: Tensor) -> Tensor:
        """See `gate_update`."""
        return gate_update(x_kept_BKD, out_kept_BKD, pi_kept_BK)

    def stay(self, x_rejected_BRD: Tensor, pi_rejected_BR: Tensor) -> Tensor:
        """The tokens themselves."""
        return x_rejected_BRD


class Literal:
    """Gate the features themselves, as eq. 7 and 23 are printed.

        dL/dpi_i =  <dL/dx_i on the selected path, x_i>   for kept tokens
        dL/dpi_i = -<dL/dx_i on the identity path, x_i>   for rejected tokens

    The selected path begins at the block's input, so its gradient includes the block's own skip connection.
    """

    gates_rejected: ClassVar[bool] = True

    def enter(self, x_kept_BKD: Tensor, pi_kept_BK: Tensor) -> Tensor:
        """See `gate_input`."""
        return gate_input(x_kept_BKD, pi_kept_BK)

    def leave(self, x_kept_BKD: Tensor, out_kept_BKD: Tensor, pi_kept_BK: Tensor) -> Tensor:
        """The block's output itself."""
        return out_kept_BKD

    def stay(self, x_rejected_BRD: Tensor, pi_rejected_BR: Tensor) -> Tensor:
        """See `gate_rejected`."""
        return gate_rejected(x_rejected_BRD, pi_rejected_BR)


ESTIMATORS: MappingProxyType[str, Estimator] = MappingProxyType({"update": UpdateGated(), "literal": Literal()})


def get_estimator(name: str) -> Estimator:
    """The estimator of that name.

    Raises:
        InputError: no estimator has that name.
    """
    if name not in ESTIMATORS:
        raise InputError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}. Choose one of these.")
    return ESTIMATORS[name]


def gate_update(x_kept_BKD: Tensor, out_kept_BKD: Tensor, pi_kept_BK: Tensor) -> Tensor:
    """out_kept_BKD, with dL/dpi_i = <dL/dy_i, out_i - x_i> and dL/dout = dL/dy; nothing flows to x_kept_BKD here."""
    return _apply(_UpdateGate, pi_kept_BK, x_kept_BKD, out_kept_BKD)


def gate_input(x_kept_BKD: Tensor, pi_kept_BK: Tensor) -> Tensor:
    """x_kept_BKD, with dL/dpi_i = <dL/dx_i, x_i>: eq. 23 for tokens on the selected path."""
    return _apply(_FeatureGate, pi_kept_BK, x_kept_BKD, 1)


def gate_rejected(x_rejected_BRD: Tensor, pi_rejected_BR: Tensor) -> Tensor:
    """x_rejected_BRD, with dL/dpi_i = -<dL/dx_i, x_i>: eq. 23 for tokens on the identity path."""
    return _apply(_FeatureGate, pi_rejected_BR, x_rejected_BRD, -1)


class _UpdateGate(torch.autograd.Function):
    @staticmethod
    def forward(pi_BK: Tensor, x_BKD: Tensor, out_BKD: Tensor) -> Tensor:
        return out_BKD.view_as(out_BKD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        pi_BK, x_BKD, out_BKD = inputs
        ctx.pi_dtype = pi_BK.dtype
        # Both are kept rather than their difference: the block holds x already, and f stays exact in half precision.
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x_BKD, out_BKD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BKD: Tensor) -> tuple[Tensor | None, None, Tensor]:
        if not ctx.needs_input_grad[0]:
            return None, None, grad_BKD
        x_BKD, out_BKD = ctx.saved_tensors
        return _dot(grad_BKD, _widen(out_BKD) - _widen(x_BKD)).to(ctx.pi_dtype), None, grad_BKD


class _FeatureGate(torch.autograd.Function):
    @staticmethod
    def forward(pi_BK: Tensor, x_BKD: Tensor, sign: int) -> Tensor:
        return x_BKD.view_as(x_BKD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        pi_BK, x_BKD, ctx.sign = inputs
        ctx.pi_dtype = pi_BK.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x_BKD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BKD: Tensor) -> tuple[Tensor | None, Tensor, None]:
        if not ctx.needs_input_grad[0]:
            return None, grad_BKD, None
        (x_BKD,) = ctx.saved_tensors
        return (ctx.sign * _dot(grad_BKD, x_BKD)).to(ctx.pi_dtype), grad_BKD, None


def _apply(gate: type[torch.autograd.Function], pi_BK: Tensor, x_BKD: Tensor, *rest: Tensor | int) -> Tensor:
    """Refuse shapes that would broadcast into a wrong gradient, then apply the gate."""
    if pi_BK.shape != x_BKD.shape[:2] or any(isinstance(t, Tensor) and t.shape != x_BKD.shape for t in rest):
        shapes = [list(t.shape) for t in (x_BKD, *rest, pi_BK) if isinstance(t, Tensor)]
        raise InputError(f"a gate needs tokens [B, K, D] and scores [B, K], got {shapes}. Gather both alike.")
    gated_BKD: Tensor = gate.apply(pi_BK, x_BKD, *rest)
    return gated_BKD


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dot(a_BKD: Tensor, b_BKD: Tensor) -> Tensor:
    """Inner product over features [B, K], in float32 or wider: bfloat16 sums lose small differences."""
    return (_widen(a_BKD) * _widen(b_BKD)).sum(dim=-1)
