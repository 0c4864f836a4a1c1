"""What selecting tokens costs: everything but the block itself, as a share of the dense block's time.

Scoring, choosing, gathering and scattering, timed by the runtime's own path around a block that hands its tokens back:
ranked by what a bypass misses, as is the default, with rejected tokens that stand still and with a bypass of rank 16;
and ranked by a router. All of these, the dense block and a pruned block take turns, so that all see the same machine.

    python -m benchmarks.overhead --tokens 1024 --width 384 --keep 0.6 --batch 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from benchmarks.timing import print_result, random_dit
from shiva_search.models.model import Layer, Model
from shiva_search.profiling.conditions import record_inputs
from shiva_search.records.plan import Kept
from shiva_search.runtime.pruned_block import Controller, PrunedBlock
from shiva_search.runtime.scorers import History, TokenScorer
from shiva_search.selection.closed_form import untrained_bypasses
from shiva_search.selection.router import Router

RANK = 16
_LAYER = 1  # the first keeps all tokens


def block_calls(model: Model, router: TokenScorer, keep: float) -> dict[str, Callable[[], Any]]:
    """One block dense, pruned, and with all but the block itself, on the arguments of a dense forward."""
    layer = model.layers[_LAYER]
    kwargs = tree_map(_contiguous, record_inputs(model, model.example())[layer.signature])
    k = int(keep * model.tokens)
    t_B = model.times(model.example())

    bank = untrained_bypasses(model, ranks=(RANK,))

    def around(forward: Callable[..., Any], choice: Kept, scorer: TokenScorer) -> Callable[[], Any]:
        controller = Controller(
            rows=[[choice] * model.layer_count],
            tokens=model.tokens,
            scorer=scorer,
            guidance=model.workload.guidance,
            bypasses=getattr(scorer, "bypasses", {}),
            t_B=t_B,
        )
        seen_BN = torch.ones(len(t_B), model.tokens)
        history = History(seen_BN, seen_BN)
        block = PrunedBlock(layer, forward, controller)

        def run() -> Any:
            controller.history = history if getattr(scorer, "uses_history", False) else None
            return block(**kwargs)

        return run

    return {
        "dense": lambda: layer.module.forward(**kwargs),
        "pruned": around(layer.module.forward, Kept(k), bank),
        "selection": around(_hand_back(layer), Kept(k), bank),
        "selection and bypass": around(_hand_back(layer), Kept(k, RANK), bank),
        "selection by router": around(_hand_back(layer), Kept(k), router),
    }


def _contiguous(value: Any) -> Any:
    # Arguments are recorded at the first block, whose tokens are a view of an image; further down they are rows.
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def _hand_back(layer: Layer) -> Callable[..., Any]:
    adapter = layer.adapter
    return lambda **kwargs: adapter.pack(
        kwargs[adapter.tokens], kwargs.get(adapter.context) if adapter.context else None
    )


def interleaved_ms(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times of each call, milliseconds; every round runs each once, in an order that turns."""
    names = list(calls)
    for name in names:
        calls[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            calls[name]()
            samples[name].append(1e3 * (time.perf_counter() - started))
    return samples


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = random_dit(options.width // 64, 64, 2, round(options.tokens**0.5), options.batch)
    with torch.no_grad():
        calls = block_calls(model, Router.for_model(model).requires_grad_(False), options.keep)
        samples = interleaved_ms(calls, options.rounds)

    # Whatever else a machine does only adds time; it slows neighbours in a round alike, so the share is a round's.
    def share(name: str, less: str = "") -> float:
        rounds = zip(samples[name], samples[less or name], samples["dense"], strict=True)
        return statistics.median((a - (b if less else 0.0)) / dense for a, b, dense in rounds)

    result = {
        "share": share("selection"),
        "bypass_share": share("selection and bypass", "selection"),
        "share_with_bypass": share("selection and bypass"),
        "share_by_router": share("selection by router"),
        "dense_ms": statistics.median(samples["dense"]),
        "selection_ms": statistics.median(samples["selection"]),
        "pruned_ms": statistics.median(samples["pruned"]),
        "rounds": options.rounds,
        "threads": options.threads,
    }
    print(", ".join(f"{name} {statistics.median(values):.3f} ms" for name, values in samples.items()))
    print_result(result)
    return result


if __name__ == "__main__":
    main()
