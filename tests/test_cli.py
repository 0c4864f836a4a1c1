"""The command line: one line per error, the contract's exit codes, nothing half-written."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shiva_search.cli import app, main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["optimize", "--model", "nonsense", "--max-latency", "50ms"], 4, "unknown model 'nonsense'"),
        (["optimize", "--device", "tpu", "--max-latency", "50ms"], 2, "tpu"),
        (["optimize", "--device", "cuda", "--max-latency", "50ms"], 4, "no CUDA device"),
        (["optimize", "--max-latency", "50"], 2, "needs a unit"),
        (["optimize", "--max-latency", "0ms"], 2, "above zero"),
        (["optimize", "--max-latency", "-5ms"], 2, "above zero"),
        (["optimize", "--max-energy", "3 bananas"], 2, "not a unit of energy"),
        (["optimize", "--mean-keep", "1.5"], 2, "share"),
        (["optimize"], 2, "needs a budget"),
        (["optimize", "--max-latency", "60%", "--attend", "some"], 2, "one of kept, all, free"),
        (["optimize", "--max-latency", "60%", "--sampler", "best"], 2, "one of trade"),
        (
            ["optimize", "--max-latency", "60%", "--min-keep", "3"],
            2,
            "--min-keep is a share of tokens in (0, 1], got 3",
        ),
        (["optimize", "--max-latency", "60%", "--bypass", "cubic"], 2, "one of none, mean, affine"),
        (["optimize", "--max-latency", "60%", "--bypass", "none", "--bypass-rank", "4"], 2, "--bypass affine"),
        (["optimize", "--batch", "3", "--max-latency", "50ms"], 2, "even"),
        (["profile", "--text-tokens", "7"], 2, "models that read text, and DiTTransformer2DModel takes none; leave it"),
        (["optimize", "--max-latency", "60%", "--text-tokens", "7"], 2, "--text-tokens is for models that read text"),
        (["optimize", "--trials", "many", "--max-latency", "50ms"], 2, "--trials"),
        (["measure", "no/such/run"], 2, "no/such/run"),
        (["report", "no/such/run"], 2, "shiva-search optimize --max-latency 60% --out no/such/run"),
        (["frobnicate"], 2, "frobnicate"),
        (["train"], 2, "RUN"),
        (["profile", "--nonsense"], 2, "`shiva-search profile --help`"),
        (["nonsense"], 2, "`shiva-search --help`"),
    ],
)
def test_bad_input_is_one_line_and_the_right_code(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    left, out, err = run(capsys, *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert left == code, err
    assert out == ""
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["profile"], "interrupted: progress is kept; run the same command again to continue"),
        (["profile", "--no-resume"], "interrupted: progress is kept; run it again without --no-resume to continue"),
        (["devices"], "interrupted"),
    ],
)
def test_an_interruption_says_what_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shiva_search.workflow.devices_command", interrupted)
    monkeypatch.setattr("shiva_search.workflow.profile_command", interrupted)
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.strip()) == (130, "", says)


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null/run"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    started = time.monotonic()
    code, _, err = run(capsys, "optimize", "--max-latency", "60%", "--out", folder)
    assert code == 2
    assert "cannot write" in err
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("plan", ["{", "{}", '{"tokens": 784, "tokens_kept": [[784, "x"]]}'])
def test_an_unreadable_plan_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, plan: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 1, "settings": {"budget": {"latency_ms": "60%"}}}))
    (tmp_path / "plan.json").write_text(plan)
    code, _, err = run(capsys, "measure", str(tmp_path))
    assert code == 2
    assert "plan" in err
    assert "Traceback" not in err


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "devices", "--json")
    assert code == 0
    found = {entry["device"]: entry for entry in json.loads(out)["devices"]}
    assert found["cpu"]["available"]
    assert torch.cuda.is_available() or "no CUDA device is available" in found["cuda"]["reason"]
    code, out, _ = run(capsys, "models", "--json")
    listed = json.loads(out)
    assert "fashion-dit" in [row["name"] for row in listed["models"]]
    assert [row["class"] for row in listed["refused"]] == ["SanaTransformer2DModel"]


def test_models_are_listed_by_family_with_what_was_verified(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "models")
    lines = out.splitlines()
    start = lines.index("sd3: SD3Transformer2DModel")
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["sd3.5-medium", "sd3.5-large", "sd3-medium"]
    assert lines[start + 5].startswith("  verified: exact") and "StableDiffusion3Pipeline" in lines[start + 5]
    assert lines[start + 6] == "  --attend all: JointTransformerBlock"
    assert "  --attend all: Flux2TransformerBlock" in lines
    assert sum(line.startswith("  verified: ") for line in lines) == 12


def test_frames_of_a_video_reach_the_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "profile", "--model", "ltx-video", "--frames", "16", "--out", str(tmp_path))
    assert code == 2
    assert "multiple of 8 and one more, got --frames 16" in err


def test_devices_say_why_a_sensor_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "devices", "--json")
    for device in json.loads(out)["devices"]:
        for sensor in device["sensors"]:
            assert sensor["how"]


COMMANDS = ["profile", "optimize", "train", "measure", "compare", "report", "generate", "worker", "devices", "models"]


def test_the_readme_lists_every_command() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = readme.partition("| command | what it does |\n|---|---|\n")[2].partition("\n\n")[0]
    listed = [line.split("`")[1].split()[0] for line in table.splitlines()]
    assert listed == COMMANDS == [command.callback.__name__ for command in app.registered_commands if command.callback]


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert f"Example: shiva-search {command}" in " ".join(out.split())


def test_help_does_not_load_torch() -> None:
    program = (
        "import sys\nfrom shiva_search.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'diffusers', 'optuna', 'matplotlib', 'pandas', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
