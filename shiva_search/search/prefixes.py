"""States of forwards under way, kept so that plans run the layers they share only once. In: states. Out: the same."""

from __future__ import annotations

from collections import OrderedDict

import torch

from shiva_search.records.plan import Kept
from shiva_search.runtime.pruned_block import Resume

Row = tuple[int, ...]


class Prefixes:
    """States after a layer, by chunk and the tokens kept up to there; the least recently used leave first.

    Args:
        memory_mib: room for them.
    """

    def __init__(self, memory_mib: float) -> None:
        self._room = int(memory_mib * 2**20)
        self._held = 0
        self._largest = 0
        self._states: OrderedDict[tuple[int, Row], tuple[Resume, int]] = OrderedDict()

    def worth_keeping(self, row: Row, first: int) -> frozenset[int]:
        """Layers from `first` on whose output other plans could start from, no more than there is room for at all.

        After a skipped block the state is what it was before, and the last layer's is the result itself.
        """
        changing = [layer for layer in range(first, len(row) - 1) if row[layer] or Kept.of(row[layer]).rank]
        return frozenset(changing[: self._room // max(self._largest, 1)])

    def longest(self, chunk: int, row: Row) -> Resume | None:
        """The state after as many layers of the row as possible; None where not even the first is there."""
        found: Resume | None = None
        for length in range(len(row) - 1, 0, -1):
            key = (chunk, row[:length])
            if key in self._states:
                # What the longest grew from is in use as well, and by more plans: it stays longer.
                self._states.move_to_end(key)
                found = found or self._states[key][0]
        return found

    def put(self, chunk: int, row: Row, state: Resume) -> None:
        """Keep a state, where there is room for one."""
        key = (chunk, row[: state.layer + 1])
        size = _bytes(state)
        self._largest = max(self._largest, size)
        if key in self._states or size > self._room:
            return
        self._states[key] = (state, size)
        self._held += size
        while self._held > self._room:
            _, (_, freed) = self._states.popitem(last=False)
            self._held -= freed


def _bytes(state: Resume) -> int:
    outputs = state.output if isinstance(state.output, tuple) else (state.output,)
    tensors = [item for item in outputs if isinstance(item, torch.Tensor)]
    if state.history is not None:
        tensors += [state.history.age_BN, state.history.update_size_BN]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
