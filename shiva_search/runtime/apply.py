"""Put a plan on a model and take it off again. In: model, plan, scorer. Out: a handle whose removal leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.runtime.bypass import AffineBypass, module_of
from shiva_search.runtime.compiled import compiled_attend_all, compiled_forwards
from shiva_search.runtime.graphs import ForwardGraphs
from shiva_search.runtime.places import Attached, StandIn
from shiva_search.runtime.pruned_block import Controller, Gate, PrunedBlock
from shiva_search.runtime.reuse import ReusedUpdates
from shiva_search.runtime.scorers import TokenScorer, scorer_by_name

_MARK = "_shiva_plan"


class AppliedPlan:
    """Hooks on a model, until `remove()` or the end of a `with` block.

    Args:
        model: it keeps its class, its weights and its other hooks.
        plan: tokens kept per layer.
        scorer: ranks tokens, or the name of one that needs no training.
        guidance: whether the two halves of a batch share one selection (eq. 32). None: they do where both hold the same
            images, as pipelines build them for guidance.
        gate: training's estimator.
        bypasses: the rejected path by layer; None: the scorer's own, if it has one.
        reuse_updates: a rejected token is moved as its block last moved it, if that was no more than so many steps of
            the sampler ago; 0: never. Costs memory and time that no profile has measured. See ReusedUpdates for how
            steps and images are told apart.

    Raises:
        InputError: the plan does not fit the model (layers, tokens, fingerprint), asks for a bypass that is not there,
            or for keys of all tokens in a block that cannot have them; fewer steps of reuse than none.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        scorer: TokenScorer | str = "stride",
        *,
        guidance: bool | None = None,
        gate: Gate | None = None,
        bypasses: Mapping[int, AffineBypass] | None = None,
        reuse_updates: int = 0,
    ) -> None:
        if plan.layer_count != model.layer_count or plan.tokens != model.tokens:
            raise InputError(
                f"this plan is for {plan.layer_count} layers of {plan.tokens} tokens, "
                f"the model has {model.layer_count} layers of {model.tokens}; search again for this model"
            )
        plan.check_model(model.fingerprint())
        self.model = model
        self.plan = plan
        scorer = scorer_by_name(scorer) if isinstance(scorer, str) else scorer
        self.controller = Controller(
            rows=plan.rows,
            tokens=plan.tokens,
            scorer=scorer,
            guidance=bool(guidance),
            gate=gate,
            bypasses=getattr(scorer, "bypasses", {}) if bypasses is None else bypasses,
            reused=ReusedUpdates(reuse_updates) if reuse_updates else None,
        )
        self._check_rows()
        self._looks_for_halves = guidance is None
        # Asked once: what is computed when first used cannot be traced by torch.compile.
        self.root_arguments, self._has_joint_blocks = model.root_arguments, model.has_joint_blocks
        self._afterwards: list[Callable[[], object]] = []
        remove_plan(model.module)  # a new plan replaces an old one
        self._blocks = [
            Attached(layer.module, partial(PrunedBlock, layer, controller=self.controller)) for layer in model.layers
        ]
        self._root = Attached(model.module, partial(_PlannedForward, self))
        self._compiled: list[tuple[nn.Module, Any]] = []
        self.graphs: ForwardGraphs | None = None
        object.__setattr__(model.module, _MARK, self)

    def _check_rows(self) -> None:
        for row in self.plan.rows:
            for layer, choice in zip(self.model.layers, row, strict=True):
                if choice >= self.plan.tokens:
                    continue
                bypass = self.controller.bypasses.get(layer.index)
                if choice.rank and (bypass is None or choice.rank not in bypass.ranks):
                    known = "none" if bypass is None else f"one with ranks {', '.join(map(str, bypass.ranks))}"
                    raise InputError(
                        f"layer {layer.index} of this plan sends rejected tokens through a bypass of rank "
                        f"{choice.rank}, and its selector has {known}; "
                        "pass the selector the plan was made with (selector.safetensors)"
                    )
                if choice.attend == "all" and choice > 0 and not layer.attends_all:
                    raise InputError(
                        f"layer {layer.index} of this plan attends to all tokens, which {type(layer.module).__name__} "
                        f"of family {self.model.family.name!r} cannot; use a plan with attend kept"
                    )

    def put_on(self) -> None:
        """Put the plan on again after `take_off`."""
        if getattr(self.model.module, _MARK, None) is not self:
            remove_plan(self.model.module)
            for block in self._blocks:
                block.put_on()
            self._root.put_on()
            object.__setattr__(self.model.module, _MARK, self)

    def compile(self, **options: Any) -> AppliedPlan:
        """Compile the blocks, until the plan is removed; nothing is compiled again once each has run.

        By default one graph per kind of block serves any number of tokens, and choosing them stays outside. With
        dynamic=False each block is compiled together with its choice, for the very number it keeps in each segment:
        that takes longer to compile and leaves less to do in each step. The model as a whole compiles too, with the
        plan on: torch.compile(model, fullgraph=True).

        Args:
            **options: of torch.compile.

        Returns:
            This handle.

        Raises:
            InputError: blocks are to be compiled with their choice, and the plan reuses updates of earlier steps.
        """
        if options.get("dynamic") is False and self.controller.reused is not None:
            raise InputError("updates of earlier steps are not reused with dynamic=False; leave out one of the two")
        if options.get("dynamic") is False:
            for layer in self.model.layers:
                self._compiled.append((layer.module, layer.module._compiled_call_impl))
                layer.module.compile(**options)
        else:
            blocks = [attached.stand_in for attached in self._blocks]
            forwards = zip(self.model.layers, [block.forward for block in blocks], strict=True)
            for block, forward in zip(blocks, compiled_forwards(forwards, **options), strict=True):
                block.compiled = forward
            shared: dict[str, Callable[..., Any]] = {}
            for block in blocks:
                if block.attend_all is not None:
                    block.compiled_attend_all = compiled_attend_all(block.layer, block.attend_all, shared, **options)
        return self

    def capture(self) -> AppliedPlan:
        """Run forwards without gradients as CUDA graphs from now on, until the plan is taken off.

        The first forward of each kind (shapes, dtypes, values that are no tensors, segment) records its graph, and
        whatever later ones change but tensors' values, they do without: put adapters on and compile the model before.
        Where weights move, graphs are recorded anew. Not with diffusers' caches, which decide on the host. Outputs are
        the caller's own.

        Returns:
            This handle.

        Raises:
            InputError: the plan reuses updates of earlier steps.
            UnavailableError: the model is not on a GPU.
        """
        if self.controller.reused is not None:
            raise InputError("updates of earlier steps are not reused in CUDA graphs; leave out one of the two")
        place = next(self.model.module.parameters()).device
        if place.type != "cuda":
            raise UnavailableError(f"CUDA graphs need a model on a GPU, this one is on {place}; move it there first")
        self.graphs = ForwardGraphs(self.model.module, module_of(self.controller.scorer))
        return self

    def row_of(self, t_B: torch.Tensor) -> int:
        """The plan's row for a forward, from its normalised time.

        Raises:
            InputError: the samples of a batch lie in several segments of the plan.
        """
        if len(self.plan.segments) == 1:
            return 0
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.controller.row  # nothing can be read back: that of the warm-ups before
        rows = {self.plan.row_at(t) for t in t_B.tolist()}
        if len(rows) > 1:
            raise InputError(
                f"samples of one batch lie in {len(rows)} timestep segments of the plan; "
                "run them in separate forwards, or use a plan with one segment"
            )
        return rows.pop()

    def begin(self, named: Mapping[str, Any]) -> None:
        """Read from the arguments of a forward what its blocks will ask for; the root's stand-in calls this.

        Raises:
            InputError: the samples of a batch lie in several segments of the plan.
        """
        controller = self.controller
        if self._has_joint_blocks:  # the other blocks see for themselves
            self.model.check_tokens(named, self.plan.tokens)
        controller.t_B = self.model.times(named)
        controller.history = None
        controller.row = self.row_of(controller.t_B)
        if controller.reused is not None:
            controller.reused.begin(controller.t_B, named[self.model.family.image_argument])
        if not torch.compiler.is_compiling():
            controller.entered.clear()
        if self._looks_for_halves:
            controller.halves = _equal_halves(named[self.model.family.image_argument])

    def end(self) -> None:
        """Let go of the forward's tensors, and make sure that no block ran without the plan.

        Raises:
            InputError: something took a block's stand-in away.
        """
        controller = self.controller
        controller.history = controller.t_B = controller.halves = None
        if torch.compiler.is_compiling():
            return
        for layer, block in zip(self.model.layers, self._blocks, strict=True):
            # A cache around the block may have left it out; then the way to it is still there.
            if layer.index not in controller.entered and not block.is_reachable():
                raise InputError(
                    f"block {layer.name} ran without the plan: its forward was replaced after the plan was applied; "
                    "apply the plan again, after whatever replaced it"
                )

    def forget_updates(self) -> None:
        """Begin another image, where updates of earlier steps are reused and it could be taken for the last one."""
        if self.controller.reused is not None:
            self.controller.reused.forget()

    def when_removed(self, undo: Callable[[], object]) -> None:
        """Call `undo` once the plan is off; the last one added comes first."""
        self._afterwards.append(undo)

    def take_off(self) -> None:
        """Take the hooks off for a while; `put_on` puts them on again, with all that was compiled for them."""
        self._root.take_off()
        for block in self._blocks:
            block.take_off()
            block.stand_in.held.release()
        self.forget_updates()
        if getattr(self.model.module, _MARK, None) is self:
            object.__delattr__(self.model.module, _MARK)

    def remove(self) -> None:
        """Take everything off; the model is as it was before, and other hooks on it stay. Safe to call twice."""
        self.take_off()
        self.graphs = None
        while self._compiled:
            module, before = self._compiled.pop()
            module._compiled_call_impl = before
        for block in self._blocks:
            block.stand_in.compiled = block.stand_in.compiled_attend_all = None
        while self._afterwards:
            self._afterwards.pop()()

    def __repr__(self) -> str:
        keep = sum(map(int, (k for row in self.plan.rows for k in row)))
        share = keep / len(self.plan.rows) / self.plan.layer_count / self.plan.tokens
        state = "on" if getattr(self.model.module, _MARK, None) is self else "off"
        return f"<plan on {self.model.name}: {share:.1%} of the tokens in {self.plan.layer_count} layers, {state}>"

    def __enter__(self) -> AppliedPlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _PlannedForward(StandIn):
    """Stands in for the model's forward: what blocks need to know of it is read before, and let go of afterwards."""

    def __init__(self, applied: AppliedPlan, forward: Callable[..., Any]) -> None:
        super().__init__(forward)
        self.applied = applied

    def stand_in(self, *args: Any, **kwargs: Any) -> Any:
        graphs = self.applied.graphs
        if graphs is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._planned(*args, **kwargs)
        with torch.cuda.device(next(self.applied.model.module.parameters()).device):
            t_B = self.applied.model.times(self._named(args, kwargs))
            return graphs.run(self._planned, args, kwargs, self.applied.row_of(t_B))

    def _planned(self, *args: Any, **kwargs: Any) -> Any:
        self.applied.begin(self._named(args, kwargs))
        output = self.forward(*args, **kwargs)
        self.applied.end()
        return output

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, **dict(zip(self.applied.root_arguments, args, strict=False))}


def _equal_halves(images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | None:
    """Whether both halves of a batch hold the same images, as a scalar on their device; None for an odd batch."""
    if len(images) % 2:
        return None
    if not isinstance(images, torch.Tensor):  # Z-Image takes a list
        images = torch.stack(list(images))
    first, second = images.chunk(2)
    return (first == second).all()


def remove_plan(module: nn.Module) -> None:
    """Take off whatever plan is on the module; nothing happens where there is none."""
    applied = getattr(module, _MARK, None)
    if applied is not None:
        applied.remove()
