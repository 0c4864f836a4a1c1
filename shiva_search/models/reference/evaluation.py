"""How good the built-in model is: a velocity function or samples in; block importance, agreement and distance out.

Noise levels: t = 0 is an image, t = 1 is noise, x_t = (1 - t) x_0 + t eps, and the model predicts v = eps - x_0.
Shapes: n images, B of them at once, C channels, S pixels a side, F features of the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from shiva_search.errors import InputError
from shiva_search.models.reference.classifier import Classifier, load_classifier
from shiva_search.models.reference.data import CLASSES, NULL_CLASS, SPLITS, load_reference_data, shipped, to_pixels

VelocityFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
TIMESTEPS = 1000  # the model's own unit: timestep = t * 1000


def velocity_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> VelocityFn:
    """The velocity a transformer predicts, as a function of x [B, C, S, S], t [B] in (0, 1] and labels [B].

    A `dtype` other than float32 runs the model under autocast; what comes out is float32 all the same.
    """

    def velocity(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            out: torch.Tensor = model(x, timestep=t * TIMESTEPS, class_labels=labels).sample
        return out.float()

    return velocity


def guided(velocity_fn: VelocityFn, guidance: float) -> VelocityFn:
    """Classifier-free guidance v_u + g (v_c - v_u), both halves in one batch: unconditional first, then conditional.

    At a guidance of 1 the unconditional half cancels and is not computed.
    """
    if guidance == 1.0:
        return velocity_fn

    def velocity(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        both = torch.cat([torch.full_like(labels, NULL_CLASS), labels])
        unconditional, conditional = velocity_fn(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return velocity


@torch.no_grad()
def sample(
    velocity_fn: VelocityFn,
    labels: torch.Tensor,
    steps: int,
    guidance: float,
    generator: torch.Generator,
    shape: tuple[int, ...] = (1, 28, 28),
    *,
    method: Literal["euler", "heun"] = "euler",
    batch: int = 64,
) -> torch.Tensor:
    """Draw images by integrating the velocity from t = 1 to t = 0 in equal steps.

    Args:
        velocity_fn: called with x [B, *shape], t [B] in (0, 1] and labels [B] (10 is "no class").
        labels: intended classes, int64 [n], on the device to sample on.
        steps: number of steps, at least 1.
        guidance: weight g of classifier-free guidance; 1 is none.
        generator: draws all noise first, so that the same seed gives the same images whatever `batch` is.
        shape: of one image.
        method: "euler", one call per step, or "heun", two (but one in the last step, which ends at t = 0).
        batch: images at once; with guidance the function sees twice as many.

    Returns:
        Pixels [n, *shape], clamped to [-1, 1].

    Raises:
        InputError: steps is below 1, or the method is unknown.
    """
    if steps < 1:
        raise InputError(f"sampling takes at least 1 step, not {steps}. Raise the number of steps.")
    if method not in ("euler", "heun"):
        raise InputError(f'the method of sampling is euler or heun, not "{method}". Choose one of them.')
    noise = torch.randn((len(labels), *shape), generator=generator, device=generator.device).to(labels.device)
    velocity = guided(velocity_fn, guidance)
    times = torch.linspace(1.0, 0.0, steps + 1).tolist()
    done = []
    for x, classes in zip(noise.split(batch), labels.split(batch), strict=True):
        for now, then in zip(times[:-1], times[1:], strict=True):
            v = velocity(x, x.new_full((len(x),), now), classes)
            if method == "heun" and then > 0:
                v_then = velocity(x + (then - now) * v, x.new_full((len(x),), then), classes)
                v = (v + v_then) / 2
            x = x + (then - now) * v
        done.append(x)
    return torch.cat(done).clamp(-1.0, 1.0)


def feature_moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [F] and covariance [F, F], float64, of features [n, F] with n >= 2."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor) -> float:
    """Squared Frechet distance of two Gaussians, |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), as in FID.

    The trace of the root is the nuclear norm of A^(1/2) B^(1/2), which holds for singular covariances too.

    Args:
        mean_a: [F].
        cov_a: A, [F, F], symmetric and positive semi-definite.
        mean_b: [F].
        cov_b: B, [F, F], likewise.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        InputError: the shapes do not fit together.
    """
    size = len(mean_a)
    if mean_b.shape != (size,) or cov_a.shape != (size, size) or cov_b.shape != (size, size):
        shapes = ", ".join(str(list(each.shape)) for each in (mean_a, cov_a, mean_b, cov_b))
        raise InputError(f"means are [F] and covariances [F, F] with one F, not {shapes}. Use the same features.")
    cov_a, cov_b = cov_a.double(), cov_b.double()
    root_trace = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return max(0.0, float(shift + cov_a.trace() + cov_b.trace() - 2 * root_trace))


def _root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@torch.no_grad()
def score_samples(pixels: torch.Tensor, labels: torch.Tensor, classifier: Classifier | None = None) -> dict[str, float]:
    """Score samples with the shipped classifier.

    Args:
        pixels: [n, 1, 28, 28] in [-1, 1], n >= 2.
        labels: intended classes [n] in 0..9.
        classifier: the loaded classifier, to spare loading it again.

    Returns:
        "agreement", the share of samples that the classifier assigns to the intended class, and "frechet", the
        distance of their features from those of the 10,000 test images. The distance falls with n and depends on
        the mix of classes: compare only figures of as many samples and the same labels.

    Raises:
        InputError: the shapes do not fit together, or there are fewer than two samples.
        UnavailableError: the shipped classifier or features are missing.
    """
    if len(pixels) != len(labels) or len(pixels) < 2:
        raise InputError(f"scores need two samples or more, a label each, not {len(pixels)} and {len(labels)} labels.")
    if pixels.shape[1:] != (1, 28, 28):
        raise InputError(f"the classifier reads pixels [n, 1, 28, 28], not {list(pixels.shape)}. Sample at 28 x 28.")
    classifier = classifier or load_classifier()
    features = torch.cat([classifier.features(chunk) for chunk in pixels.float().cpu().split(500)])
    agreement = (classifier.head(features).argmax(1) == labels.cpu()).double().mean()
    real = load_file(shipped("test_features.safetensors"))
    mean, covariance = feature_moments(features)
    return {
        "agreement": float(agreement),
        "frechet": frechet_distance(mean, covariance, real["mean"], real["covariance"]),
    }


@contextmanager
def without_block(block: nn.Module) -> Iterator[None]:
    """Let a block pass its input through unchanged for the duration of the body.

    The block stays in place, since others read from it: DiT's output layer uses the first block's conditioning.
    """
    hook = block.register_forward_hook(lambda _module, inputs, _output: inputs[0])
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def leave_out_errors(
    model: nn.Module,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    batch: int = 32,
) -> list[float]:
    """How much the velocity changes without each block: |v_skip - v|^2 / |v|^2, pooled over images and timesteps.

    Args:
        model: a transformer with `transformer_blocks`.
        pixels: clean images [n, C, S, S] in [-1, 1]; each is seen at its own t, one per interval [i/n, (i+1)/n).
        labels: their classes [n].
        generator: draws the timesteps and the noise.
        dtype: what the model computes in.
        batch: images at once.

    Returns:
        One normalised error per block, in the order of the blocks; 0 means the block does nothing.
    """
    count, velocity = len(pixels), velocity_of(model, dtype)
    blocks = list(model.get_submodule("transformer_blocks").children())
    t = ((torch.arange(count) + torch.rand(count, generator=generator)) / count).clamp(min=1e-4)
    noise = torch.randn(pixels.shape, generator=generator)
    mix = t.view(-1, 1, 1, 1)
    x_t = (1 - mix) * pixels.cpu() + mix * noise
    errors, power = torch.zeros(len(blocks), dtype=torch.float64), 0.0
    for each in zip(x_t.split(batch), t.split(batch), labels.cpu().split(batch), strict=True):
        inputs = tuple(part.to(pixels.device) for part in each)
        full = velocity(*inputs)
        power += float(full.double().square().sum())
        for index, block in enumerate(blocks):
            with without_block(block):
                errors[index] += float((velocity(*inputs) - full).double().square().sum())
    return [float(error) / power for error in errors]


def evaluate(
    model: nn.Module,
    *,
    size: int = 28,
    images: int = 128,
    samples: int = 1000,
    guidance: Sequence[float] = (2.5,),
    steps: int = 25,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 64,
) -> dict[str, Any]:
    """All figures of one model, on the "evaluation" images and on as many samples of each class.

    Args:
        model: the transformer.
        size: pixels a side it has been trained to; below 28 there are no samples to score.
        images: held-out images behind the leave-out errors, at most 512.
        samples: images drawn per guidance value, from the same noise each time.
        guidance: weights of classifier-free guidance.
        steps: Euler steps per sample.
        seed: of timesteps and noise.
        device: where the model runs; the noise is drawn on the CPU, so it is the same everywhere.
        dtype: what the model computes in.
        batch: samples at once.

    Returns:
        A JSON object: "leave_out_nmse", a number per block; "scores", a row per guidance value; "real", the scores
        of as many held-out photographs, which no sampler beats but by luck; what was not measured is None, and
        "why_none" says why.
    """
    model = model.to(device).eval()
    clean, classes = load_reference_data("evaluation")
    pixels, classes = to_pixels(clean[:images]), classes[:images]
    if size != pixels.shape[-1]:
        pixels = F.interpolate(pixels, size=(size, size), mode="area")
    errors = leave_out_errors(
        model, pixels.to(device), classes.to(device), torch.Generator().manual_seed(seed), dtype, batch=32
    )
    figures: dict[str, Any] = {
        "size": size, "leave_out_images": len(pixels), "leave_out_nmse": errors,
        "samples": None, "steps": None, "method": None, "scores": None, "real": None,
        "seed": seed, "dtype": str(dtype).removeprefix("torch."), "why_none": None,
    }  # fmt: skip
    if size != 28:
        figures["why_none"] = f"the classifier scores images of 28 x 28, the model is at {size} x {size}"
        return figures
    classifier, labels = load_classifier(), torch.arange(samples) % CLASSES
    scores = []
    for weight in guidance:
        generator = torch.Generator().manual_seed(seed)
        velocity = velocity_of(model, dtype)
        drawn = sample(velocity, labels.to(device), steps, weight, generator, (1, size, size), batch=batch)
        scores.append({"guidance": weight, **score_samples(drawn, labels, classifier)})
    parts = [load_reference_data(split) for split in reversed(SPLITS)]  # the evaluation images first
    real = to_pixels(torch.cat([part[0] for part in parts]))[:samples]
    real_labels = torch.cat([part[1] for part in parts])[:samples]
    real_scores = {"samples": len(real), **score_samples(real, real_labels, classifier)}
    return {**figures, "samples": samples, "steps": steps, "method": "euler", "scores": scores, "real": real_scores}
