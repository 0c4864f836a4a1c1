"""Models far larger than this machine are profiled by name, block by block, within the memory promised for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shiva_search.records.profile import load_profile

MOST_GIB = 4.0

# As `shiva-search profile` does it, at so few counts that a slow machine is done in a minute.
PROFILE = """
import json, sys
from shiva_search.cost import fit_cost_model
from shiva_search.devices import open_device
from shiva_search.models.catalog import load_model
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.selection.router import Router
model = load_model({name!r}, dtype="bfloat16", resolution=64, text_tokens=8, batch=1, guidance=False)
profile = profile_model(
    model, open_device("cpu"), scorer=Router.for_model(model, seed=0), seconds=1, counts=[8], folder="profile"
)
print(json.dumps({{"parameters": model.fingerprint()["parameters"], "dense": fit_cost_model(profile).dense.as_dict()}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "signatures", "parameters"), [("sd3.5-medium", 3, 2.243e9), ("flux.1-dev", 2, 11.901e9)]
)
def test_a_big_model_is_profiled_by_name(name: str, signatures: int, parameters: float, tmp_path: Path) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    with out.open("w") as out_file, said.open("w") as said_file:
        process = subprocess.Popen(
            [sys.executable, "-c", PROFILE.format(name=name)], cwd=tmp_path, stdout=out_file, stderr=said_file,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)  # the memory of this process alone
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said.read_text()
    assert "[W" not in said.read_text(), said.read_text()  # so begin the lines in which torch warns
    assert used.ru_maxrss / 2**20 < MOST_GIB  # ru_maxrss is in KiB
    told = json.loads(out.read_text())
    assert told["parameters"] == pytest.approx(parameters, rel=1e-3)
    assert told["dense"]["latency_ms"] > 0
    profile = load_profile(tmp_path / "profile")
    assert profile.complete and profile.tokens == 16
    assert len(set(profile.layers)) == signatures
    for signature in set(profile.layers):
        assert [row.tokens_kept for row in profile.curve(signature)] == [0, 8, 16]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2**20  # no weights on disk
