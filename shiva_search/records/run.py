"""The files of a run: where each lies (RunFolder) and what summary.json holds (Summary). Nothing is read here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, by name (contract: Files). None of them has to exist yet.

    Attributes:
        path: the run's folder.
    """

    path: Path

    @property
    def settings(self) -> Path:
        """How the run was made."""
        return self.path / "run.json"

    @property
    def plan(self) -> Path:
        """The chosen plan."""
        return self.path / "plan.json"

    @property
    def summary(self) -> Path:
        """What came out: budget, dense, predicted and measured cost, error, and why figures are missing."""
        return self.path / "summary.json"

    @property
    def trials(self) -> Path:
        """Every plan the search evaluated, feasible or not."""
        return self.path / "trials.csv"

    @property
    def pareto_csv(self) -> Path:
        """The non-dominated plans."""
        return self.path / "pareto.csv"

    @property
    def measurements(self) -> Path:
        """Every interleaved measurement of a plan against the dense model."""
        return self.path / "measurements.csv"

    @property
    def training_csv(self) -> Path:
        """The selector's training, a row per logged step."""
        return self.path / "training.csv"

    @property
    def compare(self) -> Path:
        """The plan against the alternatives a user has."""
        return self.path / "compare.csv"

    @property
    def cost_model(self) -> Path:
        """The cost model that the search used, with its held-out error."""
        return self.path / "cost_model.json"

    @property
    def selector(self) -> Path:
        """The trained selector."""
        return self.path / "selector.safetensors"

    @property
    def warm_router(self) -> Path:
        """The router that judged plans during the search; workers need the same one."""
        return self.path / ".router.safetensors"

    @property
    def pareto_png(self) -> Path:
        """Error over cost: trials, front and chosen plan."""
        return self.path / "pareto.png"

    @property
    def pareto_svg(self) -> Path:
        """The same picture, to scale."""
        return self.path / "pareto.svg"

    @property
    def schedule_png(self) -> Path:
        """Tokens kept over layers and timestep segments."""
        return self.path / "schedule.png"

    @property
    def cost_model_png(self) -> Path:
        """Predicted against measured latency of held-out plans, and what each layer costs."""
        return self.path / "cost_model.png"

    @property
    def training_png(self) -> Path:
        """The training curve."""
        return self.path / "training.png"

    @property
    def samples_png(self) -> Path:
        """Images of the dense and the planned model from the same seeds."""
        return self.path / "samples.png"

    @property
    def report(self) -> Path:
        """The page with all of it."""
        return self.path / "report.html"


class Summary(TypedDict, total=False):
    """summary.json: what a run came to. Every key may be absent while the run is under way.

    Costs are of one denoising step and named as in CostEstimate: latency_ms, latency_ms_low, latency_ms_high, energy_j,
    power_w, peak_memory_mib, gflops, and ratio (to the dense latency, with ratio_low, ratio_high). None is unknown.
    """

    schema_version: int  # 1
    model: dict[str, Any] | str  # fingerprint ("name" is shown first), or the name
    device: dict[str, Any] | str  # Device.describe(), or the name
    workload: dict[str, Any]  # Workload.as_dict()
    budget: dict[str, Any]  # limits in numbers by budget metric; "shares" keeps what was asked as a share of dense
    holds: bool | None  # whether the measured plan keeps every limit; None: not measured
    used: dict[str, float]  # by budget metric: the share of the limit that the measured plan uses; above 1 breaks it
    dense: dict[str, Any]  # measured cost of the untouched model
    predicted: dict[str, Any]  # the plan's cost by the cost model
    measured: dict[str, Any]  # the plan's cost, measured interleaved with dense
    error: float | None  # NMSE of the planned model's output against the dense one's
    error_split: str  # inputs the error was taken on: "calibration" or "evaluation"
    error_inputs: str  # what they are: "real" or "random"; absent in runs of before
    rounds: list[dict[str, Any]]  # closed loop: round, predicted_ratio, measured_ratio, holds
    seconds: dict[str, float]  # wall time by stage: profile, warm_up, search, tune, measure
    note: str | None  # one sentence on what is special, such as a dense model that already fits
    alternatives: list[dict[str, Any]]  # rows of compare.csv
    reasons: dict[str, str]  # why a figure is missing, by "energy_j" or, for one part, "dense_energy_j"
    conditions: dict[str, Any]  # Device.conditions() around the measurement
    provenance: dict[
        str, Any
    ]  # seed, versions: whatever identifies the run; drift: Drift.as_dict() of a reused profile
