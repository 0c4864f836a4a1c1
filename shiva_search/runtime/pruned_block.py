"""One pruned block: score, gather, run the block on the kept tokens, scatter back. Knows tokens, not models.

Everything that varies between uses (how many tokens, which scorer, training or not) is read from one Controller,
so a plan can be changed without touching the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from shiva_search.errors import InputError
from shiva_search.models.attend_all import AttendAll
from shiva_search.models.joint import CONTEXT
from shiva_search.models.model import Layer
from shiva_search.records.plan import Kept
from shiva_search.runtime.bypass import AffineBypass, BypassBank, module_of
from shiva_search.runtime.places import StandIn
from shiva_search.runtime.reuse import ReusedUpdates
from shiva_search.runtime.scorers import History, TokenScorer
from shiva_search.runtime.step_caches import HeldChoice
from shiva_search.runtime.token_ops import gather_tokens, scatter_tokens, share_over_guidance, top_k


class Gate(Protocol):
    """What training adds to the selection; forward values stay the same to the bit (selection/gates.py)."""

    def perturb(self, scores_BN: torch.Tensor) -> torch.Tensor: ...

    def inclusion(self, scores_BN: torch.Tensor, k: int, layer: int) -> torch.Tensor: ...

    def enter(self, x_kept_BKD: torch.Tensor, pi_kept_BK: torch.Tensor) -> torch.Tensor: ...

    def leave(self, x_kept_BKD: torch.Tensor, out_kept_BKD: torch.Tensor, pi_kept_BK: torch.Tensor) -> torch.Tensor: ...

    def stay(self, x_BND: torch.Tensor, pi_BN: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Resume:
    """Where a forward may start again: what came out of `layer`, and the history after it."""

    layer: int
    output: Any
    history: History | None


@dataclass
class Controller:
    """What the pruned blocks of one model read during a forward.

    Attributes:
        rows: what each layer does, a row per segment: tokens kept, or `Kept` with a bypass or another attention.
        row: the row in force, set from the timestep at the start of each forward.
        tokens: N.
        scorer: ranks tokens.
        guidance: the batch holds two halves that share one selection (eq. 32).
        halves: where guidance is not known beforehand: a scalar tensor, true if the forward under way has two halves
            of equal images. It stays on its device, so that nothing waits for it.
        gate: training's estimator, or None.
        bypasses: the rejected path by layer, for layers that ask for a rank of it.
        t_B: normalised time of the forward under way.
        history: kept up to date where the scorer asks for it.
        record: layers whose output is wanted; they land in `recorded`.
        resume: start at this point instead of the first layer.
        entered: layers whose block was called in the forward under way; not kept up inside a compiled one.
        reused: updates of earlier steps, for rejected tokens; None: none are kept.
        observer: called as (layer, x_BND, output tokens [B, N, D], kept_BK or None) after each layer.
    """

    rows: Sequence[Sequence[int]]
    tokens: int
    scorer: TokenScorer
    guidance: bool = False
    halves: torch.Tensor | None = None
    gate: Gate | None = None
    bypasses: Mapping[int, AffineBypass] = field(default_factory=dict)
    row: int = 0
    t_B: torch.Tensor | None = None
    history: History | None = None
    record: frozenset[int] = frozenset()
    recorded: dict[int, Resume] = field(default_factory=dict)
    resume: Resume | None = None
    entered: set[int] = field(default_factory=set)
    reused: ReusedUpdates | None = None
    observer: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], None] | None = None

    def reuses_at(self, layer: int) -> ReusedUpdates | None:
        """Where updates of earlier steps are kept for this layer: one that some row prunes but does not skip."""
        if self.reused is None or self.gate is not None:
            return None
        return self.reused if any(0 < row[layer] < self.tokens for row in self.rows) else None

    @property
    def ranks_by_bypass(self) -> bool:
        """Whether tokens are ranked by what their bypass misses."""
        return isinstance(self.scorer, BypassBank)

    def scores(
        self, layer: int, rank: int, x_BND: torch.Tensor, condition_BC: torch.Tensor, hidden_BNQ: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores [B, N] of one layer, shared between guidance halves where the batch has them.

        Args:
            layer: index.
            rank: of the layer's bypass.
            x_BND: tokens.
            condition_BC: the backbone's embedding of timestep and condition.
            hidden_BNQ: what the layer's bypass read of the tokens for this rank; needed where it ranks them.
        """
        assert self.t_B is not None
        if self.t_B.device != x_BND.device:  # an offloading hook moved the tokens after the forward began
            self.t_B = self.t_B.to(x_BND.device)
            self.halves = None if self.halves is None else self.halves.to(x_BND.device)
        if self.ranks_by_bypass:
            bypass = self.bypasses[layer]
            if torch.is_grad_enabled():  # a ranking learns from what it did, not from how the tokens came about
                hidden_BNQ = bypass.read(x_BND.detach(), condition_BC.detach(), self.row, rank)
            assert hidden_BNQ is not None
            scores_BN = hidden_BNQ[..., -1]
        elif getattr(self.scorer, "uses_history", False):
            history = self.history or _no_history(x_BND)
            scores_BN = self.scorer(x_BND, self.t_B, condition_BC, layer, history=history)  # type: ignore[call-arg]
        else:
            scores_BN = self.scorer(x_BND, self.t_B, condition_BC, layer)
        if len(scores_BN) % 2 or not (self.guidance or self.halves is not None):
            return scores_BN  # an odd batch has no halves: a pipeline may run the conditional half alone
        shared_BN = share_over_guidance(scores_BN)
        return shared_BN if self.halves is None else torch.where(self.halves, shared_BN, scores_BN)

    def remember(self, x_BND: torch.Tensor, out_BND: torch.Tensor, kept_BK: torch.Tensor | None) -> None:
        """Update the history after a layer; kept_BK is None where all tokens were processed."""
        if not getattr(self.scorer, "uses_history", False):
            return
        with torch.no_grad():
            before = self.history or _no_history(x_BND)
            age_BN, update_size_BN = before.age_BN + 1, before.update_size_BN
            if getattr(self.scorer, "uses_update_size", True):
                update_size_BN = (out_BND - x_BND).float().norm(dim=-1)
            age_BN = torch.zeros_like(age_BN) if kept_BK is None else age_BN.scatter(1, kept_BK, 0.0)
            self.history = History(age_BN, update_size_BN)


def _follow(scorer: TokenScorer, device: torch.device) -> None:
    """Move a selector to where an offloading hook moved the tokens. Not to the meta device, which would lose it."""
    selector = module_of(scorer)
    if selector is None or device.type == "meta":
        return
    first = next(selector.parameters(), None)
    if first is not None and first.device != device:
        selector.to(device)


def _no_tokens(x_BND: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(x_BND), 0, dtype=torch.int64, device=x_BND.device)


def _no_history(x_BND: torch.Tensor) -> History:
    zeros_BN = torch.zeros(x_BND.shape[:2], device=x_BND.device)
    return History(zeros_BN, zeros_BN)


class PrunedBlock(StandIn):
    """Stands in for a block's forward. With all tokens kept it calls the block as it was called, bit for bit.

    Attributes:
        held: the choice that a cache inside the block belongs to.
        attend_all: what runs the block where kept tokens attend to all; None where it cannot.
        compiled, compiled_attend_all: the forward and that after torch.compile, where they are to run instead.
    """

    def __init__(self, layer: Layer, forward: Callable[..., Any], controller: Controller) -> None:
        super().__init__(forward)
        self.layer = layer
        self.controller = controller
        self.held = HeldChoice(layer.module)
        self.compiled: Callable[..., Any] | None = None
        self.attend_all = AttendAll(layer.adapter, layer.module) if layer.attends_all else None
        self.compiled_attend_all: Callable[..., Any] | None = None

    def stand_in(self, *args: Any, **kwargs: Any) -> Any:
        """The block on the tokens it keeps.

        Raises:
            InputError: another number of image tokens than the plan is for.
        """
        adapter = self.layer.adapter
        forward = self.forward if self.compiled is None else self.compiled
        kwargs.update(zip(self.layer.arguments, args, strict=False))
        if adapter.joint is None or CONTEXT in kwargs:
            return self._run(forward, kwargs)
        apart = adapter.apart(forward)
        whole = adapter.around(lambda **split: self._run(apart, split), self.layer.arguments, self.controller.tokens)
        return whole(**kwargs)

    def _run(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Image tokens alone in their argument; `forward` takes them so."""
        controller, adapter, index = self.controller, self.layer.adapter, self.layer.index
        x_BND: torch.Tensor = kwargs[adapter.tokens]
        if x_BND.shape[1] != controller.tokens:
            raise InputError(
                f"this plan is for {controller.tokens} image tokens, the model was called with {x_BND.shape[1]}; "
                "search again at this resolution"
            )
        if not torch.compiler.is_compiling():
            controller.entered.add(index)
        resume = controller.resume
        if resume is not None and index <= resume.layer:
            if index < resume.layer:
                return adapter.pack(x_BND, kwargs.get(adapter.context) if adapter.context else None)
            controller.history = resume.history
            return resume.output
        choice = Kept.of(controller.rows[controller.row][index])
        if choice >= controller.tokens:
            if not torch.compiler.is_compiling():
                self.held.find(len(x_BND), int(choice))
                self.held.hold(len(x_BND), int(choice), None)
            output, kept_BK = forward(**kwargs), None
            reused = controller.reuses_at(index)
            if reused is not None:
                reused.keep(index, x_BND, adapter.unpack(output)[0], None)
        else:
            output, kept_BK = self._pruned(x_BND, choice, forward, kwargs)
        if controller.observer is not None or getattr(controller.scorer, "uses_history", False):
            out_BND, _ = adapter.unpack(output)
            controller.remember(x_BND, out_BND, kept_BK)
            if controller.observer is not None:
                controller.observer(index, x_BND, out_BND, kept_BK)
        if index in controller.record:
            controller.recorded[index] = Resume(index, output, controller.history)
        return output

    def _pruned(
        self, x_BND: torch.Tensor, choice: Kept, forward: Callable[..., Any], kwargs: dict[str, Any]
    ) -> tuple[Any, torch.Tensor]:
        controller, adapter, block = self.controller, self.layer.adapter, self.layer.module
        index, k, rank, gate = self.layer.index, int(choice), choice.rank, controller.gate
        context = kwargs.get(adapter.context) if adapter.context else None
        if not (k or rank):
            return adapter.pack(x_BND, context), _no_tokens(x_BND)
        if not torch.compiler.is_compiling():
            _follow(controller.scorer, x_BND.device)
        condition_BC = adapter.condition(block, kwargs)
        hidden_BNQ, rejected_BND = None, x_BND
        if rank or controller.ranks_by_bypass:
            bypass = controller.bypasses[index]
            hidden_BNQ = bypass.read(x_BND, condition_BC, controller.row, rank)
            if rank:
                rejected_BND = bypass.move(x_BND, hidden_BNQ, rank, controller.row)
        if not k:
            return adapter.pack(rejected_BND, context), _no_tokens(x_BND)
        reused = controller.reuses_at(index)
        if reused is not None:
            rejected_BND = reused.moved(index, x_BND, rejected_BND)
        if gate is None:
            kept_BK = self._chosen(x_BND, condition_BC, choice, hidden_BNQ)
        else:
            scores_BN = gate.perturb(controller.scores(index, rank, x_BND, condition_BC, hidden_BNQ))
            kept_BK = top_k(scores_BN.detach(), k)
        x_kept_BKD = gather_tokens(x_BND, kept_BK)
        entering_BKD = x_kept_BKD
        if gate is not None:
            pi_BN = gate.inclusion(scores_BN, k, index)
            pi_kept_BK = pi_BN.gather(1, kept_BK)
            entering_BKD = gate.enter(x_kept_BKD, pi_kept_BK)
            rejected_BND = gate.stay(rejected_BND, pi_BN)
        if choice.attend == "all":
            attend_all = self.compiled_attend_all or self.attend_all
            assert attend_all is not None  # AppliedPlan has seen to it
            output = attend_all(kwargs, kept_BK, entering_BKD)
        else:
            output = forward(**adapter.gather({**kwargs, adapter.tokens: entering_BKD}, kept_BK, controller.tokens))
        out_BKD, out_context = adapter.unpack(output)
        if gate is not None:
            # With a bypass, the difference of the two paths is block output minus bypass output.
            other_BKD = gather_tokens(rejected_BND, kept_BK) if rank else x_kept_BKD
            out_BKD = gate.leave(other_BKD, out_BKD, pi_kept_BK)
        # What a bypass, or an update of before, made is ours alone, so the kept rows may be written into it.
        own = gate is None and rejected_BND is not x_BND and not torch.is_grad_enabled()
        out_BKD = out_BKD.to(rejected_BND.dtype)  # a block may answer in another one under autocast
        if reused is not None:
            reused.keep(index, x_BND, out_BKD, kept_BK)
        return adapter.pack(scatter_tokens(rejected_BND, kept_BK, out_BKD, own=own), out_context), kept_BK

    def _chosen(
        self, x_BND: torch.Tensor, condition_BC: torch.Tensor, choice: Kept, hidden_BNQ: torch.Tensor | None
    ) -> torch.Tensor:
        """Indices [B, K] of the tokens to keep; a cache inside the block may hold those of a step before."""
        eager, k = not torch.compiler.is_compiling(), int(choice)
        kept_BK = self.held.find(len(x_BND), k) if eager else None
        if kept_BK is None:
            scores_BN = self.controller.scores(self.layer.index, choice.rank, x_BND, condition_BC, hidden_BNQ)
            kept_BK = top_k(scores_BN.detach(), k)
            if eager:
                self.held.hold(len(x_BND), k, kept_BK)
        return kept_BK
