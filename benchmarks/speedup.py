"""How much of the speed that fewer operations promise arrives: an SD3-shaped model of 24 blocks, 1,024 image tokens.

Every block but the first keeps the same share of tokens, chosen by what a bypass misses, as is the default, or by a
router; neither is trained, which takes as long. The ideal is the ratio of operations, dense to planned, as torch counts
them on shapes; efficiency is the measured speed-up as a share of it. Dense and planned forwards take turns, timed by
the device's own clock.

The width is SD3's own: 8.4 GiB of memory, and two forwards a minute on two cores. Narrow models (--width 384) spend a
larger part of a block on what does not shrink with its tokens.

    python -m benchmarks.speedup --keep 0.6 --rounds 3 [--width 384] [--selector router]
    python -m benchmarks.speedup --device cuda --dtype bfloat16 --tokens 4096 --rounds 20 --cuda-graph
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import print_result
from shiva_search.devices import Device, open_device
from shiva_search.models.catalog import as_model
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.runtime.scorers import TokenScorer
from shiva_search.selection.closed_form import untrained_bypasses
from shiva_search.selection.router import Router

HEAD_WIDTH = 64


def sd3_shaped(layers: int, width: int, side: int, text: int, batch: int, dtype: str) -> Model:
    """SD3 with random weights, as wide as asked for: side x side image tokens and `text` text tokens."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    module = SD3Transformer2DModel(
        sample_size=2 * side,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=width // HEAD_WIDTH,
        joint_attention_dim=width,
        caption_projection_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=side,
        qk_norm="rms_norm",
    )
    workload = {"batch": batch, "text_tokens": text, "guidance": batch % 2 == 0, "dtype": dtype}
    return as_model(
        module.to(getattr(torch, dtype)).eval().requires_grad_(False), "sd3-shaped", "random weights", workload
    )


def operations(shapes: Model, plan: Plan) -> int:
    """Operations of one forward under the plan, 2 per multiply-add, of a model of shapes alone (on the meta device)."""
    unsigned = plan.with_(model={})  # shapes have no weights to tell them by
    with AppliedPlan(shapes, unsigned, "stride"), FlopCounterMode(display=False) as counter:
        shapes.predict(shapes.example())
    return int(counter.get_total_flops())


def interleaved_ms(
    model: Model, device: Device, plan: Plan, scorer: TokenScorer, rounds: int, graphs: bool = False
) -> tuple[list[float], list[float]]:
    """Milliseconds of dense and planned forwards that take turns; hooks go on and off outside the clock."""
    inputs = model.example()
    dense_ms, planned_ms = [], []

    def run() -> object:
        return model.predict(inputs)

    dense_run = planned_run = run
    if graphs:
        dense_run = device.capture(run)
        with AppliedPlan(model, plan, scorer):
            planned_run = device.capture(run)
    for index in range(rounds + 1):
        before = device.time_ms(dense_run)
        with AppliedPlan(model, plan, scorer):
            planned = device.time_ms(planned_run)
        after = device.time_ms(dense_run)
        if index:  # the first round warms up
            dense_ms.append((before + after) / 2)
            planned_ms.append(planned)
    return dense_ms, planned_ms


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=333)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--selector", choices=["bypass", "router"], default="bypass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cuda-graph", action="store_true", help="time graphs, which spare the host its part")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = open_device(options.device)
    side = round(options.tokens**0.5)
    shape = (options.layers, options.width, side, options.text_tokens, options.batch, options.dtype)
    with device.torch_device:
        model = sd3_shaped(*shape)
    with torch.device("meta"):
        shapes = sd3_shaped(*shape)
    plan = Plan.uniform(model, options.keep)
    with torch.no_grad():
        ideal = operations(shapes, Plan.dense(shapes)) / operations(shapes, plan)
        made = Router.for_model(model) if options.selector == "router" else untrained_bypasses(model, ranks=(16,))
        made = made.requires_grad_(False).to(device.torch_device)
        dense_ms, planned_ms = interleaved_ms(model, device, plan, made, options.rounds, options.cuda_graph)
    speedup = statistics.median(dense / planned for dense, planned in zip(dense_ms, planned_ms, strict=True))
    result = {
        "speedup": speedup,
        "ideal": ideal,
        "efficiency": speedup / ideal,
        "dense_ms": statistics.median(dense_ms),
        "planned_ms": statistics.median(planned_ms),
        "device": device.name,
        "dtype": options.dtype,
        "cuda_graph": options.cuda_graph,
        "width": options.width,
        "selector": options.selector,
        "rounds": options.rounds,
        "threads": options.threads,
    }
    print(f"speed-up {speedup:.3f} of an ideal {ideal:.3f}: {100 * result['efficiency']:.1f} %")
    print_result(result)
    return result


if __name__ == "__main__":
    main()
