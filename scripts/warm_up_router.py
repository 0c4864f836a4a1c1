"""Train the router that ships with fashion-dit: warm-up over all ratios, resumable.

    python scripts/warm_up_router.py --work DIR --steps 300   # writes models/reference/router.safetensors

In: the shipped transformer and the "train" part of the shipped held-out images. Out: the router and its curve.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shiva_search.models.catalog import REFERENCE, load_model
from shiva_search.reporting.tables import write_training
from shiva_search.selection.training import warm_up


def main() -> None:
    """Read the command line, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    router, curve = warm_up(
        load_model(),
        steps=args.steps,
        seed=args.seed,
        checkpoint=args.work / "router.pt",
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    router.save(REFERENCE / "router.safetensors")
    write_training(REFERENCE / "router_training.csv", curve)


if __name__ == "__main__":
    main()
