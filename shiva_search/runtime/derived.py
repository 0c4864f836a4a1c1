"""What is made of weights alone, kept until one of them changes: a forward then makes it no more.

In: weights, and how to make something of them. Out: what was made, from before where it still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

Tensors = tuple[torch.Tensor, ...]


def version_of(weight: torch.Tensor) -> int:
    """How often a weight was written to; tensors of inference mode do not count."""
    return 0 if weight.is_inference() else weight._version


class Derived:
    """Tensors by a key of the owner's. Where weights are trained, or torch.compile traces, they are made each time."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[tuple[torch.Tensor, int]], Tensors]] = {}

    def get(self, key: Hashable, weights: Sequence[torch.Tensor], make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives for these weights.

        Args:
            key: names what is made; the same key is always made of the same weights, at the same shapes.
            weights: all that `make` reads.
            make: called where nothing is kept, or a weight is another one or was written to since.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() and any(w.requires_grad for w in weights):
            return make()
        seen = [(weight, version_of(weight)) for weight in weights]
        kept = self._kept.get(key)
        if kept is not None and all(a is b and v == w for (a, v), (b, w) in zip(kept[0], seen, strict=True)):
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            made = make()
            if kept is not None:  # where it was: a CUDA graph may read it there
                for before, now in zip(kept[1], made, strict=True):
                    before.copy_(now)
                made = kept[1]
        if not (made[0].is_cuda and torch.cuda.is_current_stream_capturing()):  # then it is the graph's own
            self._kept[key] = seen, made
        return made

    def clear(self) -> None:
        """Forget all: the weights moved, or changed type."""
        self._kept.clear()
