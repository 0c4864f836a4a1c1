"""Transformers without an adapter: found out where gathering is sound, refused with the reason where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import nn

import shiva_search as ss
from shiva_search.errors import InputError
from shiva_search.models import families
from shiva_search.models.model import Model
from shiva_search.models.probe import probe
from shiva_search.runtime.apply import AppliedPlan
from tests.models.conformance import FAMILY_CASES, FamilyCase
from tests.models.homemade import (
    AlongBlock,
    BatchBlock,
    Block,
    ConvBlock,
    HalvesOnlyBlock,
    MixerBlock,
    PositionBlock,
    denoiser,
    example,
)

SOUND: list[dict[str, Any]] = [
    {}, {"rotary": True}, {"bias": True}, {"pairs": True}, {"rotary": True, "bias": True},
]  # fmt: skip
#: Families whose blocks take text and image tokens as one sequence.
JOINT = ("auraflow", "lumina2", "flux2", "z-image")


def probed(case: FamilyCase) -> Model:
    """A known class with nothing known of it."""
    inputs = case.example(case.model(), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", ())
        return ss.wrap(case.module(), example=inputs)


def one_at_a_time(module: nn.Module, inputs: dict[str, torch.Tensor], kept: dict[int, torch.Tensor]) -> torch.Tensor:
    """The forward of a home-made model, written out: one sample, and only the kept tokens of each block."""
    outputs = []
    for sample in range(len(inputs["t"])):
        x, t = inputs["x"][sample : sample + 1], inputs["t"][sample : sample + 1]
        layers = list(module.body.layers)  # type: ignore[union-attr, arg-type]

        def of_kept(layer: Any, place: int, sample: int = sample) -> Any:
            def forward(tokens: torch.Tensor, cond: torch.Tensor, rotary: Any, mask: Any) -> torch.Tensor:
                rows = kept[place][sample]
                tables = None if rotary is None else tuple(table[rows] for table in rotary)
                result = tokens.clone()
                result[:, rows] = layer(tokens[:, rows], cond, tables, _of_rows(mask, rows))
                return result

            return forward

        class Written(nn.Module):
            def __init__(self, layer: nn.Module, place: int) -> None:
                super().__init__()
                self.run = of_kept(layer, place)

            def forward(self, tokens: torch.Tensor, cond: torch.Tensor, rotary: Any, mask: Any) -> torch.Tensor:
                found: torch.Tensor = self.run(tokens, cond, rotary, mask)
                return found

        body = module.body
        original = body.layers
        body.layers = nn.ModuleList(Written(layer, place) for place, layer in enumerate(layers))
        try:
            outputs.append(module(x, t))
        finally:
            body.layers = original
    return torch.cat(outputs)


def _of_rows(mask: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    if mask is None or mask.ndim == 2:
        return None if mask is None else mask[:, rows]
    return mask[:, rows][:, :, rows]


@pytest.mark.parametrize("options", SOUND, ids=str)
def test_a_home_made_transformer_is_found_out(options: dict[str, Any]) -> None:
    module = denoiser(**options)
    model = ss.wrap(module, example=example())
    assert (model.tokens, model.layer_count, model.family.block_lists) == (16, 4, ("body.layers",))
    inputs = example(batch=3, seed=1)
    dense = module(**inputs)
    with AppliedPlan(model, ss.Plan.dense(model), "norm"):
        assert torch.equal(module(**inputs), dense)
    kept: dict[int, torch.Tensor] = {}
    rows = [16, 7, 9, 5]
    with AppliedPlan(model, ss.Plan.from_rows(model, [rows]), "norm", guidance=False) as applied:
        everything = torch.arange(16).expand(3, 16)
        applied.controller.observer = lambda layer, x, out, found: kept.update(
            {layer: everything if found is None else found}
        )
        planned = module(**inputs)
    assert any(not torch.equal(found[0], found[1]) for found in kept.values())
    torch.testing.assert_close(planned, one_at_a_time(module, inputs, kept), atol=1e-5, rtol=1e-5)
    assert torch.equal(module(**inputs), dense)


def test_what_is_found_serves_profile_search_and_training() -> None:
    model = ss.wrap(denoiser(rotary=True), example=example(batch=4))
    batch = model.batch("calibration", 6, seed=3)
    assert batch.inputs["x"].shape == (6, 4, 8, 8)
    torch.testing.assert_close(model.times(batch.inputs), batch.t_B)
    plan = ss.Plan.uniform(model, 0.5)
    router = ss.train_selector(model, plan, steps=2, selector=ss.warm_up(model, steps=2))
    assert 0 < ss.fidelity(model, plan, router, samples=8) < 10
    assert ss.fidelity(model, ss.Plan.dense(model), router, samples=8) == 0


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (ConvBlock, "permuted tokens do not give the permuted output.*neighbours"),
        (AlongBlock, "permuted tokens do not give the permuted output"),
        (PositionBlock, "permuted tokens do not give the permuted output.*positions of its own"),
        (MixerBlock, "permuted tokens do not give the permuted output"),
        (BatchBlock, "differently together and one at a time"),
        (HalvesOnlyBlock, "fails on them .*ValueError: this block is for 16 tokens"),
    ],
)
def test_blocks_that_do_not_treat_tokens_as_a_set_are_refused(block: type[Block], reason: str) -> None:
    with pytest.raises(InputError, match=f"{block.__name__} cannot be run on some of its tokens: .*{reason}"):
        ss.wrap(denoiser(block), example=example())


def test_one_unsound_block_among_others_is_enough() -> None:
    module = denoiser()
    other = denoiser(AlongBlock).body.layers[2]  # type: ignore[union-attr]
    module.body.layers[2] = other  # type: ignore[union-attr]
    with pytest.raises(InputError, match="AlongBlock cannot"):
        ss.wrap(module, example=example())
    # Of the same class as sound ones, with another flag.
    module = denoiser(ConvBlock)
    for place, layer in enumerate(module.body.layers):  # type: ignore[union-attr]
        if place != 3:
            layer.mixed = lambda x: x
    with pytest.raises(InputError, match="ConvBlock cannot"):
        ss.wrap(module, example=example())


def test_long_skip_connections_are_refused() -> None:
    with pytest.raises(InputError, match="long skip connections"):
        ss.wrap(denoiser(skips=True), example=example())


class Noisy(Block):
    """Differs from call to call."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


def test_examples_that_show_too_little_are_refused() -> None:
    with pytest.raises(InputError, match="one sample does not show"):
        ss.wrap(denoiser(), example=example(batch=1))
    with pytest.raises(InputError, match="two forwards of the same inputs differ"):
        ss.wrap(denoiser(Noisy), example=example())
    with pytest.raises(InputError, match="no adapter for model class 'Denoiser'.*example"):
        ss.wrap(denoiser())


def test_another_size_than_the_probed_is_refused() -> None:
    model = ss.wrap(denoiser(rotary=True), example=example())
    with pytest.raises(InputError, match="wrap it again"):
        model.like(example(side=12))


def test_nothing_stays_on_a_module_that_was_probed() -> None:
    module = denoiser().train()
    module.body.layers[1].eval()  # type: ignore[union-attr, operator]
    modes = [part.training for part in module.modules()]
    before = {name: value.clone() for name, value in module.named_parameters()}
    ss.wrap(module, example=example())
    with pytest.raises(InputError):
        ss.wrap(denoiser(ConvBlock).train(), example=example())
    assert [part.training for part in module.modules()] == modes
    for part in module.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())


@pytest.mark.parametrize(
    "case", [case for case in FAMILY_CASES if not case.name.startswith(JOINT)], ids=lambda case: case.name
)
def test_known_classes_are_probed_to_the_same_result_as_with_their_adapter(case: FamilyCase) -> None:
    known, found = case.model(), probed(case)
    assert found.family.name.startswith("probed")
    inputs = case.example(known, 2)
    assert [layer.name for layer in found.layers] == [layer.name for layer in known.layers]
    assert found.tokens == known.tokens
    torch.testing.assert_close(found.times(inputs), known.times(inputs))
    row = [known.tokens, known.tokens // 2, 0, *[5] * (known.layer_count - 3)]
    outputs = []
    for model in (known, found):
        with AppliedPlan(model, ss.Plan.from_rows(model, [row]), "norm"):
            outputs.append(model.predict(inputs))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", JOINT)
def test_blocks_over_one_sequence_of_text_and_image_need_an_adapter(name: str) -> None:
    with pytest.raises(InputError, match="takes image tokens and others as one sequence"):
        probed(next(case for case in FAMILY_CASES if case.name == name))


def test_the_probe_finds_by_itself_why_sana_is_refused() -> None:
    module = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8, patch_size=1,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor([200.0, 700.0]),
    }
    with pytest.raises(InputError, match="SanaTransformerBlock cannot be run on some of its tokens: permuted"):
        probe(module, inputs)
    with pytest.raises(InputError, match="convolution over the grid of image tokens"):
        ss.wrap(module, example=inputs)
