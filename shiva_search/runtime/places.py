"""Where a module's forward hangs: put a stand-in under whatever hooks are on it, and take it off in any order.

accelerate and diffusers hook a module by putting a wrapper in `module.forward` and keeping what was there before. Both
put that back blindly when they are removed, which would lose a stand-in put on later, and bring back one taken off
meanwhile. So a stand-in goes where the innermost forward is kept: a cache or an offloading hook sees whole blocks,
whether it came before the plan or after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Generic, TypeVar

from torch import nn

Forward = Callable[..., Any]

#: Packages whose wrappers keep what they wrap in a place known to `_places`.
_KNOWN_HOOKS = ("accelerate.hooks", "diffusers.hooks")


@dataclass(frozen=True)
class Place:
    """One attribute that keeps a forward."""

    owner: Any
    name: str

    @property
    def forward(self) -> Forward:
        """What it keeps."""
        found: Forward = getattr(self.owner, self.name)
        return found

    def keep(self, forward: Forward) -> None:
        """Keep another one."""
        setattr(self.owner, self.name, forward)


class StandIn:
    """A forward in another's place; a child answers `stand_in`.

    Attributes:
        forward: what it stands in for.
        is_on: once false, calls go straight through: a wrapper of a kind not known here may hold on to it.
        function: what is put on the module. A function of its own, since torch.compile counts recompilations by code:
            blocks that keep different numbers of tokens would use up the limit of a shared one.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.is_on = True

        def call(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        self.function = FunctionType(call.__code__.replace(), call.__globals__, "forward", None, call.__closure__)
        self.function.__wrapped__ = forward  # type: ignore[attr-defined]  # who asks for its signature gets that one's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stand_in(*args, **kwargs) if self.is_on else self.forward(*args, **kwargs)

    def stand_in(self, *args: Any, **kwargs: Any) -> Any:
        """What runs instead of the forward."""
        raise NotImplementedError


_Stand = TypeVar("_Stand", bound=StandIn)


class Attached(Generic[_Stand]):
    """A stand-in put on a module.

    Args:
        make: forward -> what stands in for it.
    """

    def __init__(self, module: nn.Module, make: Callable[[Forward], _Stand]) -> None:
        self._module = module
        self.stand_in = make(_innermost(module).forward)
        self.put_on()

    def put_on(self) -> None:
        """Put it on, the first time or again."""
        place = _innermost(self._module)
        if place.forward is not self.stand_in.function:
            self._was_hidden = place.owner is self._module and place.name not in vars(self._module)
            self.stand_in.forward = place.forward
            place.keep(self.stand_in.function)
        self.stand_in.is_on = True

    def is_reachable(self) -> bool:
        """Whether the module still leads to it by wrappers that are known to keep what they wrap."""
        return any(place.forward is self.stand_in.function for place in _places(self._module))

    def take_off(self) -> None:
        """Put the forward back where the stand-in is found; other wrappers stay. Safe to call twice."""
        self.stand_in.is_on = False
        for place in list(_places(self._module)):
            if place.forward is self.stand_in.function:
                place.keep(self.stand_in.forward)
        own = getattr(self.stand_in.forward, "__func__", None) is type(self._module).forward
        if self._was_hidden and own and vars(self._module).get("forward") is self.stand_in.forward:
            del self._module.forward  # the class's own shows through again


def _places(module: nn.Module) -> Iterator[Place]:
    """Every place that keeps a forward of the module, outermost first as far as that is known."""
    names = vars(module)
    if "forward" in names:
        yield Place(module, "forward")
    if "_old_forward" in names:  # accelerate
        yield Place(module, "_old_forward")
    for reference in reversed(getattr(names.get("_diffusers_hook"), "_fn_refs", ())):
        yield Place(reference, "forward")
        if reference.original_forward is not None:
            yield Place(reference, "original_forward")


def _innermost(module: nn.Module) -> Place:
    """The place whose forward was made by no hook: the class's own, or a wrapper of a kind not known here."""
    made_by_none = [place for place in _places(module) if not _is_hook(place.forward)]
    return made_by_none[-1] if made_by_none else Place(module, "forward")


def _is_hook(forward: Forward) -> bool:
    if not isinstance(forward, functools.partial):
        return False
    return str(getattr(forward.func, "__module__", "")).startswith(_KNOWN_HOOKS)
