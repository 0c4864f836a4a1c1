"""A block whose kept tokens attend to the keys and values of all. In: its call, the kept tokens. Out: what it returns.

The block's own forward runs on the kept tokens, with few of its parts exchanged (`KeysOfAll` names them):
- the norm before the attention gets all tokens. Modulation acts on each token alone, so all reach the attention;
- the attention's own processor makes keys and values of all of them and queries of the kept ones, so the kept ones come
  out, and the block goes on with them.
Both run with a stand-in for `self`. Nothing is put on the modules, so nothing can be left behind, and LoRA, attention
backends and the user's own processors take effect as ever. Only hooks on the attention as a whole (not on its linear
layers) see no call.

Legend: B samples, S positions, N image tokens, K image tokens kept, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.blocks import BlockAdapter
from shiva_search.models.joint import START, rows_of_kept, take_rows


class AttendAll:
    """One block, as it runs where its kept tokens attend to all.

    Args:
        adapter: of the block; it has `keys_of_all`.
        block: it is not touched.
    """

    def __init__(self, adapter: BlockAdapter, block: nn.Module) -> None:
        assert adapter.keys_of_all is not None
        self.adapter, self.block, self.parts = adapter, block, adapter.keys_of_all
        # Asked of the classes once: torch.compile does not look into all classes of diffusers, but into functions.
        self.forward = type(block).forward
        attentions = {name: getattr(block, name, None) for name in self.parts.attention}
        self.attend = {name: type(part).forward for name, part in attentions.items() if part is not None}

    def __call__(self, kwargs: Mapping[str, Any], kept_BK: torch.Tensor, x_kept_BKD: torch.Tensor) -> Any:
        """The block's output for the kept tokens, and context that has attended to all.

        Args:
            kwargs: of the block as the runtime knows them, with all tokens.
            kept_BK: indices of the kept tokens.
            x_kept_BKD: the kept tokens.
        """
        adapter, block, parts = self.adapter, self.block, self.parts
        x_BND: torch.Tensor = kwargs[adapter.tokens]
        sequence_BSD: torch.Tensor = adapter.join(kwargs)[adapter.tokens]
        tokens, kept = int(x_BND.shape[1]), int(kept_BK.shape[1])  # a tracer that counts operations has tensors here

        def whole(given_BSD: torch.Tensor) -> torch.Tensor:
            """All tokens, in place of a sequence of the kept; a block may have put its context before them."""
            context = 0 if adapter.joint is not None else int(given_BSD.shape[1]) - kept
            all_BSD = sequence_BSD.to(given_BSD.dtype)
            return torch.cat([given_BSD[:, :context], all_BSD], dim=1) if context else all_BSD

        def left(all_BSD: torch.Tensor) -> torch.Tensor:
            """The kept tokens of a sequence of all, with the context that is in it."""
            length = int(all_BSD.shape[1])
            if length == tokens:
                return take_rows(all_BSD, kept_BK)
            start = length - tokens if adapter.joint is None else kwargs[START]
            return take_rows(all_BSD, rows_of_kept(start, kept_BK, tokens, length))

        def of_all(given_BSD: torch.Tensor, *args: Any, **named: Any) -> Any:
            return getattr(block, parts.norm)(whole(given_BSD), *args, **named)

        def of_kept(part: nn.Module, all_BSD: torch.Tensor) -> Any:
            return part(left(all_BSD))

        attend = _with_other_keys if parts.cuts_by_input else _with_fewer_queries
        exchanged = {
            parts.norm: of_all,
            **{name: partial(attend, own, getattr(block, name), left) for name, own in self.attend.items()},
            **{name: partial(of_kept, getattr(block, name)) for name in parts.beside},
        }
        call = {**kwargs, adapter.tokens: x_kept_BKD}
        table = None if parts.rotary is None else kwargs.get(parts.rotary)
        if parts.rotary is not None and table is not None:
            call[parts.rotary] = _read_twice(adapter.gather(call, kept_BK, tokens)[parts.rotary], table)
        return adapter.apart(partial(self.forward, Exchanged(block, exchanged)))(**call)


class Exchanged:
    """A module with some of its parts exchanged, for functions that ask `self` for them."""

    def __init__(self, module: nn.Module, parts: Mapping[str, Any]) -> None:
        self._exchanged, self._others = parts, module

    def __getattr__(self, name: str) -> Any:  # asked for what is not found above
        return self._exchanged[name] if name in self._exchanged else getattr(self._others, name)


class QueriesThenKeys:
    """A rotary table, or a pair of them, for processors that read it first for the queries and then for the keys.

    All of diffusers do. In the other order, lengths would not fit.
    """

    def __init__(self, of_queries: Any, of_keys: Any) -> None:
        self._left = [of_keys, of_queries]

    def __iter__(self) -> Iterator[Any]:  # cos, sin = table
        return iter(self._next())

    def unsqueeze(self, dim: int) -> torch.Tensor:
        """As complex tables are read."""
        found: torch.Tensor = self._next().unsqueeze(dim)
        return found

    def _next(self) -> Any:
        if not self._left:
            raise InputError(
                "this attention processor reads rotary tables more than once for queries and once for keys, so the "
                "rows of kept tokens and of all cannot be told apart; use a plan with attend kept"
            )
        return self._left.pop()


def _read_twice(of_queries: Any, of_keys: Any) -> Any:
    """The two tables as one argument; image and text may have complex ones apart, of which the text's is the same."""
    if isinstance(of_keys, tuple) and of_keys[0].is_complex():
        pairs = zip(of_queries, of_keys, strict=True)
        return tuple(one if one is other else QueriesThenKeys(one, other) for one, other in pairs)
    return QueriesThenKeys(of_queries, of_keys)


_Rows = Callable[[torch.Tensor], torch.Tensor]


def _with_fewer_queries(forward: Any, attention: Any, left: _Rows, *args: Any, **named: Any) -> Any:
    """The attention on all tokens, of which only the kept have queries."""
    parts = {"to_q": lambda x_BSD: attention.to_q(left(x_BSD)), **_UNFUSED}
    return forward(Exchanged(attention, parts), *args, **named)


def _with_other_keys(
    forward: Any, attention: Any, left: _Rows, hidden_states: torch.Tensor, *args: Any, **named: Any
) -> Any:
    """The attention on the kept tokens, with keys and values of all in place of theirs."""
    parts = {"to_k": lambda x: attention.to_k(hidden_states), "to_v": lambda x: attention.to_v(hidden_states)}
    return forward(Exchanged(attention, {**parts, **_UNFUSED}), left(hidden_states), *args, **named)


def _no_fused(x_BSD: torch.Tensor) -> torch.Tensor:
    raise InputError(
        "an attention with fused projections makes queries, keys and values of the same tokens, and this plan attends "
        "to all tokens from some; call unfuse_qkv_projections() on the model, or use a plan with attend kept"
    )


#: Where an attention knows both ways, it takes the one with projections apart.
_UNFUSED = {"fused_projections": False, "to_qkv": _no_fused}
