"""What a block gave a token some denoising steps ago, used again where the token is rejected. Ours, beyond the paper.

In: the tokens of a pruned layer. Out: rejected tokens moved by their last update, where it is recent enough. The idea
is that of feature caches (DeepCache, arXiv 2312.00858; FORA, arXiv 2407.01425; ToCa, arXiv 2410.05317).

Legend: B samples, N tokens, K kept tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shiva_search.errors import InputError
from shiva_search.runtime.token_ops import gather_tokens

_NEVER = -(10**6)  # the step of an update that was never computed


@dataclass
class _Held:
    """Of one layer: the last update of each token, and the step of the sampler it is of."""

    update_BND: torch.Tensor
    step_BN: torch.Tensor


class ReusedUpdates:
    """Updates of one image's tokens from step to step, apart for each call of the model within a step.

    Steps are told by time and latents, which are read on the host. Calls at one time on the same latents are the parts
    of one step (with the prompt, without it, ...). Other latents at the same time are another step, as Heun's method
    takes them. A time that rises begins another image, and so do other latents at the time of the first step. An image
    that begins no later than the last one ended, or was left, is not told from it: call `forget` in between.

    Args:
        steps: how many steps old an update may be, at least 1.

    Raises:
        InputError: fewer steps than one.
    """

    def __init__(self, steps: int) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise InputError(
                f"updates are reused for at least 1 step, a whole number, got {steps!r}; leave it out to reuse none"
            )
        self.steps = steps
        self.forget()

    def forget(self) -> None:
        """Another image begins, or none is left."""
        self._time, self._step, self._call = float("inf"), 0, 0
        self._latents: torch.Tensor | None = None
        self._held: list[dict[int, _Held]] = []

    def begin(self, t_B: torch.Tensor, latents: torch.Tensor | Sequence[torch.Tensor]) -> None:
        """A forward begins.

        Args:
            t_B: normalised times.
            latents: what the model is called on.

        Raises:
            InputError: inside torch.compile, where steps cannot be told apart.
        """
        if torch.compiler.is_compiling():
            raise InputError(
                "updates are not reused in a model compiled as a whole; compile blocks by handle.compile()"
            )
        if not isinstance(latents, torch.Tensor):  # Z-Image takes a list
            latents = torch.stack(list(latents))
        time, before = float(t_B.max()), self._latents
        if time == self._time and before is not None and torch.equal(before.to(latents), latents):
            self._call += 1
        else:
            if time > self._time or (time == self._time and self._step == 1):
                self.forget()
            self._time, self._step, self._call, self._latents = time, self._step + 1, 0, latents.detach().clone()
        while len(self._held) <= self._call:
            self._held.append({})

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
        x_BND, out_BKD = x_BND.detach(), out_BKD.detach().to(x_BND.dtype)
        held = self._of(layer, x_BND)
        if kept_BK is None:
            self._held[self._call][layer] = _Held(out_BKD - x_BND, _steps(x_BND, self._step))
            return
        if held is None:
            held = self._held[self._call][layer] = _Held(torch.zeros_like(x_BND), _steps(x_BND, _NEVER))
        update_BKD = out_BKD - gather_tokens(x_BND, kept_BK)
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
