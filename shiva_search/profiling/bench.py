"""Everything there is to measure of a model, as cells of one sampler. In: a model and a device. Out: the sampler.

Cells: each block signature at a grid of tokens kept, selection included; the selection alone; what lies outside the
blocks; and random plans from end to end, which tell what blocks measured one by one do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shiva_search.devices.base import Device
from shiva_search.errors import InputError
from shiva_search.models.model import Layer, Model
from shiva_search.profiling.conditions import Part, is_meta, parts_of, without_blocks
from shiva_search.profiling.end_to_end import (
    capture_for,
    dense_cell,
    energy_reason,
    other_costs,
    plan_cell,
    random_rows,
)
from shiva_search.profiling.sample_log import SampleLog
from shiva_search.profiling.sampler import Cell, Group, InTurn, Sampler
from shiva_search.profiling.staircase import Point, alignment_of, next_counts, token_grid
from shiva_search.profiling.statistics import Estimate
from shiva_search.records.cost_table import extra_parts
from shiva_search.records.plan import PLAIN, Kept, Plan, row_as_json
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.pruned_block import Controller, PrunedBlock
from shiva_search.runtime.scorers import History, TokenScorer

BLOCKS, FORWARDS = "blocks", "forwards"
SHARES = {BLOCKS: 0.4, FORWARDS: 0.6}  # of the time
_PLANS = 28  # random plans from end to end, time permitting
_SAMPLES_PER_PLAN = 6
ENERGY_POINTS = 4  # counts per signature; power varies little between
_ATTEND_POINTS = 6  # counts per signature at which kept tokens also attend to all
_PROBES = 24  # counts added to locate steps, per signature
_ENOUGH_TO_JUDGE = 8  # samples of every count of a curve, before steps are looked for; no cell is done with fewer


@dataclass(frozen=True)
class BlockCell:
    """Which block doing what; `selection`: the selection alone, the block left out."""

    signature: str
    choice: Kept
    selection: bool = False

    @property
    def tokens_kept(self) -> int:
        return int(self.choice)

    @property
    def is_plain(self) -> bool:
        return not self.selection and self.choice.variant == PLAIN

    @property
    def name(self) -> str:
        what = "selection" if self.selection else "block"
        return " ".join([what, self.signature, str(self.tokens_kept), *extra_parts(self.choice)])


class Bench:
    """Everything there is to measure of one model, as cells of one sampler.

    Args:
        model: real, or on the meta device.
        device: where it runs.
        scorer: what selects tokens inside pruned cells.
        seed: of inputs, plans and order.
        counts: tokens kept to measure; None: a grid that fits the device, with more where the cost jumps.
        clock: seconds.
    """

    def __init__(
        self,
        model: Model,
        device: Device,
        scorer: TokenScorer,
        seed: int,
        counts: Sequence[int] | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.device, self.scorer, self.seed, self.clock = model, device, scorer, seed, clock
        self.tokens = model.tokens
        self.alignment = alignment_of(device.torch_device.type, self.tokens)
        self.explores = counts is None
        self.counts = token_grid(self.tokens, self.alignment) if counts is None else checked_counts(counts, self.tokens)
        self.parts = {part.signature: part for part in parts_of(model, device.torch_device, seed)}
        self._bypasses = dict(getattr(scorer, "bypasses", {}))
        if self._bypasses:  # the first layer has none, but its block is measured among its like
            self._bypasses[0] = self._bypasses[1]
        self.ranks = tuple(rank for rank in getattr(scorer, "ranks", ()) if rank)
        self.attending = {part.signature for part in self.parts.values() if part.layers[0].attends_all}
        self.has_energy = False
        self.blocks: dict[str, BlockCell] = {}
        self.rows: list[tuple[int, ...]] = []
        self.others: dict[str, dict[str, float | None]] = {}
        self.sampler: Sampler
        # Before any plan is put on: cells added during the run must not capture the hooks of another.
        self._plain = {
            layer.name: layer.adapter.apart(layer.module.forward)
            for part in self.parts.values()
            for layer in part.layers
        }
        self._t_B = model.times(model.example(seed)).to("meta" if is_meta(model) else device.torch_device)
        if self._t_B.is_meta:
            self._t_B = torch.full(self._t_B.shape, 0.5, device=device.torch_device)

    def choose_rows(self, count: int | None, seconds: float) -> list[tuple[int, ...]]:
        """Random plans, as many as `seconds` allow; none where the model is not whole in memory."""
        if is_meta(self.model):
            return []
        dense = dense_cell(self.model, self.seed)
        dense.run()
        pair_s = 1.6e-3 * self.device.time_ms(dense.run)
        if count is None:
            count = max(6, min(_PLANS, int(seconds * SHARES[FORWARDS] / pair_s / _SAMPLES_PER_PLAN)))
        # Half of the plans keep counts of the grid, which they teach most about; half keep any, so that the error on
        # held-out plans has in it what straight lines between counts miss.
        layers = self.model.layer_count
        rows = random_rows(layers, self.tokens, (count + 1) // 2, self.seed, self.counts)
        return self._varied(rows + random_rows(layers, self.tokens, count // 2, self.seed + 1))

    def _varied(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The same counts; every other plan has layers of all variants, as a search over these would."""
        rng, varied = np.random.default_rng(self.seed), []
        for index, row in enumerate(rows):
            if index % 2 or not (self.ranks or self.attending):
                varied.append(row)
                continue
            drawn = []
            for layer, k in zip(self.model.layers, row, strict=True):
                rank = int(rng.choice([0, *self.ranks]))
                everyone = 0 < k < self.tokens and layer.signature in self.attending and rng.random() < 0.5
                drawn.append(Kept(k, rank, "all" if everyone else "kept") if k < self.tokens else Kept(k))
            varied.append(tuple(drawn))
        return varied

    def prepare(self, rows: Sequence[tuple[int, ...]], log: SampleLog | None) -> None:
        """Build the cells.

        Args:
            rows: plans to measure from end to end.
            log: where samples go, and come from after an interruption.
        """
        self.rows = list(rows)
        first = next(iter(self.parts.values()))
        reference = Cell("reference block", self._runner(first, self.tokens), "")
        groups = [Group(BLOCKS, reference, SHARES[BLOCKS])]
        cells = [cell for part in self.parts.values() for k in self.counts for cell in self._cells(part, k)]
        cells += [self._cell(part, choice) for part in self.parts.values() for choice in self._variants(part)]
        cells.append(self._rest_cell())
        self.has_energy = energy_reason(self.device) is None
        if not is_meta(self.model):
            groups.append(Group(FORWARDS, dense_cell(self.model, self.seed), SHARES[FORWARDS]))
            workload = self.model.workload.as_dict()
            for row in self.rows:
                plan = Plan.from_rows(self.model, [row], workload=workload)
                cells.append(plan_cell(self.model, plan, self.scorer, plan_name(row), self.seed))
        capture = capture_for(self.model, self.device)
        self.sampler = Sampler(self.device, groups, cells, seed=self.seed, log=log, capture=capture, clock=self.clock)

    def open_count(self) -> int:
        """Cells not known well enough yet."""
        return sum(len(self.sampler.open_cells(group)) for group in self.sampler.groups)

    def look_for_steps(self) -> None:
        """Add cells where a curve rises by more than its surroundings explain."""
        if not self.explores:
            return
        for part in self.parts.values():
            estimates = {key: self.sampler.estimate(key) for key in self._keys(part.signature)}
            if any(found is None or found.samples < _ENOUGH_TO_JUDGE for found in estimates.values()):
                continue
            points = self.points(part.signature, estimates)
            wanted = next_counts(points, self.tokens, self.alignment)
            room = _PROBES + len(self.counts) - len(points)
            for k in wanted[: max(0, room)]:
                self.sampler.add(self._cells(part, k, selection=False))

    def other_costs(self, seconds: float) -> None:
        """Energy of a few counts per signature where there is a sensor, and peak memory of as many as time allows.

        Peak memory takes a profiler on some devices, and grows in straight lines: a few counts would do.
        """
        until = self.clock() + seconds
        wanted = [key for part in self.parts.values() for key in self._spread_keys(part.signature)] + ["rest"]
        share_s = seconds / (len(wanted) + 2)
        if FORWARDS in self.sampler.groups:
            self.others["dense"] = other_costs(
                self.sampler, self.device, self.sampler.groups[FORWARDS].reference, share_s
            )
        for key in wanted:
            self.others[key] = other_costs(self.sampler, self.device, self.sampler.cells[key], share_s)
        for key, cell in self.blocks.items():
            if cell.is_plain and key not in self.others and self.clock() < until:
                self.others[key] = {"peak_memory_mib": self.device.peak_memory_mib(self.sampler.cells[key].run)}

    def _keys(self, signature: str) -> list[str]:
        return [key for key, cell in self.blocks.items() if cell.signature == signature and cell.is_plain]

    def points(self, signature: str, estimates: Mapping[str, Estimate | None]) -> dict[int, Point]:
        """The plain curve of a signature as far as it is known, by tokens kept."""
        points = {}
        for key in self._keys(signature):
            known = estimates.get(key)
            if known is not None:
                # A 95 % interval is about two standard errors to either side.
                points[self.blocks[key].tokens_kept] = Point(known.ratio, known.half_width * known.ratio / 2)
        return points

    def _cells(self, part: Part, k: int, selection: bool = True) -> list[Cell]:
        cells = [self._cell(part, Kept(k))]
        if selection and 0 < k < self.tokens:
            alone = BlockCell(part.signature, Kept(k), selection=True)
            self.blocks[alone.name] = alone
            cells.append(Cell(alone.name, self._runner(part, k, alone=True), BLOCKS, target=0.1))
        return cells

    def _cell(self, part: Part, choice: Kept) -> Cell:
        block = BlockCell(part.signature, choice)
        self.blocks[block.name] = block
        return Cell(block.name, self._runner(part, choice), BLOCKS)

    def _variants(self, part: Part) -> list[Kept]:
        """What tells the cost of variants: bypasses at two counts, attention to all tokens at a few."""
        inside = [k for k in self.counts if 0 < k < self.tokens]
        if not inside:
            return []
        middle = min(inside, key=lambda k: abs(k - self.tokens // 2))
        found = [Kept(k, rank) for rank in self.ranks for k in (0, middle)]
        if part.signature in self.attending:
            last = len(inside) - 1
            spread = {inside[round(i * last / (_ATTEND_POINTS - 1))] for i in range(_ATTEND_POINTS)}
            found += [Kept(k, 0, "all") for k in sorted(spread)]
        return found

    def _runner(self, part: Part, k: int, alone: bool = False) -> Callable[[], object]:
        """Runs the blocks of a part in turn through the runtime's own path; `alone` leaves the block itself out."""
        controller = Controller(
            rows=[[k] * self.model.layer_count],
            tokens=self.tokens,
            scorer=self.scorer,
            guidance=self.model.workload.guidance,
            bypasses=self._bypasses,
            t_B=self._t_B,
        )
        if getattr(self.scorer, "uses_history", False):
            x_BND = part.kwargs[part.layers[0].adapter.tokens]
            seen_BN = torch.ones(x_BND.shape[:2], device=x_BND.device)
            controller.history = History(seen_BN, seen_BN)
        history = controller.history

        def runner(layer: Layer) -> Callable[[], object]:
            block = PrunedBlock(layer, _identity(layer) if alone else self._plain[layer.name], controller)

            def run() -> object:
                output = block(**part.kwargs)
                # Each run starts from the same state and leaves none: what a run frees, it has also allocated, which
                # is all that an allocator's account of one run can follow.
                controller.history = history
                return output

            return run

        return InTurn([runner(layer) for layer in part.layers])

    def _rest_cell(self) -> Cell:
        """A forward in which every block is skipped."""
        model = without_blocks(self.model, self.device.torch_device, self.seed)
        inputs = model.example(self.seed)
        plan = Plan.dense(model, workload=model.workload.as_dict())

        kept: list[AppliedPlan] = []

        def prepare() -> None:
            if kept:
                kept[0].put_on()
                return
            kept.append(AppliedPlan(model, plan, self.scorer))
            kept[0].controller.rows = [[0] * model.layer_count]

        # Skipped blocks never touch their weights, so those may exist as shapes only.
        return Cell("rest", lambda: model.module(**inputs), BLOCKS, prepare=prepare, target=0.03)

    def _spread_keys(self, signature: str) -> list[str]:
        """Cells of a few counts from a tenth of the tokens to all of them."""
        keys = sorted(self._keys(signature), key=lambda key: self.blocks[key].tokens_kept)
        keys = [key for key in keys if self.blocks[key].tokens_kept >= self.tokens // 10]
        last = len(keys) - 1
        return list(dict.fromkeys(keys[round(i * last / (ENERGY_POINTS - 1))] for i in range(ENERGY_POINTS)))


def plan_name(row: Sequence[int]) -> str:
    """The name of a plan's cell."""
    return "plan " + " ".join(str(entry).replace(" ", "") for entry in row_as_json(row))


def _identity(layer: Layer) -> Callable[..., Any]:
    adapter = layer.adapter
    return lambda **kwargs: adapter.pack(
        kwargs[adapter.tokens], kwargs.get(adapter.context) if adapter.context else None
    )


def checked_counts(counts: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Counts a user chose, with 0 and N.

    Raises:
        InputError: a count outside [0, N].
    """
    wrong = [k for k in counts if not 0 <= k <= tokens]
    if wrong:
        raise InputError(f"counts of tokens lie in [0, {tokens}], got {wrong[0]}; leave them out to use a grid")
    return tuple(sorted({0, *counts, tokens}))
