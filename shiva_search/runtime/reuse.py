"""What a block gave a token some denoising steps ago, used again where the token is rejected. Ours, beyond the paper.

In: the tokens of a pruned layer. Out: rejected tokens moved by their last update, where it is recent enough. The idea
is that of feature caches (DeepCache, arXiv 2312.00858; FORA, arXiv 2407.01425; ToCa, arXiv 2410.05317).

Legend: B samples, N tokens, K kept tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shiva_search.errors import InputError
from shiva_search.runtime.token_ops import gather_tokens

_NEVER = -(10**6)  # the step of an update that was never computed
_CALLS = 2  # of the model in one step: one for each half of guidance, where they are not in one batch


@dataclass
class _Held:
    """Of one layer: the last update of each token, and the step of the sampler it is of."""

    update_BND: torch.Tensor
    step_BN: torch.Tensor


class ReusedUpdates:
    """Updates of one image's tokens from step to step, for each half of guidance apart.

    A step is told by its time, which is read on the host: a later call at the same time is the other half, and a time
    that rises, or a third call, begins another image.

    Args:
        steps: how many steps old an update may be, at least 1.

    Raises:
        InputError: fewer steps than one.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise InputError(f"updates are reused for at least 1 step, got {steps}; leave it out to reuse none")
        self.steps = steps
        self._time, self._step, self._call = float("-inf"), 0, 0
        self._held: list[dict[int, _Held]] = []

    def begin(self, t_B: torch.Tensor) -> None:
        """A forward at these normalised times begins."""
        time = float(t_B.max())
        self._call = self._call + 1 if time == self._time else 0
        if time > self._time or self._call >= _CALLS:
            self.forget()
        self._time, self._step = time, self._step + (self._call == 0)
        while len(self._held) <= self._call:
            self._held.append({})

    def forget(self) -> None:
        """Another image begins, or none is left."""
        self._time, self._step, self._call, self._held = float("-inf"), 0, 0, []

    def moved(self, layer: int, x_BND: torch.Tensor, rejected_BND: torch.Tensor) -> torch.Tensor:
        """Tokens moved by their last update where it is recent enough; `rejected_BND` for all others."""
        held = self._of(layer, x_BND)
        if held is None:
            return rejected_BND
        recent_BN = held.step_BN >= self._step - self.steps
        return torch.where(recent_BN[..., None], x_BND + held.update_BND, rejected_BND)

    def keep(self, layer: int, x_BND: torch.Tensor, out_BKD: torch.Tensor, kept_BK: torch.Tensor | None) -> None:
        """Take note of what a block did to its kept tokens.

        Args:
            layer: index.
            x_BND: all tokens as they entered.
            out_BKD: the kept ones as they left.
            kept_BK: which these are; None: all.
        """
        held = self._of(layer, x_BND)
        if kept_BK is None:
            self._held[self._call][layer] = _Held(out_BKD - x_BND, _steps(x_BND, self._step))
            return
        if held is None:
            held = self._held[self._call][layer] = _Held(torch.zeros_like(x_BND), _steps(x_BND, _NEVER))
        update_BKD = out_BKD.to(x_BND.dtype) - gather_tokens(x_BND, kept_BK)
        held.update_BND.scatter_(1, kept_BK[..., None].expand_as(update_BKD), update_BKD)
        held.step_BN.scatter_(1, kept_BK, self._step)

    def _of(self, layer: int, x_BND: torch.Tensor) -> _Held | None:
        held = self._held[self._call].get(layer)
        if held is None:
            return None
        same = held.update_BND.shape == x_BND.shape and held.update_BND.device == x_BND.device
        return held if same and held.update_BND.dtype == x_BND.dtype else None


def _steps(x_BND: torch.Tensor, step: int) -> torch.Tensor:
    return torch.full(x_BND.shape[:2], step, dtype=torch.int64, device=x_BND.device)
