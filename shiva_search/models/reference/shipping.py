"""From a work folder of the recipe to the files that come with the package: checkpoints in; weights and card out.

Each part is written where what it needs is there, and the answer says of the others what is missing.
"""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shiva_search.errors import InputError
from shiva_search.models.reference.card import write_card
from shiva_search.models.reference.classifier import Classifier
from shiva_search.models.reference.data import HERE, SPLITS, load_split, to_pixels
from shiva_search.models.reference.evaluation import feature_moments
from shiva_search.models.reference.transformer import build_transformer, layers_in
from shiva_search.records.files import read_json, write_atomic, write_json, write_text


class NotReadyError(InputError):
    """What a part is made of is not there yet."""


def ship(work: Path, data: Path, target: Path = HERE, trained_with: Sequence[str] | None = None) -> dict[str, str]:
    """Write every part whose inputs exist.

    Args:
        work: folder with transformer.pt and evaluation.json, classifier.pt, or either.
        data: folder of the IDX files.
        target: where the files go, by default beside this module.
        trained_with: commands the transformer was trained with, in order, where its checkpoint does not hold them.

    Returns:
        For each part, "written" or why it was left as it is.
    """
    parts: dict[str, Callable[[], None]] = {
        "calibration": lambda: ship_calibration(data, target),
        "classifier": lambda: ship_classifier(work, data, target),
        "transformer": lambda: ship_transformer(work, target),
        "model card": lambda: ship_card(work, target, trained_with),
    }
    outcome = {}
    for name, write in parts.items():
        try:
            write()
            outcome[name] = "written"
        except NotReadyError as reason:
            outcome[name] = f"left as it is: {reason}"
    return outcome


def about(known: dict[str, Any]) -> dict[str, str]:
    """Metadata of a safetensors file under one key: several keys are written in an order that changes."""
    return {"about": json.dumps(known)}


def ship_calibration(data: Path, target: Path) -> None:
    """The held-out images and labels, uint8, with the rows of each split in the metadata."""
    if not data.is_dir():
        raise NotReadyError(f"there is no data in {data}. Install dataset-fashion-mnist or pass --data.")
    images, labels = load_split(data, "held_out")
    rows = about({name: [part.start, part.stop] for name, part in SPLITS.items()})
    tensors = {"images": images.contiguous(), "labels": labels.to(torch.uint8)}
    write_atomic(target / "calibration.safetensors", lambda path: save_file(tensors, path, metadata=rows))


@torch.no_grad()
def ship_classifier(work: Path, data: Path, target: Path) -> None:
    """The trained classifier with its test accuracy, and the moments of its features over the test images."""
    state = read_checkpoint(work / "classifier.pt")
    if state["epoch"] < state["recipe"]["epochs"]:
        done = f"{state['epoch']} of {state['recipe']['epochs']} epochs"
        raise NotReadyError(f"classifier.pt has seen {done}. Run recipe classifier to the end.")
    if not data.is_dir():
        raise NotReadyError(f"there is no data in {data}. Install dataset-fashion-mnist or pass --data.")
    classifier = Classifier()
    classifier.load_state_dict(state["model"])
    classifier.eval()
    images, labels = load_split(data, "test")
    features = torch.cat([classifier.features(chunk) for chunk in to_pixels(images).split(500)])
    accuracy = (classifier.head(features).argmax(1) == labels).double().mean().item()
    mean, covariance = feature_moments(features)
    weights = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    known = about({"test_accuracy": accuracy, "test_images": len(images)} | state["recipe"])
    write_atomic(target / "classifier.safetensors", lambda path: save_file(weights, path, metadata=known))
    moments = {"mean": mean, "covariance": covariance}
    counted = about({"test_images": len(images)})
    write_atomic(target / "test_features.safetensors", lambda path: save_file(moments, path, metadata=counted))


def ship_transformer(work: Path, target: Path) -> None:
    """The averaged weights in diffusers format, and the loss curve."""
    state = read_finished_transformer(work)
    model: Any = build_transformer(0, layers_in(state["ema"]))  # save_pretrained is diffusers' own
    model.load_state_dict(state["ema"])
    folder = target / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".tmp-") as temporary:
        model.float().save_pretrained(temporary, safe_serialization=True)
        for file in sorted(Path(temporary).iterdir()):
            # Only its owner may read what safetensors writes; a copy has the usual permissions.
            write_atomic(folder / file.name, partial(_copy, file))

    def write_curve(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", "size", "loss", "seconds"])
            writer.writerows((step, size, f"{loss:.5f}", f"{at:.0f}") for step, size, loss, at in state["curve"])

    write_atomic(target / "training_curve.csv", write_curve)


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)


def ship_card(work: Path, target: Path, trained_with: Sequence[str] | None) -> None:
    """MODEL_CARD.md, with figures from work/evaluation.json, which is shipped beside it."""
    state = read_finished_transformer(work)
    if not (work / "evaluation.json").exists():
        raise NotReadyError("there is no evaluation.json in the work folder. Run recipe evaluate on it first.")
    figures = read_json(work / "evaluation.json", "evaluation")
    if figures.get("step") != state["step"]:
        raise NotReadyError(
            f"evaluation.json is of step {figures.get('step')}, transformer.pt of step {state['step']}. "
            "Run recipe evaluate again."
        )
    if not (target / "classifier.safetensors").exists():
        raise NotReadyError("the card states the classifier's accuracy, and it is not shipped. Ship it first.")
    with safe_open(target / "classifier.safetensors", framework="pt") as file:
        classifier = json.loads(file.metadata()["about"])
    commands = trained_with or state.get("commands")
    if commands is None:
        raise NotReadyError("the card states how the model was trained, transformer.pt does not. Pass --trained-with.")
    card = write_card(figures, state["curve"], classifier, commands)
    write_json(target / "evaluation.json", figures)
    write_text(target / "MODEL_CARD.md", card)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of the recipe on the CPU; NotReadyError where there is none."""
    if not path.exists():
        raise NotReadyError(f"there is no {path.name} in the work folder. Run recipe {path.stem} first.")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def read_finished_transformer(work: Path) -> dict[str, Any]:
    """The transformer's checkpoint; NotReadyError before it has seen images of full size."""
    state = read_checkpoint(work / "transformer.pt")
    size = trained_size(state)
    if size != 28:
        raise NotReadyError(f"transformer.pt, at step {state['step']}, is still at {size} x {size}. Train it further.")
    recipe = state.get("recipe")
    if recipe and state["step"] < recipe["small_steps"] + recipe["steps"]:
        total = recipe["small_steps"] + recipe["steps"]
        raise NotReadyError(f"transformer.pt has made {state['step']} of {total} steps. Train it to the end.")
    return state


def trained_size(state: dict[str, Any]) -> int:
    """Pixels a side of the images that a transformer's checkpoint saw last; 14 before the first row of its curve."""
    return int(state["curve"][-1][1]) if state["curve"] else 14
