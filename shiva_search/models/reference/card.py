"""The text of the model card: saved figures, the loss curve and the training options in; Markdown out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shiva_search.models.reference.data import HELD_OUT, SPLITS

CurveRow = tuple[int, int, float, float]  # step, pixels a side, mean loss since the row before, seconds since the start

CARD = """---
license: apache-2.0
library_name: diffusers
tags: [diffusion, flow-matching, dit, fashion-mnist]
datasets: [fashion_mnist]
---

# fashion-dit

A small class-conditional diffusion transformer over 28 x 28 grey images of clothes: the built-in model of
shiva-search, made to try token schedules on, and to be trained and searched on a laptop. It is a stock
`diffusers.DiTTransformer2DModel` in pixel space with one token per pixel: {tokens} tokens, {blocks} blocks, width 128,
four heads.

| File | What it is |
|---|---|
| `transformer/` | configuration and averaged weights, float32, in diffusers format |
| `classifier.safetensors` | the convolutional classifier that scores samples |
| `test_features.safetensors` | mean and covariance of its features over the {test_images} test images |
| `calibration.safetensors` | {held_out} held-out images with labels |
| `training_curve.csv` | step, pixels a side, mean training loss, seconds |
| `evaluation.json` | the figures below, unrounded |

## Use

Flow matching: x_t = (1 - t) x_0 + t eps, t from 0 (image) to 1 (noise), and the model predicts v = eps - x_0. It is
called with `timestep = 1000 t` and `class_labels` in 0..9, or 10 for no class. Pixels lie in [-1, 1]. Classes:
0 T-shirt, 1 trouser, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag, 9 ankle boot. It knows
nothing but these pictures; it is a test bench, not an image generator to publish with.

## Data

Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv 1708.07747): 60,000 training and 10,000 test images. The last
{held_out} training images were held out from the transformer and the classifier alike; they are in
`calibration.safetensors`, rows {splits}. The test images were
seen by neither, and are used for the classifier's accuracy and the reference of the Frechet distance only.

## Training

The commands of `python -m shiva_search.models.reference.recipe`, each taking up the checkpoint of the one before:

{commands}

{steps} steps on a CPU in {minutes:.0f} minutes, first on images of 14 x 14 (the same tokens at half the density), then
of 28 x 28. The weights are an exponential moving average over the steps. Mean squared error of the velocity:

| Step | Size | Training loss |
|---|---|---|
{curve}

## Figures

All from `evaluation.json`, computed in {dtype}.

Error of the velocity when one block is left out, |v_skip - v|^2 / |v|^2, over {images} "evaluation" images with t
spread evenly over (0, 1). A model in which every block matters has no error near zero.

| Block | {block_numbers} |
|---|{block_rule}|
| Error | {block_errors} |

{samples} samples, as many of each class, {steps_per_sample} Euler steps. Agreement is the share that the classifier
assigns to the intended class; the Frechet distance is between Gaussians fitted to the classifier's features of the
samples and of the test images. It is not the usual FID, and depends on the number of samples: compare like with like.

| | Agreement | Frechet distance |
|---|---|---|
{scores}

The classifier has {accuracy:.2%} accuracy on the test images.

## Selectors

`router.safetensors` (with `--bypass none`) and `bypass.safetensors` (the default: an affine path for rejected tokens,
fit in closed form, then warmed up) serve every plan of this model. Both come from `scripts/warm_up_selectors.py` and
the "train" part of the held-out images; half of the bypass's inputs have no label, as guidance asks for. Their curves
are `router_training.csv` and `bypass_training.csv`.

## Licences

Weights, classifier and code: Apache-2.0, like the package. The images in `calibration.safetensors` are part of
Fashion-MNIST, under the MIT licence:

> Copyright (c) 2017 Zalando SE, https://tech.zalando.com
>
> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
> documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
> rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
> persons to whom the Software is furnished to do so, subject to the following conditions:
>
> The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
> Software.
>
> THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
> WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
> COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
> OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def write_card(
    figures: dict[str, Any],
    curve: Sequence[CurveRow],
    classifier: dict[str, Any],
    commands: Sequence[str],
    rows: int = 12,
) -> str:
    """Fill in the model card.

    Args:
        figures: what `evaluate` returned for the finished model, scores included.
        curve: rows of the loss curve.
        classifier: metadata of the shipped classifier: "test_accuracy" and "test_images".
        commands: of the training, in order.
        rows: about how many rows of the curve to show; the last of each stretch is always among them.

    Returns:
        The card, in Markdown.
    """
    stride = max(1, len(curve) // rows)
    # A thinned model counts its steps anew: where the count falls, a stretch has ended.
    ends = {index for index, row in enumerate(curve) if index == len(curve) - 1 or curve[index + 1][0] <= row[0]}
    shown = [row for index, row in enumerate(curve) if index % stride == 0 or index in ends]
    errors = figures["leave_out_nmse"]
    table = [(f"guidance {row['guidance']:g}", row) for row in figures["scores"]]
    table.append((f"{figures['real']['samples']} held-out photographs", figures["real"]))
    return CARD.format(
        tokens=figures["size"] ** 2,
        blocks=len(errors),
        test_images=f"{classifier['test_images']:,}",
        held_out=f"{HELD_OUT:,}",
        splits=", ".join(f'{part.start} to {part.stop - 1} "{name}"' for name, part in SPLITS.items()),
        commands="\n".join(f"    {command}" for command in commands),
        steps=f"{sum(curve[index][0] for index in ends):,}",
        minutes=curve[-1][3] / 60,
        curve="\n".join(f"| {step} | {size} | {loss:.4f} |" for step, size, loss, _ in shown),
        dtype=figures["dtype"],
        images=figures["leave_out_images"],
        block_numbers=" | ".join(str(number) for number in range(1, len(errors) + 1)),
        block_rule="|".join("---" for _ in errors),
        block_errors=" | ".join(f"{error:.3f}" for error in errors),
        samples=f"{figures['samples']:,}",
        steps_per_sample=figures["steps"],
        scores="\n".join(f"| {name} | {row['agreement']:.1%} | {row['frechet']:.2f} |" for name, row in table),
        accuracy=classifier["test_accuracy"],
    )
