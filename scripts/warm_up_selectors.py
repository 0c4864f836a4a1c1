"""Make the selectors that ship with fashion-dit: a router, and bypasses; both warmed up over all ratios, resumable.

    python scripts/warm_up_selectors.py router --work DIR --steps 300   # models/reference/router.safetensors
    python scripts/warm_up_selectors.py bypass --work DIR               # models/reference/bypass.safetensors

In: the shipped transformer and the "train" part of the shipped held-out images. Out: the selector and its curve.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shiva_search.models.catalog import REFERENCE, load_model
from shiva_search.reporting.tables import write_training
from shiva_search.runtime.selector import Selector
from shiva_search.selection.closed_form import fit_bypasses
from shiva_search.selection.loading import load_selector
from shiva_search.selection.router import Router
from shiva_search.selection.training import warm_up_from


def tell(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Read the command line, fit or build, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["router", "bypass"])
    parser.add_argument("--work", type=Path, required=True, help="folder of what an interrupted run goes on from")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--samples", type=int, default=2304, help="inputs of each pass of the closed-form fit")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, fitted = load_model(), args.work / "closed_form.safetensors"
    selector: Selector = Router.for_model(model, args.seed)
    if args.kind == "bypass":
        if not fitted.is_file():
            fit_bypasses(model, samples=args.samples, seed=args.seed, progress=tell)[0].save(fitted)
        selector = load_selector(fitted)
    _, curve = warm_up_from(
        model, selector, steps=args.steps, seed=args.seed, checkpoint=args.work / f"{args.kind}.pt", progress=tell
    )
    selector.save(REFERENCE / f"{args.kind}.safetensors")
    write_training(REFERENCE / f"{args.kind}_training.csv", curve)


if __name__ == "__main__":
    main()
