"""A plan makes nothing wait: no value is read back from the device, so that a CUDA graph could hold the forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shiva_search.models.model import Model
from shiva_search.records.plan import Kept, Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.selection.closed_form import untrained_bypasses
from shiva_search.selection.router import Router
from tests.models.conformance import FAMILY_CASES

CASES = {case.name: case for case in FAMILY_CASES}
#: Operations whose result, or its shape, the host has to wait for.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}


class Reads(TorchDispatchMode):
    """Counts what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().split(".")[0] in READS
        return func(*args, **(kwargs or {}))


def reads(model: Model) -> int:
    inputs = model.example()
    with torch.no_grad(), Reads() as mode:
        model.predict(inputs)
    return mode.count


def test_reads_are_seen() -> None:
    with Reads() as mode:
        assert torch.ones(3).sum().item() == 3
        torch.ones(3).nonzero()
    assert mode.count == 2


@pytest.mark.parametrize("name", ["dit", "sd3.5", "flux.1-dev", "pixart-sigma", "auraflow", "wan"])
@pytest.mark.parametrize("selector", ["router", "bypass"])
def test_a_planned_forward_reads_no_more_than_the_dense_one(name: str, selector: str) -> None:
    model = CASES[name].model()
    dense = reads(model)
    k = model.tokens // 2
    if selector == "router":
        made, row = Router.for_model(model), [Kept(k)] * (model.layer_count - 1)
    else:
        made = untrained_bypasses(model, ranks=(2,))
        modes = ["all" if layer.attends_all else "kept" for layer in model.layers[1:]]
        row = [Kept(k, 2, mode) for mode in modes]
    plan = Plan.from_rows(model, [[Kept(model.tokens), *row]])
    with AppliedPlan(model, plan, made):
        assert reads(model) == dense
