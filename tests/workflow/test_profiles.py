"""A profile that is there already is checked before it is believed. On a device whose true costs are known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from virtual_device import VirtualDevice, small_dit

from shiva_search.devices import open_device
from shiva_search.errors import InputError
from shiva_search.models.model import Model
from shiva_search.records.files import read_json
from shiva_search.records.profile import load_profile
from shiva_search.selection.router import Router
from shiva_search.workflow.opening import profile_folder
from shiva_search.workflow.profiles import Costs, take_profile, use_profile

SECONDS = 30.0


@pytest.fixture(scope="module")
def model() -> Model:
    return small_dit(layers=3)


@pytest.fixture(scope="module")
def recorded(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A profile's folder, taken on a steady machine, and its dense latency."""
    folder = tmp_path_factory.mktemp("recorded")
    costs = take(model, machine(), folder)
    assert costs.drift is None and costs.model.dense.latency_ms is not None
    return folder, costs.model.dense.latency_ms


@pytest.fixture
def folder(recorded: tuple[Path, float], tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded[0], tmp_path / "profile"))


def machine(speed: float = 1.0, **options: int) -> VirtualDevice:
    return VirtualDevice(1, lambda now_s: speed, noise=0.02, **options)


def take(model: Model, device: VirtualDevice, folder: Path, say: Callable[[str], None] = print, **more: float) -> Costs:
    options = {"seconds": SECONDS, "seed": 0, "resume": True, "scorer": Router.for_model(model, seed=0), **more}
    return take_profile(model, device, folder, progress=say, clock=device.clock, **options)  # type: ignore[arg-type]


def changed(model: Model, **workload: object) -> Model:
    """The model under another workload."""
    return replace(model, workload=model.workload.override(**workload))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_profile_that_holds_is_used_as_it_is(model: Model, recorded: tuple[Path, float], folder: Path) -> None:
    device = machine()
    costs = take(model, device, folder)
    assert device.now_s < SECONDS / 3
    assert costs.model.dense.latency_ms == recorded[1]
    check = read_json(folder / "profile.json", "profile")["provenance"]["last_check"]
    assert check == costs.drift
    assert check["verdict"] == "same" and check["done"] == "it holds"
    assert check["scale"] == pytest.approx(1.0, abs=0.03)
    assert abs(check["largest_change"]) < 0.03
    checked = set(check["changes"])
    dense = f"block {model.layers[0].signature} {model.tokens}"
    assert dense in checked and len(checked) >= 6  # the dense block, three counts, two plans, and variants of blocks


def test_another_clock_rescales_and_leaves_what_was_measured(
    model: Model, recorded: tuple[Path, float], folder: Path
) -> None:
    before = load_profile(folder)
    said: list[str] = []
    take(model, machine(1.15), folder, said.append)
    assert "latencies were rescaled" in said[-1]
    for _ in range(2):  # the factor is on what was measured, so it does not grow from check to check
        costs = take(model, machine(1.5), folder, said.append)
        assert costs.drift is not None and costs.drift["verdict"] == "rescale"
        assert costs.drift["scale"] == pytest.approx(1.5, rel=0.03)
        assert "latencies were rescaled" in said[-2]
        assert said[-1].startswith("warning: this machine is not as it was") and "with --no-resume" in said[-1]
        assert costs.model.dense.latency_ms == pytest.approx(1.5 * recorded[1], rel=0.03)
    after = load_profile(folder)
    assert (after.rows, after.forwards, after.dense) == (before.rows, before.forwards, before.dense)
    assert read_json(folder / "cost_model.json", "cost model")["evidence"]["dense_ms"] == before.dense["latency_ms"]


def test_other_ratios_lead_to_a_new_profile(model: Model, folder: Path) -> None:
    before = load_profile(folder)
    said: list[str] = []
    device = machine(tile=128)
    costs = take(model, device, folder, said.append)
    assert costs.drift is not None and costs.drift["verdict"] == "profile again"
    assert costs.drift["done"] == "it was taken again"
    assert abs(costs.drift["largest_change"]) > costs.drift["tolerance"]
    after = load_profile(folder)
    assert after.complete and after.rows != before.rows
    assert {sample.ms for sample in after.samples}.isdisjoint(sample.ms for sample in before.samples)
    assert len([line for line in said if "no longer this device's" in line]) == 1
    again = take(model, machine(tile=128), folder)
    assert again.drift is not None and again.drift["verdict"] != "profile again"


def test_no_resume_measures_without_a_check(model: Model, folder: Path) -> None:
    before = load_profile(folder)
    costs = take(model, machine(1.25), folder, resume=False)
    assert costs.drift is None
    assert "last_check" not in load_profile(folder).provenance
    assert {sample.ms for sample in load_profile(folder).samples}.isdisjoint(sample.ms for sample in before.samples)


def test_a_named_profile_is_checked_and_its_folder_left_alone(
    model: Model, recorded: tuple[Path, float], folder: Path
) -> None:
    before = content(folder)
    said: list[str] = []
    slow, other = machine(0.7), machine(tile=128)
    costs = use_profile(
        model, slow, folder, scorer=Router.for_model(model, seed=0), progress=said.append, clock=slow.clock
    )
    assert costs.model.dense.latency_ms == pytest.approx(0.7 * recorded[1], rel=0.03)
    [warning] = [line for line in said if line.startswith("warning: ")]
    assert "not as it was" in warning and f"shiva-search profile --no-resume --out {folder}" in warning
    said.clear()
    costs = use_profile(
        model, other, folder, scorer=Router.for_model(model, seed=0), progress=said.append, clock=other.clock
    )
    assert costs.drift is not None and costs.drift["done"] == "predictions may miss"
    [warning] = [line for line in said if line.startswith("warning: ")]
    assert f"shiva-search profile --no-resume --out {folder}" in warning
    assert content(folder) == before


def test_predictions_that_are_far_off_are_said_to_be(model: Model, tmp_path: Path) -> None:
    said: list[str] = []
    restless = VirtualDevice(1, lambda now_s: 1.0, noise=0.5)
    costs = take(model, restless, tmp_path / "restless", said.append, seconds=5.0)
    assert costs.model.held_out["median_error"] > 0.05
    [warning] = [line for line in said if line.startswith("warning: ")]
    assert f"off by {costs.model.held_out['median_error']:.0%}" in warning and "--seconds" in warning
    said.clear()
    steady = take(model, machine(), tmp_path / "steady", said.append)
    assert steady.model.held_out["median_error"] < 0.05
    assert not [line for line in said if line.startswith("warning: ")]


def test_a_named_profile_of_another_device_model_or_state_is_refused(model: Model, folder: Path) -> None:
    options = {"progress": print, "scorer": Router.for_model(model, seed=0)}
    with pytest.raises(InputError, match="device 'virtual', not 'cpu'"):
        use_profile(model, open_device("cpu"), folder, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="config_hash"):
        use_profile(small_dit(layers=2), machine(), folder, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is of batch 2, not batch 4; compile off, not compile on; ask for") as refusal:
        use_profile(changed(model, batch=4, compile=True), machine(), folder, **options)  # type: ignore[arg-type]
    assert "{" not in str(refusal.value)
    header = (folder / "profile.json").read_text()
    (folder / "profile.json").write_text(header.replace('"complete": true', '"complete": false'))
    with pytest.raises(InputError, match="interrupted"):
        use_profile(model, machine(), folder, **options)  # type: ignore[arg-type]


def test_a_folder_of_another_workload_says_what_differs_and_what_to_do(model: Model, folder: Path) -> None:
    before = content(folder)
    other = changed(model, batch=4, threads=1)
    differing = "batch 2, not batch 4; default threads, not threads 1; .*profile --out DIR.*--no-resume"
    with pytest.raises(InputError, match=differing):
        take(other, machine(), folder)
    assert content(folder) == before


def test_every_workload_has_a_folder_of_its_own(model: Model) -> None:
    device = open_device("cpu")
    assert profile_folder(device, model) == Path("profiles/cpu/small")
    assert profile_folder(device, changed(model, batch=model.workload.batch)) == Path("profiles/cpu/small")
    other = changed(model, batch=4, dtype="bfloat16", resolution=16, guidance=False, compile=True, threads=2)
    assert profile_folder(device, other, "affine", 8).name == (
        "small.batch-4.dtype-bfloat16.resolution-16.guidance-off.compile-on.threads-2.rank-8"
    )


def test_a_recording_is_never_checked(model: Model, recorded: tuple[Path, float], folder: Path, tmp_path: Path) -> None:
    scorer = Router.for_model(model, seed=0)
    device = open_device(f"replay:{folder}")  # has no clock: measuring would raise
    for costs in (
        use_profile(model, device, folder, scorer=scorer, progress=print),
        take_profile(model, device, tmp_path / "copy", seconds=5, seed=0, resume=True, scorer=scorer, progress=print),
        take_profile(model, device, tmp_path / "copy", seconds=5, seed=0, resume=True, scorer=scorer, progress=print),
    ):
        assert costs.drift is None
        assert costs.model.dense.latency_ms == recorded[1]
