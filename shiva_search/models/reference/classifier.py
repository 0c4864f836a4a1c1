"""The classifier that scores samples of the built-in model: pixels in; logits, or features for distances, out."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

from shiva_search.models.reference.data import CLASSES, shipped

FEATURES = 128


def convolution(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """A same-size convolution, normalised, with ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """A convolutional network of a quarter of a million parameters over the ten Fashion-MNIST classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(1, 32, 5), nn.MaxPool2d(2), convolution(32, 64), nn.MaxPool2d(2), convolution(64, FEATURES)
        )
        self.refine = convolution(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the last layer sees: pixels [n, 1, 28, 28] in [-1, 1] -> [n, 128]."""
        hidden = self.body(pixels)
        return (hidden + self.refine(hidden)).mean((2, 3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [n, 1, 28, 28] in [-1, 1] -> logits [n, 10]."""
        logits: torch.Tensor = self.head(self.features(pixels))
        return logits


def load_classifier() -> Classifier:
    """The shipped classifier, in evaluation mode and frozen; UnavailableError where its weights are missing."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(shipped("classifier.safetensors")))
    return classifier.eval().requires_grad_(False)
