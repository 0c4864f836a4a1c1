"""The command line: parse, call one function, print. In: arguments. Out: stdout, stderr and an exit code."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from shiva_search import __version__
from shiva_search.errors import ShivaError

app = typer.Typer(
    name="shiva-search",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find how many tokens each layer of a diffusion transformer may keep within a measured budget.",
)

_INTERRUPTED = 130
_WORKLOAD = "Workload"
_BUDGET = "Budget"


class DType(StrEnum):
    """--dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Per(StrEnum):
    """--per."""

    step = "step"
    image = "image"


ModelOption = Annotated[str, typer.Option("--model", help="What `shiva-search models` lists, or a folder.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, replay:DIR.")]
BatchOption = Annotated[int | None, typer.Option("--batch", help="Samples per forward.", rich_help_panel=_WORKLOAD)]
DTypeOption = Annotated[DType | None, typer.Option("--dtype", help="Of weights and tokens.", rich_help_panel=_WORKLOAD)]
ResolutionOption = Annotated[int | None, typer.Option("--resolution", help="Pixels.", rich_help_panel=_WORKLOAD)]
TextTokensOption = Annotated[
    int | None,
    typer.Option("--text-tokens", help="Length of the prompt, where the model reads one.", rich_help_panel=_WORKLOAD),
]
FramesOption = Annotated[int | None, typer.Option("--frames", help="Of a video.", rich_help_panel=_WORKLOAD)]
GuidanceOption = Annotated[
    bool | None,
    typer.Option(
        "--guidance/--no-guidance", help="Both halves in one batch share a choice.", rich_help_panel=_WORKLOAD
    ),
]
CompileOption = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Measure under torch.compile.", rich_help_panel=_WORKLOAD)
]
CudaGraphOption = Annotated[
    bool | None,
    typer.Option("--cuda-graph/--no-cuda-graph", help="Measure CUDA graphs of forwards.", rich_help_panel=_WORKLOAD),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="CPU threads.", rich_help_panel=_WORKLOAD)]
SeedOption = Annotated[int, typer.Option("--seed", help="Same seed, same random choices.")]
BypassOption = Annotated[
    str, typer.Option(help="What rejected tokens do: none (stand still), mean or affine (a cheap fitted path).")
]
BypassRankOption = Annotated[int | None, typer.Option(help="The one rank of the affine bypass [searched].", min=1)]
ResumeOption = Annotated[bool, typer.Option("--resume/--no-resume", help="Continue what is there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; all else on stderr.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as reports/demo.")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _emit(value: Any, as_json: bool, text: Callable[[], str]) -> None:
    print(json.dumps(value, allow_nan=False) if as_json else text())


def _version(wanted: bool) -> None:
    if wanted:
        print(f"shiva-search {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Common options."""


@app.command(epilog="Example: shiva-search profile --model fashion-dit --device cpu")
def profile(
    model: ModelOption = "fashion-dit",
    device: DeviceOption = "cpu",
    batch: BatchOption = None,
    dtype: DTypeOption = None,
    resolution: ResolutionOption = None,
    frames: FramesOption = None,
    text_tokens: TextTokensOption = None,
    guidance: GuidanceOption = None,
    compile: CompileOption = None,
    cuda_graph: CudaGraphOption = None,
    threads: ThreadsOption = None,
    seconds: Annotated[
        float, typer.Option(help="Time to spend measuring; more where every block once takes longer.", min=1)
    ] = 60.0,
    bypass: BypassOption = "affine",
    bypass_rank: BypassRankOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder [profiles/<device>/<model>, and what differs from its default workload]."),
    ] = None,
    seed: SeedOption = 0,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
) -> None:
    """Measure every block at many token counts on the device."""
    from shiva_search import workflow

    workload = _workload(batch, dtype, resolution, frames, text_tokens, guidance, compile, cuda_graph, threads)
    answer = workflow.profile_command(
        model, device, workload, seconds=seconds, out=out, seed=seed, resume=resume, progress=_say, bypass=bypass,
        bypass_rank=bypass_rank,
    )  # fmt: skip
    _emit(answer.summary, as_json, answer.text)


@app.command(epilog="Example: shiva-search optimize --max-latency 50ms")
def optimize(
    model: ModelOption = "fashion-dit",
    device: DeviceOption = "cpu",
    max_latency: Annotated[str | None, typer.Option(help="50ms or 60%.", rich_help_panel=_BUDGET)] = None,
    max_energy: Annotated[str | None, typer.Option(help="2J or 60%.", rich_help_panel=_BUDGET)] = None,
    max_power: Annotated[str | None, typer.Option(help="250W or 80%.", rich_help_panel=_BUDGET)] = None,
    max_memory: Annotated[str | None, typer.Option(help="6GiB or 60%.", rich_help_panel=_BUDGET)] = None,
    max_flops: Annotated[str | None, typer.Option(help="5T or 60%.", rich_help_panel=_BUDGET)] = None,
    mean_keep: Annotated[str | None, typer.Option(help="0.6 or 60%.", rich_help_panel=_BUDGET)] = None,
    per: Annotated[Per, typer.Option(help="Scope of the budget.", rich_help_panel=_BUDGET)] = Per.step,
    steps: Annotated[int, typer.Option(help="Steps of an image, with --per image.", rich_help_panel=_BUDGET)] = 28,
    batch: BatchOption = None,
    dtype: DTypeOption = None,
    resolution: ResolutionOption = None,
    frames: FramesOption = None,
    text_tokens: TextTokensOption = None,
    guidance: GuidanceOption = None,
    compile: CompileOption = None,
    cuda_graph: CudaGraphOption = None,
    threads: ThreadsOption = None,
    segments: Annotated[int, typer.Option(help="Timestep segments with their own row of k.", min=1)] = 1,
    min_keep: Annotated[float | None, typer.Option(help="Least share a layer keeps; no block is skipped.")] = None,
    trials: Annotated[int, typer.Option(help="Plans to judge.", min=1)] = 100,
    sampler: Annotated[str, typer.Option(help="trade, tpe, nsga2, nsga3, gp, cmaes, random.")] = "trade",
    bypass: BypassOption = "affine",
    bypass_rank: BypassRankOption = None,
    attend: Annotated[
        str, typer.Option(help="Keys that kept tokens see: kept, all, or free to choose by layer.")
    ] = "free",
    train_steps: Annotated[int, typer.Option(help="Steps of tuning at the plan's k; 0 leaves it out.", min=0)] = 60,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps of router warm-up [kept from before, or 180].", min=0)
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Use this recorded profile.")] = None,
    profile_seconds: Annotated[
        float, typer.Option(help="Time to spend profiling; more where every block once takes longer.", min=1)
    ] = 60.0,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL; other workers can join.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder [reports/<model>-<budget>, and the workload that was asked for].")
    ] = None,
    seed: SeedOption = 0,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
) -> None:
    """Profile, search, train the selector, apply, measure again, report."""
    from shiva_search import workflow

    texts = {
        "latency_ms": max_latency,
        "energy_j": max_energy,
        "power_w": max_power,
        "memory_mib": max_memory,
        "gflops": max_flops,
        "mean_keep": mean_keep,
    }
    settings = workflow.Settings(
        model=model,
        device=device,
        workload=_workload(batch, dtype, resolution, frames, text_tokens, guidance, compile, cuda_graph, threads),
        budget={metric: text for metric, text in texts.items() if text is not None},
        per=per.value,
        steps=steps,
        segments=segments,
        min_keep=min_keep,
        trials=trials,
        sampler=sampler,
        bypass=bypass,
        bypass_rank=bypass_rank,
        attend=attend,
        train_steps=train_steps,
        warmup_steps=warmup_steps,
        profile=None if profile is None else str(profile),
        profile_seconds=profile_seconds,
        storage=storage,
        seed=seed,
    )
    answer = workflow.optimize_command(settings, out=out, resume=resume, progress=_say)
    _emit(answer.summary, as_json, answer.text)
    answer.raise_if_broken()


@app.command(epilog="Example: shiva-search train reports/demo --train-steps 200")
def train(
    run: RunArgument,
    train_steps: Annotated[int, typer.Option(help="Further steps at the plan's k.", min=1)] = 60,
    seed: SeedOption = 0,
    resume: ResumeOption = True,
    as_json: JsonOption = False,
) -> None:
    """Train the selector of a run that has a plan."""
    from shiva_search import workflow

    answer = workflow.train_command(run, train_steps, seed=seed, resume=resume, progress=_say)
    _emit(answer.summary, as_json, answer.text)


@app.command(epilog="Example: shiva-search measure reports/demo")
def measure(
    run: RunArgument,
    device: Annotated[str | None, typer.Option(help="Another device than the run's.")] = None,
    seconds: Annotated[float, typer.Option(help="Time to spend measuring.", min=1)] = 20.0,
    seed: SeedOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Apply the plan and measure it again, next to what was predicted."""
    from shiva_search import workflow

    answer = workflow.measure_command(run, device=device, seconds=seconds, seed=seed, progress=_say)
    _emit(answer.summary, as_json, answer.text)
    answer.raise_if_broken()


@app.command(epilog="Example: shiva-search compare reports/demo")
def compare(
    run: RunArgument,
    seconds: Annotated[float, typer.Option(help="Time to spend measuring.", min=1)] = 30.0,
    seed: SeedOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Measure the plan against the alternatives: dense, uniform keep, skipping whole blocks, untrained scorers."""
    from shiva_search import workflow

    answer = workflow.compare_command(run, seconds=seconds, seed=seed, progress=_say)
    _emit(answer.summary, as_json, answer.text)


@app.command(epilog="Example: shiva-search report reports/demo")
def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Rebuild tables, plots and the page from the run's files."""
    from shiva_search import workflow

    answer = workflow.report_command(run)
    _emit(answer.summary, as_json, answer.text)


@app.command(epilog="Example: shiva-search generate reports/demo --count 10")
def generate(
    run: RunArgument,
    count: Annotated[int, typer.Option(help="Images.", min=1)] = 10,
    steps: Annotated[int, typer.Option(help="Sampler steps.", min=1)] = 20,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Strength of guidance [2.5 for fashion-dit, else the pipeline's own].", min=0)
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="For a pipeline of text; may be given several times [four of our own].")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw images from the dense and the planned model side by side, same seeds."""
    from shiva_search import workflow

    answer = workflow.generate_command(
        run, count=count, steps=steps, guidance_scale=guidance_scale, seed=seed, progress=_say, prompts=prompt or ()
    )
    _emit(answer.summary, as_json, answer.text)


@app.command(epilog="Example: shiva-search worker reports/demo --storage journal:search.log --study demo")
def worker(
    run: RunArgument,
    storage: Annotated[str, typer.Option(help="Optuna storage URL of the search.")],
    study: Annotated[str, typer.Option(help="Study name; the search prints it.")],
    trials: Annotated[int | None, typer.Option(help="Stop after this many trials here.", min=1)] = None,
    as_json: JsonOption = False,
) -> None:
    """Join a search that another process or machine has started (RUN: a copy of its folder)."""
    from shiva_search import workflow

    answer = workflow.worker_command(run, storage=storage, study=study, trials=trials, progress=_say)
    _emit(answer.summary, as_json, answer.text)


@app.command(epilog="Example: shiva-search devices")
def devices(as_json: JsonOption = False) -> None:
    """List devices and sensors: what each can measure, and why not."""
    from shiva_search import workflow

    answer = workflow.devices_command()
    _emit(answer.summary, as_json, answer.text)


@app.command(epilog="Example: shiva-search models")
def models(as_json: JsonOption = False) -> None:
    """List what --model accepts."""
    from shiva_search import workflow

    answer = workflow.models_command()
    _emit(answer.summary, as_json, answer.text)


def _workload(
    batch: int | None,
    dtype: DType | None,
    resolution: int | None,
    frames: int | None,
    text_tokens: int | None,
    guidance: bool | None,
    compile: bool | None,
    cuda_graph: bool | None,
    threads: int | None,
) -> dict[str, Any]:
    values = {
        "batch": batch,
        "dtype": None if dtype is None else dtype.value,
        "resolution": resolution,
        "frames": frames,
        "text_tokens": text_tokens,
        "guidance": guidance,
        "compile": compile,
        "cuda_graph": cuda_graph,
        "threads": threads,
    }
    return {name: value for name, value in values.items() if value is not None}


def main(arguments: list[str] | None = None) -> None:
    """Run a command and leave with the contract's exit code; errors are one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = arguments or ["--help"]
    # -v is welcome anywhere on the line, as users type it last.
    verbose = any(item in ("-v", "--verbose") for item in arguments)
    arguments = [item for item in arguments if item not in ("-v", "--verbose")]
    try:
        code = app(arguments, standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except typer.TyperException as error:
        message = " ".join(error.format_message().split()) if hasattr(error, "format_message") else str(error)
        message = message.replace("Value error, ", "")  # what the checker of choices puts before its reason
        context = getattr(error, "ctx", None)
        command = f" {context.info_name}" if context is not None and context.parent is not None else ""
        _say(f"error: {message.rstrip('.')}; `shiva-search{command} --help` shows the usage")
        sys.exit(2)
    except ShivaError as error:
        if verbose:
            traceback.print_exc()
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    if code == _INTERRUPTED:  # typer turns an interruption into its exit code, without a word
        _say(_goes_on(arguments))
    sys.exit(code)


def _goes_on(arguments: list[str]) -> str:
    """What to do after an interruption; only long commands keep what they have done."""
    if arguments[0] not in ("profile", "optimize", "train", "worker"):
        return "interrupted"
    again = "it again without --no-resume" if "--no-resume" in arguments else "the same command again"
    return f"interrupted: progress is kept; run {again} to continue"


if __name__ == "__main__":
    main()
