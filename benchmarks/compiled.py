"""What torch.compile does for a planned model: compiled against eager, dense and planned, outputs and recompilations.

Every layer keeps a number of tokens of its own, chosen by an untrained router. The four ways to run the model take
turns, so that all see the same machine; compiling itself is timed apart.

    python -m benchmarks.compiled --layers 6 --width 384 --tokens 1024
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.overhead import interleaved_ms
from benchmarks.timing import print_result, random_dit
from shiva_search.models.model import Model
from shiva_search.records.plan import Plan
from shiva_search.runtime.apply import AppliedPlan
from shiva_search.selection.router import Router


def falling(model: Model, keep: float) -> Plan:
    """Counts that fall from layer to layer, `keep` of the tokens on average over all layers but the first."""
    count = model.layer_count - 1
    spread = [keep * (1.25 - 0.5 * layer / max(1, count - 1)) for layer in range(count)]
    return Plan.from_rows(model, [[model.tokens] + [min(model.tokens, int(model.tokens * share)) for share in spread]])


def ways(model: Model, plan: Plan, inputs: dict[str, Any]) -> dict[str, Callable[[], torch.Tensor]]:
    """The four ways to run the model; each puts its own hooks on and takes them off again."""
    router = Router.for_model(model).requires_grad_(False)
    eager, compiled = AppliedPlan(model, plan, router), AppliedPlan(model, plan, router).compile()
    compiled.take_off()
    dense = AppliedPlan(model, Plan.dense(model), router).compile()
    dense.take_off()

    def under(applied: AppliedPlan) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            applied.put_on()
            try:
                return model.predict(inputs)
            finally:
                applied.take_off()

        return run

    return {
        "dense": lambda: model.predict(inputs),
        "dense_compiled": under(dense),
        "planned": under(eager),
        "planned_compiled": under(compiled),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = random_dit(options.width // 64, 64, options.layers, round(options.tokens**0.5), options.batch)
    plan = falling(model, options.keep)
    with torch.no_grad():
        calls = ways(model, plan, model.example())
        started = time.perf_counter()
        error = (calls["planned_compiled"]() - calls["planned"]()).abs().max().item()
        calls["dense_compiled"]()
        compile_s = time.perf_counter() - started
        warm = counters["stats"]["unique_graphs"]
        samples = interleaved_ms(calls, options.rounds)
        recompiled = counters["stats"]["unique_graphs"] - warm

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(samples[slow], samples[fast], strict=True))

    result = {
        "speedup": ratio("planned", "planned_compiled"),
        "dense_speedup": ratio("dense", "dense_compiled"),
        "planned_over_dense": ratio("planned_compiled", "dense_compiled"),
        "recompiled": recompiled,
        "max_error": error,
        "compile_s": compile_s,
        **{f"{name}_ms": statistics.median(values) for name, values in samples.items()},
        "rounds": options.rounds,
        "threads": options.threads,
    }
    print(", ".join(f"{name} {statistics.median(values):.1f} ms" for name, values in samples.items()))
    print_result(result)
    return result


if __name__ == "__main__":
    main()
