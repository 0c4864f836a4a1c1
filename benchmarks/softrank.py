"""What the soft rank takes: memory beyond its input and output, and time, against materialising all N x N pairs.

Forward and backward of one sample's scores at the token count of a 1024 x 1024 image, interleaved; medians of the
pairs' ratios. Memory is the process's own high-water mark, so each implementation runs in a process of its own.

    python -m benchmarks.softrank [--tokens 4096]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import print_result
from shiva_search.errors import UnavailableError
from shiva_search.selection.soft_topk import soft_rank

TAU = 0.1


def naive_soft_rank(scores_BN: torch.Tensor, tau: float) -> torch.Tensor:
    """Eq. 5 as it is written, all pairs at once."""
    gaps_BNN = scores_BN[:, None, :] - scores_BN[:, :, None]
    return torch.sigmoid(gaps_BNN / tau).sum(dim=2) + 0.5


IMPLEMENTATIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "chunked": soft_rank,
    "all pairs": naive_soft_rank,
}


def run(implementation: str, scores_BN: torch.Tensor, weights_BN: torch.Tensor) -> torch.Tensor:
    """Forward and backward; the gradient."""
    leaf_BN = scores_BN.clone().requires_grad_()
    (IMPLEMENTATIONS[implementation](leaf_BN, TAU) * weights_BN).sum().backward()
    assert leaf_BN.grad is not None
    return leaf_BN.grad


def inputs(tokens: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, tokens, generator=generator), torch.randn(samples, tokens, generator=generator)


def extra_mib(implementation: str, tokens: int, samples: int) -> float:
    """Rise of this process's peak memory during one run, MiB."""
    run(implementation, *inputs(64, samples))  # what autograd needs once
    drawn = inputs(tokens, samples)
    status = Path("/proc/self/status")
    if not status.is_file():
        raise UnavailableError("peak memory is read from /proc/self/status, which this system lacks; use Linux")
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    before_kib = _field_kib(status, "VmRSS")
    run(implementation, *drawn)
    return (_field_kib(status, "VmHWM") - before_kib) / 1024


def _field_kib(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory-of", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(extra_mib(options.memory_of, options.tokens, options.samples)))
        return
    memory_mib = {}
    for name in IMPLEMENTATIONS:
        command = [sys.executable, "-m", "benchmarks.softrank", "--memory-of", name]
        command += ["--tokens", str(options.tokens), "--samples", str(options.samples)]
        memory_mib[name] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    drawn = inputs(options.tokens, options.samples)
    difference = (run("chunked", *drawn) - run("all pairs", *drawn)).abs().max().item()
    ratios, chunked_ms = [], []
    for _ in range(options.rounds):
        took_s = {}
        for name in IMPLEMENTATIONS:
            begun = time.perf_counter()
            run(name, *drawn)
            took_s[name] = time.perf_counter() - begun
        ratios.append(took_s["chunked"] / took_s["all pairs"])
        chunked_ms.append(1000 * took_s["chunked"])
    ratio, spent_ms = statistics.median(ratios), statistics.median(chunked_ms)
    print(
        f"{options.tokens} tokens: {memory_mib['chunked']:.1f} MiB instead of {memory_mib['all pairs']:.0f}, "
        f"{spent_ms:.1f} ms, {ratio:.2f} times the time; gradients differ by {difference:.1e}"
    )
    print_result(
        {
            "extra_mib": memory_mib["chunked"],
            "all_pairs_mib": memory_mib["all pairs"],
            "time_ratio": ratio,
            "time_ms": spent_ms,
            "gradient_difference": difference,
        }
    )


if __name__ == "__main__":
    main()
