"""Plans on whole diffusers pipelines: small random components, no network, prompts given as embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import shiva_search as ss
from shiva_search.errors import InputError
from tests.models.conformance import FAMILY_CASES

STEPS, TEXT = 2, 5
CASES = {case.name: case for case in FAMILY_CASES}


@dataclass(frozen=True)
class PipelineCase:
    """A pipeline and how it is called.

    Attributes:
        name: of the pipeline class.
        build: () -> the pipeline, with the same random weights each time.
        call: (pipe, guidance, images, number of the first image = 0) -> images [n, ...], the same each time.
        workload: what it is called at.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[..., torch.Tensor]
    workload: Mapping[str, int] = field(default_factory=lambda: {"resolution": 64})


def vae(channels: int) -> Any:
    """Eight times smaller latents, as the real ones, with one channel inside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return diffusers.AutoencoderKL(
            latent_channels=channels, block_out_channels=(2,) * 4, norm_num_groups=1, sample_size=64,
            shift_factor=0.0,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).eval()  # fmt: skip


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def noise(images: int, first: int) -> list[torch.Generator]:
    """Each image has its own noise, whatever it is drawn with."""
    return [torch.Generator().manual_seed(7 + first + image) for image in range(images)]


def build_sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=CASES["sd3.5"].module(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(4),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def call_sd3(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    prompt = {"prompt_embeds": drawn(1, TEXT, 12), "pooled_prompt_embeds": drawn(2, 20)}
    if guidance:
        prompt |= {"negative_prompt_embeds": drawn(3, TEXT, 12), "negative_pooled_prompt_embeds": drawn(4, 20)}
    # This pipeline leaves it to the caller to repeat embeddings for several images.
    repeated = {name: value.repeat(images, *[1] * (value.ndim - 1)) for name, value in prompt.items()}
    found: torch.Tensor = pipe(
        **repeated, height=64, width=64, num_inference_steps=STEPS, guidance_scale=5.0 if guidance else 1.0,
        generator=noise(images, first), output_type="pt",
    ).images  # fmt: skip
    return found


def build_flux() -> Any:
    return diffusers.FluxPipeline(
        transformer=CASES["flux.1-dev"].module(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(1),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


def call_flux(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    prompt = {"prompt_embeds": drawn(1, TEXT, 12), "pooled_prompt_embeds": drawn(2, 20)}
    if guidance:
        prompt |= {"negative_prompt_embeds": drawn(3, TEXT, 12), "negative_pooled_prompt_embeds": drawn(4, 20)}
    found: torch.Tensor = pipe(
        **prompt, height=64, width=64, num_inference_steps=STEPS, guidance_scale=3.5, num_images_per_prompt=images,
        true_cfg_scale=4.0 if guidance else 1.0, generator=noise(images, first), output_type="pt",
    ).images  # fmt: skip
    return found


def build_pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        transformer=CASES["pixart-sigma"].module(), scheduler=diffusers.DDIMScheduler(), vae=vae(4), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip


def call_pixart(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    prompt: dict[str, Any] = {"prompt_embeds": drawn(1, TEXT, 12), "prompt_attention_mask": mask}
    if guidance:
        prompt |= {"negative_prompt_embeds": drawn(3, TEXT, 12), "negative_prompt_attention_mask": mask}
    found: torch.Tensor = pipe(
        **prompt, negative_prompt=None, height=64, width=64, num_inference_steps=STEPS, num_images_per_prompt=images,
        guidance_scale=4.5 if guidance else 1.0, generator=noise(images, first), use_resolution_binning=False,
        output_type="pt",
    ).images  # fmt: skip
    return found


def build_dit() -> Any:
    case = CASES["dit"]
    large = type(case)(case.name, case.model_class, {**case.config, "num_embeds_ada_norm": 1000}, case.workload)
    return diffusers.DiTPipeline(transformer=large.module(), scheduler=diffusers.DDIMScheduler(), vae=vae(4))


def call_dit(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    found = pipe(
        class_labels=list(range(first, first + images)), num_inference_steps=STEPS, output_type="np",
        guidance_scale=4.0 if guidance else 1.0, generator=noise(images, first),
    ).images  # fmt: skip
    return torch.from_numpy(found)


def build_with(name: str, pipeline: Any, autoencoder: Callable[[], Any] = lambda: vae(4)) -> Callable[[], Any]:
    """The pipelines of families with one text encoder, which is left out."""

    def build() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            codec = autoencoder().eval()
        return pipeline(
            transformer=CASES[name].module(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=codec,
            text_encoder=None, tokenizer=None,
        )  # fmt: skip

    return build


def video_vae(kind: Any) -> Any:
    """Of Wan and of Qwen-Image: latents eight times smaller, four times in time."""
    return kind(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(
        latent_channels=1, block_out_channels=(2,) * 4, norm_num_groups=1, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def ltx_vae() -> Any:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip


def call_masked(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    """AuraFlow and Lumina: captions of two lengths, told by masks."""
    prompt = {"prompt_embeds": drawn(1, TEXT, 12), "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    if guidance:
        prompt |= {
            "negative_prompt_embeds": drawn(3, TEXT, 12),
            "negative_prompt_attention_mask": torch.tensor([[1, 1, 0, 0, 0]]),
        }
    # Lumina's pipeline does not repeat the second mask for several images, so the caller does.
    repeated = {name: value.repeat(images, *[1] * (value.ndim - 1)) for name, value in prompt.items()}
    found: torch.Tensor = pipe(
        **repeated, height=64, width=64, num_inference_steps=STEPS,
        guidance_scale=4.0 if guidance else 1.0, generator=noise(images, first), output_type="pt",
    ).images  # fmt: skip
    return found


def call_cogview4(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    prompt = {"prompt_embeds": drawn(1, TEXT, 12)}
    if guidance:
        prompt |= {"negative_prompt_embeds": drawn(3, TEXT, 12)}
    found: torch.Tensor = pipe(
        **prompt, height=64, width=64, num_inference_steps=STEPS, num_images_per_prompt=images,
        guidance_scale=4.0 if guidance else 1.0, generator=noise(images, first), output_type="pt",
    ).images  # fmt: skip
    return found


def call_z_image(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    """Captions come as lists; that of the other half of guidance fills one multiple of 32 more."""
    prompt = {"prompt_embeds": [drawn(1, TEXT, 12)[0]]}
    if guidance:
        prompt |= {"negative_prompt_embeds": [drawn(3, 40, 12)[0]]}
    found: torch.Tensor = pipe(
        **prompt, height=64, width=64, num_inference_steps=STEPS, num_images_per_prompt=images,
        guidance_scale=4.0 if guidance else 0.0, generator=noise(images, first), output_type="pt",
    ).images  # fmt: skip
    return found


def call_flux2(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    """Guidance is an input of this model, not a second half."""
    found: torch.Tensor = pipe(
        prompt_embeds=drawn(1, TEXT, 12), height=64, width=64, num_inference_steps=STEPS, num_images_per_prompt=images,
        guidance_scale=4.0 if guidance else 1.0, generator=noise(images, first), output_type="pt",
    ).images  # fmt: skip
    return found


def call_qwen_image(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    prompt = {"prompt_embeds": drawn(1, TEXT, 12), "prompt_embeds_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    if guidance:
        prompt |= {"negative_prompt_embeds": drawn(3, 4, 12), "negative_prompt_embeds_mask": torch.ones(1, 4).long()}
    found: torch.Tensor = pipe(
        **prompt, height=64, width=64, num_inference_steps=STEPS, num_images_per_prompt=images,
        true_cfg_scale=4.0 if guidance else 1.0, generator=noise(images, first), output_type="pt",
    ).images  # fmt: skip
    return found


def call_wan(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    prompt = {"prompt_embeds": drawn(1, TEXT, 12).repeat(images, 1, 1)}
    if guidance:
        prompt |= {"negative_prompt_embeds": drawn(3, TEXT, 12).repeat(images, 1, 1)}
    found: torch.Tensor = pipe(
        **prompt, height=64, width=64, num_frames=5, num_inference_steps=STEPS,
        guidance_scale=4.0 if guidance else 1.0, generator=noise(images, first), output_type="pt",
    ).frames  # fmt: skip
    return found


def call_ltx(pipe: Any, guidance: bool, images: int, first: int = 0) -> torch.Tensor:
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    prompt = {"prompt_embeds": drawn(1, TEXT, 12), "prompt_attention_mask": mask}
    if guidance:
        prompt |= {"negative_prompt_embeds": drawn(3, TEXT, 12), "negative_prompt_attention_mask": mask}
    repeated = {name: value.repeat(images, *[1] * (value.ndim - 1)) for name, value in prompt.items()}
    found: torch.Tensor = pipe(
        **repeated, height=128, width=128, num_frames=9, num_inference_steps=STEPS,
        guidance_scale=4.0 if guidance else 1.0, generator=noise(images, first), output_type="pt",
    ).frames  # fmt: skip
    return found


#: These run the two halves of guidance one after the other.
HALVES_APART = (
    "FluxPipeline", "Lumina2Pipeline", "CogView4Pipeline", "Flux2Pipeline", "QwenImagePipeline", "WanPipeline",
)  # fmt: skip

PIPELINES = (
    PipelineCase("StableDiffusion3Pipeline", build_sd3, call_sd3),
    PipelineCase("FluxPipeline", build_flux, call_flux),
    PipelineCase("PixArtSigmaPipeline", build_pixart, call_pixart),
    PipelineCase("DiTPipeline", build_dit, call_dit),
    PipelineCase("AuraFlowPipeline", build_with("auraflow", diffusers.AuraFlowPipeline), call_masked),
    PipelineCase("Lumina2Pipeline", build_with("lumina2", diffusers.Lumina2Pipeline), call_masked),
    PipelineCase("CogView4Pipeline", build_with("cogview4", diffusers.CogView4Pipeline), call_cogview4),
    PipelineCase("ZImagePipeline", build_with("z-image", diffusers.ZImagePipeline), call_z_image),
    PipelineCase("Flux2Pipeline", build_with("flux2", diffusers.Flux2Pipeline, flux2_vae), call_flux2),
    PipelineCase(
        "QwenImagePipeline",
        build_with("qwen-image", diffusers.QwenImagePipeline, lambda: video_vae(diffusers.AutoencoderKLQwenImage)),
        call_qwen_image,
    ),
    PipelineCase(
        "WanPipeline",
        build_with("wan", diffusers.WanPipeline, lambda: video_vae(diffusers.AutoencoderKLWan)),
        call_wan,
        {"resolution": 64, "frames": 5},
    ),
    PipelineCase(
        "LTXPipeline",
        build_with("ltx-video", diffusers.LTXPipeline, ltx_vae),
        call_ltx,
        {"resolution": 128, "frames": 9},
    ),
)


@pytest.fixture(params=PIPELINES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> PipelineCase:
    found: PipelineCase = request.param
    return found


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    yield


def reloaded(pipe: Any, folder: Path) -> Any:
    """The pipeline as it lies in a folder; what it does without must be said again."""
    without = {name: None for name, component in pipe.components.items() if component is None}
    return type(pipe).from_pretrained(folder, **without)


def hand_made(pipe: Any, keep: float, workload: Mapping[str, int] | None = None) -> ss.Plan:
    """A plan at 64 pixels, 16 image tokens, or at the given workload."""
    model = ss.wrap(pipe.transformer)
    if workload is None or set(workload) == {"resolution"}:  # the plan's tokens say it
        return ss.Plan.uniform(model.at(64), keep)
    model.workload = model.workload.override(**workload)
    return ss.Plan.uniform(model, keep, workload=model.workload.as_dict())


@pytest.mark.parametrize("guidance", [True, False], ids=["guidance", "plain"])
@pytest.mark.parametrize("images", [1, 2])
def test_a_pipeline_runs_with_a_plan_and_is_itself_again(case: PipelineCase, guidance: bool, images: int) -> None:
    pipe = case.build()
    dense = case.call(pipe, guidance, images)
    assert len(dense) == images and dense.isfinite().all()
    with ss.apply_plan(pipe, hand_made(pipe, 1.0, case.workload), "norm"):
        assert torch.equal(case.call(pipe, guidance, images), dense)
    handle = ss.apply_plan(pipe, hand_made(pipe, 0.5, case.workload), "norm")
    kept_of: list[torch.Tensor] = []
    handle.controller.observer = lambda layer, x, out, kept: kept_of.append(kept) if layer else None
    planned = case.call(pipe, guidance, images)
    handle.remove()
    assert planned.shape == dense.shape and planned.isfinite().all()
    assert not torch.equal(planned, dense)
    assert torch.equal(case.call(pipe, guidance, images), dense)
    assert {kept.shape[1] for kept in kept_of} == {handle.plan.tokens // 2}
    if guidance and case.name not in HALVES_APART:
        halves = [kept.chunk(2) for kept in kept_of]
        assert all(torch.equal(first, second) for first, second in halves)


def test_images_do_not_depend_on_how_many_are_drawn_at_once(case: PipelineCase) -> None:
    pipe = case.build()
    with ss.apply_plan(pipe, hand_made(pipe, 0.5, case.workload), "norm"):
        together = case.call(pipe, True, 2)
        apart = [case.call(pipe, True, 1, first) for first in (0, 1)]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_saved_pipeline_takes_the_plan_of_its_folder(case: PipelineCase, tmp_path: Path) -> None:
    pipe = case.build()
    with ss.apply_plan(pipe, hand_made(pipe, 0.5, case.workload)):
        expected = case.call(pipe, True, 1)
    pipe.save_pretrained(tmp_path / "pipe")
    model = ss.load_model(str(tmp_path / "pipe"), **case.workload)
    plan = ss.Plan.uniform(model, 0.5, workload=model.workload.as_dict())
    plan.save(tmp_path / "run" / "plan.json")
    again = reloaded(pipe, tmp_path / "pipe")
    with ss.apply_plan(again.transformer, tmp_path / "run"):
        torch.testing.assert_close(case.call(again, True, 1), expected, atol=1e-5, rtol=0)


def test_a_plan_saved_under_it_is_not_part_of_the_pipeline(case: PipelineCase, tmp_path: Path) -> None:
    pipe = case.build()
    dense = case.call(pipe, False, 1)
    with ss.apply_plan(pipe, hand_made(pipe, 0.5, case.workload)):
        pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(case.call(reloaded(pipe, tmp_path), False, 1), dense, atol=1e-5, rtol=0)


def test_a_plan_for_another_pipeline_is_refused() -> None:
    sd3, pixart = build_sd3(), build_pixart()
    with pytest.raises(InputError, match="another model"):
        ss.apply_plan(pixart, hand_made(sd3, 0.5))
    with pytest.raises(InputError, match="wrap other transformers"):
        ss.apply_plan(object(), hand_made(sd3, 0.5))


def test_an_image_of_another_size_is_refused_not_spoiled() -> None:
    pipe = build_sd3()
    model = ss.wrap(pipe.transformer).at(32)
    with ss.apply_plan(pipe, ss.Plan.uniform(model, 0.5)), pytest.raises(InputError, match="4 image tokens.*16"):
        call_sd3(pipe, True, 1)
