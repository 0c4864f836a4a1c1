"""Images of the built-in model: in, Fashion-MNIST's IDX files or the shipped held-out images; out, tensors and batches.

Of the 60,000 training images the last 4,096 train neither the transformer nor the classifier. They are shipped, in
three parts with a use each, so that no figure is reported on images that anything was fitted to.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from shiva_search.errors import InputError, UnavailableError

HERE = Path(__file__).parent
DATA = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts the four files
HELD_OUT = 4096  # last images of the training file
CLASSES = 10
NULL_CLASS = CLASSES  # the label "no class", for guidance
SPLITS = {
    "train": slice(0, 3072),  # to train selectors
    "calibration": slice(3072, 3584),  # to search plans
    "evaluation": slice(3584, 4096),  # for reported figures, and nothing else
}


def load_reference_data(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one part of the shipped held-out images.

    Args:
        split: "train" (3072 images, for training selectors), "calibration" (512, for the search) or "evaluation"
            (512, for reported figures).

    Returns:
        Images uint8 [n, 28, 28] and labels int64 [n] in 0..9.

    Raises:
        InputError: no split has that name.
        UnavailableError: the shipped file is missing.
    """
    if split not in SPLITS:
        raise InputError(f'split is one of {", ".join(SPLITS)}, not "{split}". Choose one of them.')
    tensors = load_file(shipped("calibration.safetensors"))
    rows = SPLITS[split]
    return tensors["images"][rows].clone(), tensors["labels"][rows].long()


def shipped(name: str) -> Path:
    """Path of a file that comes with the built-in model; UnavailableError where it is missing."""
    path = HERE / name
    if not path.exists():
        raise UnavailableError(f"the built-in model needs {name}, which is missing. Reinstall, or run recipe ship.")
    return path


def read_idx(path: Path) -> torch.Tensor:
    """Read one gzipped IDX file (the format of MNIST) as a uint8 tensor of the file's own shape."""
    if not path.exists():
        raise UnavailableError(f"{path.name} is not in {path.parent}. Install dataset-fashion-mnist or pass --data.")
    with gzip.open(path, "rb") as file:
        raw = file.read()
    if raw[:3] != b"\x00\x00\x08":  # two zero bytes, then the code of unsigned bytes
        raise InputError(f"an IDX file of bytes starts with 00 00 08, {path.name} with {raw[:3].hex(' ')}. Check it.")
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(dims)).reshape(dims).copy())


def load_split(data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [n, 28, 28] and labels int64 [n] of "train" (55,904), "held_out" (4,096) or "test" (10,000)."""
    stem = "t10k" if split == "test" else "train"
    images = read_idx(data / f"{stem}-images-idx3-ubyte.gz")
    labels = read_idx(data / f"{stem}-labels-idx1-ubyte.gz").long()
    if split == "train":
        return images[:-HELD_OUT], labels[:-HELD_OUT]
    if split == "held_out":
        return images[-HELD_OUT:], labels[-HELD_OUT:]
    return images, labels


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 28, 28] -> float [n, 1, 28, 28] in [-1, 1]."""
    return images.float().div(127.5).sub(1.0).unsqueeze(1)


def draw_batch(
    pixels: torch.Tensor, labels: torch.Tensor, batch: int, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t [B, 1, size, size], t [B] in (0, 1), labels [B] (a tenth of them null) and the target velocity."""
    rows = torch.randint(0, len(pixels), (batch,), generator=generator)
    x0 = pixels[rows]
    if size != x0.shape[-1]:
        x0 = F.interpolate(x0, size=(size, size), mode="area")
    # One draw per interval (eq. 15), through a logit-normal so that middle timesteps are seen more often.
    uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    t = torch.sigmoid(math.sqrt(2.0) * torch.erfinv((2 * uniform - 1).clamp(-0.9999, 0.9999)))
    noise = torch.randn(x0.shape, generator=generator)
    mix = t.view(-1, 1, 1, 1)
    classes = labels[rows].clone()
    classes[torch.rand(batch, generator=generator) < 0.1] = NULL_CLASS
    return (1 - mix) * x0 + mix * noise, t, classes, noise - x0


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the images [B, 1, S, S] and shift each by up to one pixel; what comes in is background (-1)."""
    count, size = len(pixels), pixels.shape[-1]
    mirrored = torch.rand(count, generator=generator) < 0.5
    pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
    padded = F.pad(pixels, (1, 1, 1, 1), value=-1.0)[:, 0]
    shift = torch.randint(0, 3, (2, count, 1), generator=generator)
    rows, columns = shift + torch.arange(size)  # each [B, S]
    return padded[torch.arange(count).view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)
