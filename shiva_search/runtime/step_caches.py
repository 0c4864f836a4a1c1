"""Caches of attention from step to step, inside a block whose tokens are chosen anew at each step.

PyramidAttentionBroadcast, TaylorSeer and their like (diffusers.hooks) reuse what a module inside the block computed
some steps ago. That belongs to the tokens kept then, so the choice is held for as long as the cache is filled. Where it
cannot be held (another number of tokens, or a cache filled before the plan came), the cache is emptied. Caches around
whole blocks (FirstBlockCache) see all tokens and need none of this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError


class HeldChoice:
    """The choice of one block, held while a cache inside the block is filled; nothing is held where there is none."""

    def __init__(self, block: nn.Module) -> None:
        # Listed once: going through the tree in every block of every step would take longer than the choice itself.
        self._parts = tuple(part for part in block.modules() if part is not block)
        self._held: dict[str, tuple[int, int, torch.Tensor | None]] = {}  # by context: B, K, kept_BK

    def find(self, batch: int, k: int) -> torch.Tensor | None:
        """kept_BK that a filled cache belongs to, or None where the tokens are to be chosen anew.

        Raises:
            InputError: a cache was filled at another batch size.
        """
        hooks = self._hooks()
        if not hooks:
            if self._held:
                self._held = {}
            return None
        name = _context(hooks)
        if all(_is_empty(hook, name) for _, hook in hooks):
            self._held.pop(name, None)
            return None
        was_batch, was_k, kept_BK = self._held.get(name, (batch, -1, None))
        if was_batch != batch:
            raise InputError(
                f"a cache inside the blocks was filled at batch {was_batch} and this forward has {batch}, so the "
                "tokens it belongs to are not known; empty the cache between them (transformer._reset_stateful_cache())"
            )
        if was_k != k:
            _empty(hooks)
            return None
        return kept_BK

    def hold(self, batch: int, k: int, kept_BK: torch.Tensor | None) -> None:
        """Remember a choice for `find`, where there is a cache inside; None stands for all tokens."""
        hooks = self._hooks()
        if hooks:
            self._held[_context(hooks)] = (batch, k, kept_BK)

    def release(self) -> None:
        """Forget the choice, and with it what was cached for it."""
        if self._held:
            self._held = {}
            _empty(self._hooks())

    def _hooks(self) -> list[tuple[nn.Module, Any]]:
        return hooks_with_memory(self._parts)


def hooks_with_memory(parts: Iterable[nn.Module]) -> list[tuple[nn.Module, Any]]:
    """The hooks of diffusers that remember something from one forward to the next, each with the module it is on."""
    found = []
    for part in parts:
        registry = part.__dict__.get("_diffusers_hook")
        if registry is not None:
            found += [(part, hook) for hook in registry.hooks.values() if hook._is_stateful]
    return found


def _managers(hook: Any) -> list[Any]:
    """What keeps a hook's memory by context (the forwards with and without the prompt of one step)."""
    return [value for value in vars(hook).values() if hasattr(value, "_state_cache") and hasattr(value, "_context")]


def _context(hooks: list[tuple[nn.Module, Any]]) -> str:
    """The name of the context under way; empty for hooks that know none."""
    contexts = [manager._context for _, hook in hooks for manager in _managers(hook)]
    return next((str(getattr(found, "name", found)) for found in contexts if found is not None), "")


def _is_empty(hook: Any, context: str) -> bool:
    """Whether a hook has nothing cached; one of an unknown kind is taken to have."""
    managers = _managers(hook)
    if managers:
        return all(context not in manager._state_cache for manager in managers)
    state = getattr(hook, "state", None)
    return getattr(state, "cache", "unknown") is None


def _empty(hooks: list[tuple[nn.Module, Any]]) -> None:
    """Reset hooks in the middle of a forward: the context they are in stays."""
    for part, hook in hooks:
        contexts = [(manager, manager._context) for manager in _managers(hook)]
        hook.reset_state(part)
        for manager, context in contexts:
            manager._context = context
