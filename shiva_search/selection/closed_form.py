"""Fit bypasses in closed form. In: a model and its training inputs. Out: a BypassBank, and what each layer explains.

A pass runs the dense model over the inputs once, block by block: a sample of each block's tokens goes into normal
equations (normal_equations.py), and nothing else is kept. From the second pass on some tokens of each layer leave by
the bypass of the pass before, so that a layer learns from tokens as they are behind pruned layers, not as in the dense
model.

Legend: B samples, N tokens, M of them drawn, D width, C condition width, E features of images, J gates, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from shiva_search.errors import InputError
from shiva_search.models.model import Layer, Model
from shiva_search.runtime.bypass import AffineBypass, BypassBank, image_features
from shiva_search.runtime.memory import room_mib
from shiva_search.runtime.places import Attached, StandIn
from shiva_search.runtime.token_ops import gather_tokens, top_k
from shiva_search.selection.normal_equations import NormalEquations, set_gates, solve
from shiva_search.selection.router import widths_of

_T = TypeVar("_T")

RANKS = (16, 32)
_KEEPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0)  # shares of tokens that stay with the block, drawn by layer and chunk
_GATES = 4
_PER_GATE = 64  # inputs: each tells of one value of the condition
_EQUATIONS_MIB, _FREE_SHARE = 2048.0, 0.5  # for normal equations, and of what a GPU has free, where that is more


@dataclass
class FitReport:
    """How well bypasses explain updates.

    Attributes:
        missed: by layer and rank, the share of the squared update that is left over, on inputs of the last pass,
            which the bypass judged there had not been fit on.
    """

    missed: dict[int, dict[int, float]] = field(default_factory=dict)


def fit_bypasses(
    model: Model,
    kind: str = "affine",
    ranks: Sequence[int] = RANKS,
    *,
    samples: int = 256,
    passes: int = 3,
    tokens_per_sample: int = 96,
    chunk: int = 16,
    segments: int = 1,
    gates: int | None = None,
    memory_mib: float | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[BypassBank, FitReport]:
    """Fit a bypass for every layer but the first, and scores of what it misses.

    Args:
        model: the model; its "train" split is drawn from, anew for each pass.
        kind: "mean" (the same update for all tokens) or "affine".
        ranks: on offer to plans; 0, standing still, is added.
        samples: inputs per pass.
        passes: at least 2: the first one sees the dense model alone.
        tokens_per_sample: tokens drawn from each input, in each layer.
        chunk: inputs per forward.
        segments: timestep segments with a bypass each.
        gates: by how many components of the condition the maps vary; None: as `gates_for` says, and fewer where there
            are few samples.
        memory_mib: for normal equations; None: 2 GiB, or half of what a GPU has free where that is more. Where all
            layers do not fit, a pass runs the model several times; what it finds is the same.
        seed: same seed, same bypass.
        progress: told short lines.

    Raises:
        InputError: bad settings.
    """
    if passes < 2 or samples < 1 or segments < 1:
        raise InputError(
            f"a fit takes at least 2 passes, 1 sample and 1 segment, got {passes}, {samples} and {segments}"
        )
    say = progress or (lambda line: None)
    offered = offered_ranks(kind, ranks)
    width, condition_width = widths_of(model)
    if gates is None:
        # As many on every machine: memory that happens to be free does not change what a bypass is.
        room = _EQUATIONS_MIB if memory_mib is None else memory_mib
        gates = min(gates_for(width, condition_width, segments, room), samples // _PER_GATE)
    device = next(model.module.parameters()).device
    if memory_mib is None:
        memory_mib = max(_EQUATIONS_MIB, room_mib(device, _EQUATIONS_MIB, _FREE_SHARE))
    at_once = max(1, int(memory_mib / _equations_mib(width, condition_width, segments, gates)))
    bank: BypassBank | None = None
    report = FitReport()
    for index in range(passes):
        made = BypassBank(model.layer_count, width, condition_width, kind, offered, segments, gates).to(device)
        layers = list(range(1, model.layer_count))
        for first in range(0, len(layers), at_once):
            wanted = layers[first : first + at_once]
            sums = {
                layer: [
                    NormalEquations.empty(width, condition_width, len(offered), gates if bank else 0, device)
                    for _ in range(segments)
                ]
                for layer in wanted
            }
            run = _Pass(model, bank, sums, tokens_per_sample, torch.Generator().manual_seed(seed * 1009 + index))
            run.over(samples, chunk, seed * passes + index)
            for layer in wanted:
                set_gates(made.bypasses[layer], sums[layer], None if bank is None else bank.bypasses[layer])
                for segment, found in enumerate(sums[layer]):
                    solve(made.bypasses[layer], found, segment)
                if bank is not None:
                    total = torch.stack([found.squared for found in sums[layer]]).sum(0)
                    report.missed[layer] = {
                        rank: float(total[1 + place] / total[0]) for place, rank in enumerate(offered)
                    }
        bank = made
        say(f"bypasses: pass {index + 1} of {passes} over {samples} inputs")
    assert bank is not None
    bank.model = model.fingerprint()
    missed = {str(layer): {str(rank): left for rank, left in row.items()} for layer, row in report.missed.items()}
    bank.origin = {"stage": "closed form", "samples": samples, "passes": passes, "seed": seed, "missed": missed}
    return bank.eval().requires_grad_(False), report


def offered_ranks(kind: str, ranks: Sequence[int] = RANKS) -> tuple[int, ...]:
    """Ranks a plan may ask for, 0 (rejected tokens stand still) among them; a mean bypass is on or off."""
    return tuple(sorted({0, *ranks})) if kind == "affine" else (0, 1)


def gates_for(width: int, condition_width: int, segments: int = 1, memory_mib: float = _EQUATIONS_MIB) -> int:
    """As many gates as equations of one layer fit half of the memory with, at most 4."""
    fits = (_equations_mib(width, condition_width, segments, count) <= memory_mib / 2 for count in range(1, _GATES + 1))
    return sum(fits)


def _equations_mib(width: int, condition_width: int, segments: int, gates: int) -> float:
    tokens = 2 * width * (1 + gates)
    return 8 * ((tokens + width + condition_width) ** 2 + tokens**2) * segments / 2**20


def untrained_bypasses(
    model: Model, kind: str = "affine", ranks: Sequence[int] = RANKS, segments: int = 1, seed: int = 0
) -> BypassBank:
    """Bypasses with small random weights, on the model's device: what they cost does not depend on what was learned."""
    offered, widths = offered_ranks(kind, ranks), widths_of(model)
    bank = BypassBank(model.layer_count, *widths, kind, offered, segments, gates_for(*widths, segments))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(1e-2 * torch.randn(parameter.shape, generator=generator))
    bank.model = model.fingerprint()
    device = next(model.module.parameters()).device
    return (bank if device.type == "meta" else bank.to(device)).eval().requires_grad_(False)


class _Pass:
    """One run of the model over its inputs, with every block watched."""

    def __init__(
        self,
        model: Model,
        bank: BypassBank | None,
        sums: dict[int, list[NormalEquations]],
        drawn: int,
        generator: torch.Generator,
    ) -> None:
        self.model, self.bank, self.sums = model, bank, sums
        self.drawn, self.generator = min(drawn, model.tokens), generator
        self.segment_B = torch.zeros(0, dtype=torch.int64)

    def over(self, samples: int, chunk: int, seed: int) -> None:
        """Run it; the model is as before afterwards."""
        watched = [Attached(layer.module, partial(_Watch, self, layer)) for layer in self.model.layers]
        try:
            with torch.no_grad():
                for batch in self.model.batch("train", samples, seed).chunks(chunk):
                    segments = len(next(iter(self.sums.values())))
                    self.segment_B = (batch.t_B.cpu() * segments).long().clamp(max=segments - 1)
                    self.model.predict(batch.inputs)
        finally:
            for block in reversed(watched):
                block.take_off()

    def see(self, layer: int, x_BND: torch.Tensor, out_BND: torch.Tensor, condition_BC: torch.Tensor) -> torch.Tensor:
        """Add up what a block did, and return its tokens as a pruned layer would leave them."""
        batch, tokens, _ = x_BND.shape
        bypass = None if self.bank is None else self.bank.bypasses[layer]
        hidden_BNQ = None if bypass is None else self._by_segment(bypass, x_BND, condition_BC)
        # Drawn in every layer, so that draws are the same however many layers are summed at once.
        drawn_BM = torch.rand(batch, tokens, generator=self.generator).topk(self.drawn, dim=1).indices
        if layer in self.sums:
            drawn_BM = drawn_BM.to(x_BND.device)
            x_BMD, f_BMD = gather_tokens(x_BND, drawn_BM), gather_tokens(out_BND - x_BND, drawn_BM)
            hidden_BMQ = None if hidden_BNQ is None else gather_tokens(hidden_BNQ, drawn_BM)
            image_BE = image_features(x_BND, condition_BC)
            gates_BJ = image_BE[:, :0] if bypass is None else bypass.gates_of(condition_BC)
            for segment, sums in enumerate(self.sums[layer]):
                rows = torch.nonzero(self.segment_B == segment).flatten().to(x_BND.device)
                if len(rows):
                    sums.add(
                        x_BMD[rows], f_BMD[rows], image_BE[rows], gates_BJ[rows], bypass,
                        None if hidden_BMQ is None else hidden_BMQ[rows], segment,
                    )  # fmt: skip
        if bypass is None or hidden_BNQ is None:
            return out_BND
        keep = self._one_of(_KEEPS)
        rank = self._one_of((*bypass.ranks, *bypass.ranks[1:]))  # standing still half as often
        scores_BN = bypass.scores(hidden_BNQ, rank)
        kept_BN = torch.zeros_like(scores_BN, dtype=torch.bool)
        kept_BN.scatter_(1, top_k(scores_BN, int(keep * tokens)), True)
        moved_BND = self._moved(bypass, x_BND, hidden_BNQ, rank) if rank else x_BND
        return torch.where(kept_BN[..., None], out_BND, moved_BND)

    def _one_of(self, choices: Sequence[_T]) -> _T:
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def _by_segment(self, bypass: AffineBypass, x_BND: torch.Tensor, condition_BC: torch.Tensor) -> torch.Tensor:
        if bypass.segments == 1:
            return bypass.read(x_BND, condition_BC)
        rows = [bypass.read(x_BND[i : i + 1], condition_BC[i : i + 1], int(s)) for i, s in enumerate(self.segment_B)]
        return torch.cat(rows)

    def _moved(self, bypass: AffineBypass, x_BND: torch.Tensor, hidden_BNQ: torch.Tensor, rank: int) -> torch.Tensor:
        if bypass.segments == 1:
            return bypass.move(x_BND, hidden_BNQ, rank)
        rows = [
            bypass.move(x_BND[i : i + 1], hidden_BNQ[i : i + 1], rank, int(s)) for i, s in enumerate(self.segment_B)
        ]
        return torch.cat(rows)


class _Watch(StandIn):
    """Stands in for a block: runs it whole, shows the pass what it did, hands on what a pruned layer would."""

    def __init__(self, run: _Pass, layer: Layer, forward: Callable[..., Any]) -> None:
        super().__init__(forward)
        self.run, self.layer = run, layer

    def stand_in(self, *args: Any, **kwargs: Any) -> Any:
        layer, adapter = self.layer, self.layer.adapter
        kwargs.update(zip(layer.arguments, args, strict=False))
        if layer.index == 0:  # dense in every plan
            return self.forward(**kwargs)
        forward = adapter.apart(self.forward)

        def watched(**split: Any) -> Any:
            out_BND, context = adapter.unpack(forward(**split))
            condition_BC = adapter.condition(layer.module, split)
            return adapter.pack(self.run.see(layer.index, split[adapter.tokens], out_BND, condition_BC), context)

        return adapter.around(watched, layer.arguments, self.run.model.tokens)(**kwargs)
