"""What the quick check of an old profile compares, and what it does not mistake for a change."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormZeroSingle
from torch.nn.modules.module import register_module_forward_pre_hook
from virtual_device import VirtualDevice

from shiva_search.models.catalog import as_model
from shiva_search.models.model import Model
from shiva_search.profiling.block_profiler import profile_model
from shiva_search.profiling.drift import check_drift
from shiva_search.records.profile import Profile


@pytest.fixture(scope="module", params=["whole", "shapes"])
def two_kinds(request: pytest.FixtureRequest) -> Model:
    """A Flux of two kinds of blocks, whole or as shapes."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    with torch.device("meta" if request.param == "shapes" else "cpu"):
        module = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    return as_model(
        module.eval().requires_grad_(False), "two kinds", "random weights", {"resolution": 256, "text_tokens": 16}
    )


@pytest.fixture(scope="module")
def profile(two_kinds: Model) -> Profile:
    device = VirtualDevice(noise=0.02)
    return profile_model(two_kinds, device, seconds=30, clock=device.clock)


def test_every_signature_and_whole_plans_are_checked(two_kinds: Model, profile: Profile) -> None:
    device = VirtualDevice(5, lambda now_s: 0.7, noise=0.02)
    drift = check_drift(two_kinds, profile, device, clock=device.clock)
    tokens = two_kinds.tokens
    for signature in dict.fromkeys(profile.layers):
        counts = {int(key.split()[2]) for key in drift.changes if signature in key}  # after what it is, and of which
        assert tokens in counts and len(counts) == 4
    assert len([key for key in drift.changes if key.startswith("plan")]) == min(2, len(profile.forwards))
    assert drift.verdict == "rescale"
    assert drift.scale == pytest.approx(0.7, rel=0.03)
    assert drift.scale_low <= drift.scale <= drift.scale_high
    assert "forward" not in two_kinds.layers[0].module.__dict__


def test_one_kind_of_block_that_changed_is_seen(two_kinds: Model, profile: Profile) -> None:
    class OneKindSlower(VirtualDevice):
        """As with a library that lost a kernel: whatever runs a single-stream block takes a quarter longer."""

        def true_ms(self, run):  # type: ignore[no-untyped-def]
            entered: list[object] = []
            hook = register_module_forward_pre_hook(
                lambda module, args: entered.append(module) if isinstance(module, AdaLayerNormZeroSingle) else None
            )
            try:
                with torch.no_grad():
                    run()
            finally:
                hook.remove()
            return super().true_ms(run) * (1.25 if entered else 1.0)

    device = OneKindSlower(noise=0.02)
    drift = check_drift(two_kinds, profile, device, clock=device.clock)
    assert drift.verdict == "profile again"
    assert drift.largest is not None and drift.largest[1] == pytest.approx(0.25, abs=0.08)


def test_a_passing_disturbance_is_not_taken_for_a_change(two_kinds: Model, profile: Profile) -> None:
    device = VirtualDevice(7, noise=0.02, disturbed=(0.0, 5.0, 1.6))
    drift = check_drift(two_kinds, profile, device, seconds=4.0, clock=device.clock)
    assert drift.verdict != "profile again"
