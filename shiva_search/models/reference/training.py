"""How the built-in model's two networks are trained: images in; resumable checkpoints in a work folder out."""

from __future__ import annotations

import copy
import math
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from shiva_search.errors import InputError
from shiva_search.models.reference.classifier import Classifier
from shiva_search.models.reference.data import augment, draw_batch, load_split, to_pixels
from shiva_search.models.reference.transformer import build_transformer, layers_in
from shiva_search.records.files import write_atomic


@dataclass(frozen=True)
class TransformerRecipe:
    """What decides the transformer's weights; each field is an option of `recipe transformer`."""

    seed: int = 0
    """Of the weights and of every batch."""
    small_steps: int = 2000
    """Steps on 14x14 images: a quarter of the tokens, a sixth of the time."""
    small_batch: int = 64
    """Images of such a step."""
    steps: int = 1400
    """Steps on 28x28 images, after the small ones."""
    batch: int = 32
    """Images of such a step."""
    muon_lr: float = 2e-3
    """Learning rate of Muon on the blocks' matrices; 0 leaves everything to AdamW."""
    adam_lr: float = 1e-3
    """Learning rate of AdamW."""
    ema: float = 0.995
    """Decay of the averaged weights, which are the ones shipped."""
    layers: int = 8
    """Blocks of the model."""
    compile: bool = True
    """Whether the forward pass goes through torch.compile."""


@dataclass(frozen=True)
class ClassifierRecipe:
    """What decides the classifier's weights; each field is an option of `recipe classifier`."""

    seed: int = 0
    """Of the weights, the order of the images and their augmentation."""
    epochs: int = 13
    """Passes over the images."""
    batch: int = 128
    """Images of a step."""
    lr: float = 4e-3
    """Highest learning rate of the one-cycle schedule."""


def command_of(name: str, recipe: TransformerRecipe) -> str:
    """The command of the recipe that trains so, every option spelt out, since defaults may change."""
    words = [name]
    for key, value in asdict(recipe).items():
        option = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    return shlex.join(words)


def build_optimizers(model: torch.nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks (equal-sized updates keep every block in use), AdamW for the rest."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = name.startswith("transformer_blocks") and parameter.ndim == 2 and ".emb." not in name
        (matrices if inside and muon_lr > 0 else rest).append(parameter)
    adam = torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.99), weight_decay=0.0)
    if not matrices:
        return [adam]
    muon = torch.optim.Muon(matrices, muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, adam]


def learning_rate_scale(step: int, steps: int, warm_up: int = 100) -> float:
    """Linear warm-up, flat, then linear decay to zero over the last third."""
    return min(1.0, (step + 1) / warm_up, max(0.0, (steps - step) / (steps / 3)))


def train_transformer(
    recipe: TransformerRecipe, work: Path, data: Path, *, save_every: float = 120.0, seconds: float = 0.0
) -> None:
    """Train by flow matching, saving everything needed to resume to work/transformer.pt.

    Args:
        recipe: steps, batches and optimizers.
        work: folder of the checkpoint.
        data: folder of the IDX files.
        save_every: seconds between checkpoints.
        seconds: stop after this long, over all resumed runs; 0 trains to the end.
    """
    pixels, labels = _training_pixels(data)
    model = build_transformer(recipe.seed, recipe.layers)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = build_optimizers(model, recipe.muon_lr, recipe.adam_lr)
    base_lrs = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(recipe.seed)
    step, curve, before = 0, [], 0.0
    commands: list[str] | None = []  # all that led to these weights; None where a checkpoint does not say
    checkpoint = work / "transformer.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["ema"])
        step, curve, before = state["step"], state["curve"], state["seconds"]
        commands = state.get("commands")
        if "optimizers" in state:  # not in one that leave_out_block has made
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            generator.set_state(state["generator"])
        print(f"resumed at step {step}", flush=True)
    command = command_of("transformer", recipe)
    if commands is not None and commands[-1:] != [command]:
        commands.append(command)
    forward = torch.compile(model) if recipe.compile else model
    total = recipe.small_steps + recipe.steps
    started, saved_at, losses = time.monotonic() - before, time.monotonic(), []
    while step < total:
        size, images = (14, recipe.small_batch) if step < recipe.small_steps else (28, recipe.batch)
        scale = learning_rate_scale(step, total)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, lr in zip(groups, base_lrs, strict=True):
            group["lr"] = lr * scale
        x_t, t, classes, target = draw_batch(pixels, labels, images, size, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = forward(x_t, timestep=t * 1000, class_labels=classes).sample
        loss = F.mse_loss(velocity.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % 50 == 0 or step == total:
            curve.append((step, size, sum(losses) / len(losses), time.monotonic() - started))
            losses = []
            print("step {} size {} loss {:.4f} seconds {:.0f}".format(*curve[-1]), flush=True)
        out_of_time = bool(seconds) and time.monotonic() - started > seconds
        if step == total or out_of_time or time.monotonic() - saved_at > save_every:
            saved_at = time.monotonic()
            state = {
                "model": model.state_dict(), "ema": average.state_dict(), "step": step, "curve": curve,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers], "recipe": asdict(recipe),
                "commands": commands,
                "generator": generator.get_state(), "seconds": time.monotonic() - started,
            }  # fmt: skip
            _save(state, checkpoint)
            if out_of_time:
                return


def leave_out_block(source: Path, block: int, work: Path) -> None:
    """Start a checkpoint in `work` from a trained one without one of its blocks; training on lets the others take over.

    Args:
        source: a trained transformer.pt.
        block: index of the block that is left out.
        work: folder of the new checkpoint, which must not be there yet.

    Raises:
        InputError: the block does not exist, or the new checkpoint does.
    """
    state = torch.load(source, weights_only=True)
    layers = layers_in(state["ema"])
    target = work / "transformer.pt"
    if not 0 <= block < layers or target.exists():
        raise InputError(f"block {block} is to be left out of {layers} into a new {target}; choose another")

    def without(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {}
        for name, value in weights.items():
            parts = name.split(".")
            if parts[0] == "transformer_blocks":
                if int(parts[1]) == block:
                    continue
                parts[1] = str(int(parts[1]) - (int(parts[1]) > block))
            kept[".".join(parts)] = value
        return kept

    averaged, commands = without(state["ema"]), state.get("commands")
    thinned = {
        "model": averaged, "ema": averaged, "step": 0, "curve": state["curve"], "seconds": state["seconds"],
        "commands": None if commands is None else [*commands, f"thin --block {block}"],
    }  # fmt: skip
    _save(thinned, target)


def train_classifier(recipe: ClassifierRecipe, work: Path, data: Path) -> None:
    """Train the classifier on the "train" images, saving to work/classifier.pt after every epoch.

    Args:
        recipe: passes, batches and learning rate.
        work: folder of the checkpoint; a finished one is left as it is.
        data: folder of the IDX files.
    """
    pixels, labels = _training_pixels(data)
    torch.manual_seed(recipe.seed)
    model = Classifier().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=0.05)
    rounds = math.ceil(len(pixels) / recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.epochs * rounds, pct_start=0.2)
    checkpoint, epoch, seconds = work / "classifier.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        epoch, seconds = state["epoch"], state["seconds"]
        print(f"resumed after epoch {epoch}", flush=True)
    while epoch < recipe.epochs:
        started, total_loss = time.process_time(), 0.0
        for rows in torch.randperm(len(pixels), generator=generator).split(recipe.batch):
            views = augment(pixels[rows], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(views)
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item()
        epoch, seconds = epoch + 1, seconds + time.process_time() - started
        print(f"epoch {epoch} loss {total_loss / rounds:.4f} processor seconds {seconds:.0f}", flush=True)
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "generator": generator.get_state(), "epoch": epoch, "recipe": asdict(recipe), "seconds": seconds,
        }  # fmt: skip
        _save(state, checkpoint)


def _training_pixels(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_split(data, "train")
    return to_pixels(images), labels


def _save(state: dict[str, Any], path: Path) -> None:
    write_atomic(path, lambda temporary: torch.save(state, temporary))
