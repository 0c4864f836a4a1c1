"""What a plan costs in quality. In: a model, a scorer, a fixed batch. Out: errors of plans, cheaply.

The error is the NMSE of the model's output against the dense one, sum ||v_plan - v_dense||^2 / sum ||v_dense||^2, over
inputs that are the same for every plan (common random numbers) at stratified timesteps (eq. 15). Layers that two plans
share from the input on are run once; a plan that is clearly worse than a known one is dropped after part of the batch.

Legend: b samples of a chunk, N tokens, D width, S sketch entries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shiva_search.errors import InputError
from shiva_search.models.model import Batch, Model
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.memory import room_mib
from shiva_search.runtime.pruned_block import Controller
from shiva_search.runtime.scorers import TokenScorer, scorer_by_name
from shiva_search.search.candidates import Floats, Rows
from shiva_search.search.early_stop import expected, is_worse
from shiva_search.search.prefixes import Prefixes, Row
from shiva_search.search.sketches import count_sketch

#: (layer, tokens kept) -> predicted cost of running that block; any unit.
LayerCost = Callable[[int, int], float]

SKETCH = 512
#: MiB for the states of shared prefixes in main memory, and the share of what a GPU has free.
_ROOM = (512.0, 0.25)


@dataclass(frozen=True)
class Judged:
    """What is known of a plan's quality.

    Attributes:
        error: NMSE over the batch; an estimate where `complete` is false.
        samples: samples seen.
        complete: whether that is the whole batch.
        parts: squared error of each sample over the batch's mean dense energy, so that their mean is `error`.
        sketch: random projection [S] of the output difference on the probe chunks; its squared norm is about the NMSE.
    """

    error: float
    samples: int
    complete: bool
    parts: Floats
    sketch: Floats


@dataclass(frozen=True)
class _Chunk:
    """Part of the batch, all of one segment, spread evenly over its timesteps."""

    batch: Batch
    segment: int
    dense: torch.Tensor
    energy_b: torch.Tensor
    weight_b: torch.Tensor


class FidelityEvaluator:
    """Judges plans of one model with one scorer on one batch.

    Args:
        model: eval mode; its hooks are as before after every call.
        scorer: ranks the tokens; by name or callable.
        batch: fixed inputs; larger is less noisy.
        chunk: samples per forward.
        segments: timestep segments as intervals of [0, 1]; a row of tokens kept for each.
        probe: chunks per segment that are always run, and that sketches are made of.
        layer_cost: counts work by predicted cost, `fixed_cost` being the part outside of blocks; None: by tokens.
        memory_mib: room for the states of shared prefixes; None: half a gibibyte, or a quarter of what a GPU has free.
        autocast: compute in this type (torch.bfloat16) where the ranking of plans does not change; None: as it is.
        weight: (t_b) -> weight of each sample's error, for example what the sampler does with it; None: all alike.
        sketch: entries of the sketch.
    """

    def __init__(
        self,
        model: Model,
        scorer: TokenScorer | str,
        batch: Batch,
        chunk: int = 16,
        *,
        segments: Sequence[tuple[float, float]] = ((0.0, 1.0),),
        probe: int = 1,
        layer_cost: LayerCost | None = None,
        fixed_cost: float = 0.0,
        memory_mib: float | None = None,
        autocast: torch.dtype | None = None,
        weight: Callable[[torch.Tensor], torch.Tensor] | None = None,
        sketch: int = SKETCH,
    ) -> None:
        if len(batch) < 1 or chunk < 1:
            raise InputError(f"judging quality needs at least one sample and chunks of one, got {len(batch)}, {chunk}")
        self.model, self.batch, self.chunk = model, batch, chunk
        self.scorer = scorer_by_name(scorer) if isinstance(scorer, str) else scorer
        self.segments, self.probe, self.autocast, self.sketch_size = tuple(segments), probe, autocast, sketch
        self._cost = layer_cost or (lambda layer, k: k / model.tokens)
        self._fixed = fixed_cost
        self._dense_row: Row = (model.tokens,) * model.layer_count
        self._prefixes = Prefixes(room_mib(batch.t_B.device, *_ROOM) if memory_mib is None else memory_mib)
        self._known: OrderedDict[tuple[int, Row], tuple[torch.Tensor, Floats | None]] = OrderedDict()
        self._work = 0.0
        self._plan = Plan.from_rows(model, [self._dense_row])
        self._chunks = self._prepare(weight)
        self.energy = float(sum((c.energy_b * c.weight_b).sum() for c in self._chunks))

    @property
    def forwards(self) -> float:
        """Work so far, in forward passes of the dense model over the whole batch."""
        dense = self._fixed + sum(self._cost(layer, k) for layer, k in enumerate(self._dense_row))
        return self._work / (dense * len(self.batch))

    @property
    def samples(self) -> int:
        """Size of the batch."""
        return len(self.batch)

    def error(self, plan: Plan | Sequence[int] | Sequence[Sequence[int]]) -> float:
        """NMSE of a plan, or of its row(s) of tokens kept, over the whole batch.

        Raises:
            InputError: rows do not fit the segments of this evaluator.
        """
        return self.judge(self._rows(plan)).error

    def judge(
        self, rows: Rows, rival: Judged | None = None, like: Sequence[Judged] = (), doubt: float = 0.02
    ) -> Judged:
        """Judge a plan; stop early where it is clearly worse than `rival`.

        Args:
            rows: a row of tokens kept per segment.
            rival: a completely judged plan; None never stops.
            like: completely judged plans that tell what the samples left have in store, the most alike first; none:
                the rival alone.
            doubt: chance, each time the samples seen are looked at, of stopping a plan that is as good as the rival.
        """
        parts: list[Floats] = []
        sketch = np.zeros(self.sketch_size)
        estimate: float | None = None
        known_KN = np.array([other.parts for other in like or ([] if rival is None else [rival])])
        with torch.no_grad(), self._applied() as controller:
            for index, chunk in enumerate(self._chunks):
                squared_b, part = self._run(controller, index, rows[chunk.segment])
                parts.append(squared_b.double().numpy() * len(self.batch) / self.energy)
                if part is not None:
                    sketch += part
                seen_m = np.concatenate(parts)
                if rival is None or index + 1 < self._probe_chunks or len(seen_m) == len(self.batch):
                    continue
                error, deviation, freedom = expected(seen_m, known_KN)
                if is_worse(error, deviation, freedom, rival.error, doubt):
                    estimate = error
                    break
        seen_m = np.concatenate(parts)
        error = float(seen_m.mean()) if estimate is None else estimate
        scale = (len(self.batch) / (self._probe_samples * self.energy)) ** 0.5
        return Judged(error, len(seen_m), estimate is None, seen_m, sketch * scale)

    def probe_row(
        self, segment: int, rows: Sequence[Row], told: Callable[[float], None] | None = None
    ) -> tuple[Floats, Floats]:
        """Error and sketch of rows in one segment, on the probe chunks alone, in units of the whole batch's NMSE.

        Chunk by chunk, so that one dense pass feeds all rows that share its prefix.

        Args:
            told: the share that is done, after each row of each chunk.

        Returns:
            errors [R], sketches [R, S].
        """
        errors, sketches = np.zeros(len(rows)), np.zeros((len(rows), self.sketch_size))
        with torch.no_grad(), self._applied() as controller:
            chunks = [index for index in range(self._probe_chunks) if self._chunks[index].segment == segment]
            for turn, index in enumerate(chunks):
                self._run(controller, index, self._dense_row)
                for row_index, row in enumerate(rows):
                    squared_b, part = self._run(controller, index, row)
                    errors[row_index] += float(squared_b.double().sum())
                    assert part is not None
                    sketches[row_index] += part
                    if told is not None:
                        told((turn + (row_index + 1) / len(rows)) / len(chunks))
        scale = len(self.batch) / (self._probe_samples * self.energy)
        return errors * scale, sketches * scale**0.5

    def _rows(self, plan: Plan | Sequence[int] | Sequence[Sequence[int]]) -> Rows:
        if isinstance(plan, Plan):
            rows: Rows = plan.rows
        else:
            nested: Any = plan if plan and isinstance(plan[0], Sequence) else [plan]
            rows = tuple(tuple(Kept.of(k) for k in row) for row in nested)
        if len(rows) != len(self.segments) or any(len(row) != self.model.layer_count for row in rows):
            raise InputError(
                f"this evaluator takes {len(self.segments)} rows of {self.model.layer_count} entries, "
                f"got {[len(row) for row in rows]}"
            )
        return rows

    def _prepare(self, weight: Callable[[torch.Tensor], torch.Tensor] | None) -> list[_Chunk]:
        """Split the batch into chunks and run the dense model on each."""
        t_B = self.batch.t_B.detach().float().cpu()
        per_segment: list[list[torch.Tensor]] = []
        for low, high in self.segments:
            inside = (t_B >= low) & ((t_B < high) | ((t_B >= 1.0) & (high == 1.0)))
            members = torch.nonzero(inside).flatten()
            if not len(members):
                raise InputError(f"no sample has its timestep in segment [{low}, {high}); judge on more samples")
            members = members[t_B[members].argsort()]
            count = -(-len(members) // self.chunk)
            per_segment.append([members[j::count] for j in range(count)])
        depth = max(map(len, per_segment))
        order = [(s, parts[j]) for j in range(depth) for s, parts in enumerate(per_segment) if j < len(parts)]
        self._probe_chunks = sum(min(self.probe, len(parts)) for parts in per_segment)
        # A segment with fewer chunks than `probe` shifts nothing: chunks are dealt out round by round.
        chunks: list[_Chunk] = []
        with torch.no_grad(), self._applied() as controller:
            controller.record = frozenset({0})
            for segment, members in order:
                batch = self.batch.take(members)
                dense = self._forward(batch)
                # The first layer is dense in every plan, so this state serves them all.
                self._prefixes.put(len(chunks), self._dense_row, controller.recorded[0])
                weight_b = torch.ones(len(members)) if weight is None else weight(t_B[members]).float()
                energy_b = dense.float().flatten(1).square().sum(1).cpu()
                chunks.append(_Chunk(batch, segment, dense, energy_b, weight_b))
                self._work += len(members) * (
                    self._fixed + sum(self._cost(layer, k) for layer, k in enumerate(self._dense_row))
                )
        self._probe_samples = sum(len(c.batch) for c in chunks[: self._probe_chunks])
        return chunks

    @contextmanager
    def _applied(self) -> Iterator[Controller]:
        with AppliedPlan(self.model, self._plan, self.scorer, guidance=False) as applied:
            yield applied.controller

    def _forward(self, batch: Batch) -> torch.Tensor:
        if self.autocast is None:
            return self.model.predict(batch.inputs)
        with torch.autocast(batch.t_B.device.type, dtype=self.autocast):
            return self.model.predict(batch.inputs)

    def _run(self, controller: Controller, index: int, row: Row) -> tuple[torch.Tensor, Floats | None]:
        """Squared error of each sample [b] of a chunk, and on probe chunks the sketch of the difference."""
        key = (index, row)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        chunk = self._chunks[index]
        start = self._prefixes.longest(index, row)
        controller.rows, controller.resume = (row,), start
        first = 0 if start is None else start.layer + 1
        controller.record = self._prefixes.worth_keeping(row, first)
        controller.recorded = {}
        output = self._forward(chunk.batch)
        self._work += len(chunk.batch) * (self._fixed + sum(self._cost(i, row[i]) for i in range(first, len(row))))
        # Deep layers first: when room is short they are dropped first, being shared by the fewest plans.
        for layer in sorted(controller.recorded, reverse=True):
            self._prefixes.put(index, row, controller.recorded[layer])
        difference = (output.float() - chunk.dense.float()).flatten(1) * chunk.weight_b.sqrt().to(output.device)[
            :, None
        ]
        squared_b = difference.square().sum(1).cpu()
        part = None
        if index < self._probe_chunks:
            part = count_sketch(difference.flatten(), self.sketch_size, index)
        self._known[key] = squared_b, part
        if len(self._known) > 4096:
            self._known.popitem(last=False)
        return self._known[key]


def fidelity(
    model: Model,
    plan: Plan,
    selector: TokenScorer | str | None = None,
    split: str = "calibration",
    samples: int = 64,
    seed: int = 0,
    chunk: int = 16,
) -> float:
    """The quality figure the search minimises: NMSE of the planned model's output against the dense one.

    Args:
        model: the dense model.
        plan: tokens kept; its segments decide which row serves which timestep.
        selector: a scorer or its name; None: "stride".
        split: "calibration" (the search's own), "evaluation" (held out) or "train".
        samples: size of the batch, timesteps stratified.
        seed: same seed, same batch.
        chunk: samples per forward.

    Returns:
        0 for a plan that keeps all tokens; 1 is as far off as predicting zero.

    Raises:
        InputError: the plan is for another model, or a segment has no sample.
    """
    plan.check_model(model.fingerprint())
    batch = model.batch(split, samples, seed)
    evaluator = FidelityEvaluator(
        model, selector or "stride", batch, chunk, segments=plan.segments, memory_mib=0.0, sketch=1
    )
    return evaluator.error(plan)
