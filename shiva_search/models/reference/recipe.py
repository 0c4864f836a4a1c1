"""Rebuild fashion-dit, the built-in model: data in (Debian's dataset-fashion-mnist), shipped files out.

    python -m shiva_search.models.reference.recipe classifier --work DIR   # scores samples
    python -m shiva_search.models.reference.recipe transformer --work DIR  # resumable, checkpoints in DIR
    python -m shiva_search.models.reference.recipe thin --source FILE --block 6 --work DIR2  # drops a block
    python -m shiva_search.models.reference.recipe evaluate --work DIR     # figures, into DIR/evaluation.json
    python -m shiva_search.models.reference.recipe ship --work DIR         # writes the files beside this script

The transformer is a stock diffusers DiTTransformer2DModel in pixel space with one token per pixel, trained by
flow matching (x_t = (1 - t) x_0 + t eps, target v = eps - x_0). It first sees 14x14 images (the same tokens at half
the density: a quarter of the tokens, a sixth of the time), then 28x28.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from shiva_search.errors import ShivaError
from shiva_search.models.reference.data import DATA
from shiva_search.models.reference.evaluation import evaluate
from shiva_search.models.reference.shipping import read_checkpoint, ship, trained_size
from shiva_search.models.reference.training import (
    ClassifierRecipe,
    TransformerRecipe,
    leave_out_block,
    train_classifier,
    train_transformer,
)
from shiva_search.models.reference.transformer import build_transformer, layers_in, load_transformer
from shiva_search.records.files import write_json


def add_recipe_options(parser: argparse.ArgumentParser, recipe: type[Any]) -> None:
    """An option per field of a recipe: `small_steps: int = 2000` becomes --small-steps."""
    for field in dataclasses.fields(recipe):
        option = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(option, type=type(field.default), default=field.default, help="default: %(default)s")


def recipe_of(args: argparse.Namespace, recipe: type[Any]) -> Any:
    """The recipe that the options say."""
    return recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(recipe)})


def run_transformer(args: argparse.Namespace) -> None:
    """Train the transformer."""
    recipe = recipe_of(args, TransformerRecipe)
    train_transformer(recipe, args.work, args.data, save_every=args.save_every, seconds=args.seconds)


def run_thin(args: argparse.Namespace) -> None:
    """Start a checkpoint without one block."""
    leave_out_block(args.source, args.block, args.work)


def run_classifier(args: argparse.Namespace) -> None:
    """Train the classifier."""
    train_classifier(recipe_of(args, ClassifierRecipe), args.work, args.data)


def run_evaluate(args: argparse.Namespace) -> None:
    """Print a model's figures; those of a checkpoint are also saved beside it."""
    step, size = None, 28
    if args.work is None:
        model = load_transformer()
    else:
        state = read_checkpoint(args.work / "transformer.pt")
        step, size = state["step"], trained_size(state)
        model = build_transformer(0, layers_in(state["ema"]))
        model.load_state_dict(state["ema"])
    figures: dict[str, Any] = {"step": step} | evaluate(
        model, size=size, images=args.images, samples=args.samples, guidance=args.guidance, steps=args.steps,
        seed=args.seed, device=args.device, dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    for number, error in enumerate(figures["leave_out_nmse"], 1):
        print(f"without block {number}: error {error:.4f}")
    for row in figures["scores"] or []:
        print(f"guidance {row['guidance']:g}: agreement {row['agreement']:.3f}, Frechet distance {row['frechet']:.3f}")
    if figures["real"] is not None:
        real = figures["real"]
        print(f"{real['samples']} photographs: agreement {real['agreement']:.3f}, distance {real['frechet']:.3f}")
    if figures["why_none"] is not None:
        print(f"no samples: {figures['why_none']}")
    if args.work is not None:
        write_json(args.work / "evaluation.json", figures)
    print("RESULT " + json.dumps(figures))


def run_ship(args: argparse.Namespace) -> None:
    """Write the files that come with the package."""
    for part, outcome in ship(args.work, args.data, trained_with=args.trained_with).items():
        print(f"{part}: {outcome}")


def main() -> None:
    """Read the command line and run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    transformer = commands.add_parser("transformer", help="train the transformer")
    add_recipe_options(transformer, TransformerRecipe)
    transformer.add_argument("--save-every", type=float, default=120, help="seconds between checkpoints")
    transformer.add_argument("--seconds", type=float, default=0.0, help="stop after this long (0: never)")
    classifier = commands.add_parser("classifier", help="train the classifier")
    add_recipe_options(classifier, ClassifierRecipe)
    evaluation = commands.add_parser("evaluate", help="figures of a checkpoint, or of the shipped model without --work")
    evaluation.add_argument("--images", type=int, default=128, help="held-out images behind the leave-out errors")
    evaluation.add_argument("--samples", type=int, default=1000)
    evaluation.add_argument("--guidance", type=float, nargs="+", default=[2.5])
    evaluation.add_argument("--steps", type=int, default=25, help="Euler steps per sample")
    evaluation.add_argument("--seed", type=int, default=0)
    evaluation.add_argument("--device", default="cpu")
    evaluation.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    shipping = commands.add_parser("ship", help="write the files that come with the package")
    shipping.add_argument(
        "--trained-with", action="append", help="a command of the transformer's training with its options, in order"
    )
    thin = commands.add_parser("thin", help="start a checkpoint from a trained one without one block, to train on")
    thin.add_argument("--source", type=Path, required=True, help="the trained transformer.pt")
    thin.add_argument("--block", type=int, required=True, help="index of the block to leave out")
    for command in (transformer, classifier, evaluation, shipping, thin):
        command.add_argument("--work", type=Path, required=command is not evaluation, help="folder of checkpoints")
        command.add_argument("--threads", type=int, default=0, help="of torch on the CPU (0: its own choice)")
    for command in (transformer, classifier, shipping):
        command.add_argument("--data", type=Path, default=DATA, help="folder of the IDX files")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    run = {
        "transformer": run_transformer,
        "thin": run_thin,
        "classifier": run_classifier,
        "evaluate": run_evaluate,
        "ship": run_ship,
    }
    try:
        run[args.command](args)
    except ShivaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
