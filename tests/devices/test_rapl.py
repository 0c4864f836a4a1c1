"""RAPL trees in a folder: which domains count, counters that wrap, and what the user is told where none can be read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiva_search.devices.energy import EnergyMeter, SensorError
from shiva_search.devices.rapl import RaplPackages

RANGE_UJ = 262_143_328_850  # of a Xeon


@pytest.fixture
def powercap(tmp_path: Path) -> Callable[..., Path]:
    """Writes one domain and returns its energy file."""

    def write(folder: str, name: str, energy_uj: int, range_uj: int = RANGE_UJ) -> Path:
        domain = tmp_path / folder
        domain.mkdir()
        for file, value in {"name": name, "max_energy_range_uj": range_uj, "energy_uj": energy_uj}.items():
            (domain / file).write_text(f"{value}\n")
        return domain / "energy_uj"

    return write


def test_packages_are_added_up_and_nothing_twice(powercap: Callable[..., Path], tmp_path: Path) -> None:
    domains = {
        "intel-rapl:0": ("package-0", 1_000_000),
        "intel-rapl:0:0": ("core", 10_000_000),
        "intel-rapl:0:1": ("dram", 100_000_000),
        "intel-rapl:1": ("package-1-die-0", 2_000_000),
        "intel-rapl:2": ("psys", 1_000_000_000),
        "intel-rapl-mmio:0": ("package-0", 10_000_000_000),
    }
    files = {folder: powercap(folder, name, 5) for folder, (name, _step) in domains.items()}
    packages = RaplPackages(tmp_path)
    for folder, (_name, step_uj) in domains.items():
        files[folder].write_text(str(5 + step_uj))
    assert packages.read_j() == pytest.approx(3.0)


def test_a_wrapped_counter_goes_on(powercap: Callable[..., Path], tmp_path: Path) -> None:
    energy = powercap("intel-rapl:0", "package-0", RANGE_UJ - 1_000_000)
    packages = RaplPackages(tmp_path)
    energy.write_text("500000")
    assert packages.read_j() == pytest.approx(1.5)
    energy.write_text("600000")
    assert packages.read_j() == pytest.approx(1.6)


@given(steps_uj=st.lists(st.integers(0, 999), max_size=40), start_uj=st.integers(0, 999))
def test_unwrapping_gives_back_the_energy_that_went_in(steps_uj: list[int], start_uj: int) -> None:
    spent_uj = start_uj
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "intel-rapl:0").mkdir()

        def read_text(path: Path) -> str:
            return {"name": "package-0", "max_energy_range_uj": "1000", "energy_uj": str(spent_uj % 1000)}[path.name]

        packages = RaplPackages(Path(root), read_text)
        for step_uj in steps_uj:
            spent_uj += step_uj
            assert packages.read_j() == pytest.approx((spent_uj - start_uj) * 1e-6)


def test_energy_of_a_run(powercap: Callable[..., Path], tmp_path: Path) -> None:
    energy = powercap("intel-rapl:0", "package-0", RANGE_UJ - 3_000_000)
    spent_uj = RANGE_UJ - 3_000_000

    def run() -> None:
        nonlocal spent_uj
        spent_uj = (spent_uj + 250_000) % RANGE_UJ
        energy.write_text(str(spent_uj))

    meter = EnergyMeter(RaplPackages(tmp_path).source(), lambda: None, min_ticks=20, poll_s=0, idle_s=0)
    sample = meter.measure(run, min_seconds=0.0)
    assert sample.energy_j_per_run == pytest.approx(0.25)
    assert (sample.runs, sample.reason) == (20, None)


def test_no_tree(tmp_path: Path) -> None:
    with pytest.raises(SensorError, match="virtual machines"):
        RaplPackages(tmp_path / "absent")


def test_tree_without_packages(powercap: Callable[..., Path], tmp_path: Path) -> None:
    powercap("intel-rapl:0", "psys", 5)
    with pytest.raises(SensorError, match="no RAPL package"):
        RaplPackages(tmp_path)


def test_counter_that_is_not_a_number(powercap: Callable[..., Path], tmp_path: Path) -> None:
    powercap("intel-rapl:0", "package-0", 5).write_text("")
    with pytest.raises(SensorError, match="not a number"):
        RaplPackages(tmp_path)


def test_counter_that_vanishes_ends_the_measurement_with_a_reason(
    powercap: Callable[..., Path], tmp_path: Path
) -> None:
    energy = powercap("intel-rapl:0", "package-0", 5)
    meter = EnergyMeter(RaplPackages(tmp_path).source(), lambda: None, poll_s=0, idle_s=0)
    sample = meter.measure(lambda: energy.unlink(missing_ok=True), min_seconds=0.0)
    assert sample.energy_j_per_run is None
    assert sample.reason is not None and "cannot be read" in sample.reason


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may read everything, so the test gives root up for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_tree() -> Iterator[Path]:
    """A tree that others can reach; tmp_path lies in a folder closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "intel-rapl:0").mkdir()
        for file, value in {"name": "package-0", "max_energy_range_uj": RANGE_UJ, "energy_uj": 5}.items():
            (root / "intel-rapl:0" / file).write_text(f"{value}\n")
        root.chmod(0o755)
        yield root
        root.chmod(0o755)


@pytest.fixture
def closed_counter(open_tree: Path) -> Path:
    (open_tree / "intel-rapl:0" / "energy_uj").chmod(0o400 if os.geteuid() == 0 else 0)
    return open_tree


@pytest.fixture
def closed_tree(open_tree: Path) -> Path:
    open_tree.chmod(0o700 if os.geteuid() == 0 else 0)
    return open_tree


def test_no_access_to_the_counter(closed_counter: Path, as_nobody: None) -> None:
    with pytest.raises(SensorError, match=r"read by root alone.*sudo chmod a\+r .*energy_uj.*udev") as refusal:
        RaplPackages(closed_counter)
    assert refusal.value.exit_code == 4


def test_no_access_to_the_tree(closed_tree: Path, as_nobody: None) -> None:
    with pytest.raises(SensorError, match="Permission denied"):
        RaplPackages(closed_tree)
