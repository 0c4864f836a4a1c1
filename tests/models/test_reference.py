"""The built-in model's data, classifier, sampler and recipe, with the shipped files and networks as they are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.reference import data, evaluation, shipping, training
from shiva_search.models.reference.classifier import FEATURES, load_classifier
from shiva_search.models.reference.data import HERE, NULL_CLASS, SPLITS, load_reference_data, to_pixels
from shiva_search.models.reference.evaluation import frechet_distance, sample, score_samples
from shiva_search.models.reference.transformer import CONFIG, build_transformer


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_reference_data("evaluation")
    return to_pixels(images), labels


@pytest.fixture(scope="module")
def transformer() -> torch.nn.Module:
    """The untrained model with random modulation and output, so that every block has an effect."""
    model = build_transformer(seed=1)
    torch.manual_seed(2)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.3)
    torch.nn.init.normal_(model.proj_out_2.weight, std=0.1)
    return model.requires_grad_(False)


class TestData:
    def test_splits_cover_the_shipped_images_without_overlap(self) -> None:
        stored = load_file(HERE / "calibration.safetensors")
        parts = {name: load_reference_data(name) for name in SPLITS}
        assert {name: len(images) for name, (images, _) in parts.items()} == {
            "train": 3072,
            "calibration": 512,
            "evaluation": 512,
        }
        assert torch.equal(torch.cat([images for images, _ in parts.values()]), stored["images"])
        assert torch.equal(torch.cat([labels for _, labels in parts.values()]), stored["labels"].long())

    @pytest.mark.parametrize("split", SPLITS)
    def test_split_has_images_of_every_class(self, split: str) -> None:
        images, labels = load_reference_data(split)
        assert (images.dtype, labels.dtype, images.shape[1:]) == (torch.uint8, torch.int64, (28, 28))
        assert torch.bincount(labels, minlength=10).min() > len(labels) / 20
        pixels = to_pixels(images)
        assert (pixels.min(), pixels.max()) == (-1.0, 1.0)

    def test_unknown_split_is_refused(self) -> None:
        with pytest.raises(InputError, match='train, calibration, evaluation, not "test"'):
            load_reference_data("test")

    def test_missing_file_is_refused(self) -> None:
        with pytest.raises(UnavailableError, match="absent.safetensors"):
            data.shipped("absent.safetensors")

    def test_augment_mirrors_and_shifts_by_one_pixel_at_most(self) -> None:
        image = torch.full((1, 1, 28, 28), -1.0)
        image[0, 0, 10, 5] = 1.0
        views = data.augment(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
        seen = {(int(row), int(column)) for _, _, row, column in (views == 1.0).nonzero()}
        assert seen == {(row, column) for row in (9, 10, 11) for column in (4, 5, 6, 21, 22, 23)}
        assert (views == 1.0).sum() == 400

    def test_batch_mixes_image_and_noise(self) -> None:
        images, labels = load_reference_data("calibration")
        generator = torch.Generator().manual_seed(0)
        x_t, t, classes, target = data.draw_batch(to_pixels(images), labels, 64, 14, generator)
        mix = t.view(-1, 1, 1, 1)
        x0 = x_t - mix * target  # x_t = x_0 + t (eps - x_0)
        assert x0.min() >= -1 - 1e-5 and x0.max() <= 1 + 1e-5
        assert 0 < (classes == NULL_CLASS).sum() < 20
        assert t.min() > 0 and t.max() < 1 and x_t.shape == (64, 1, 14, 14)


class TestClassifier:
    def test_held_out_accuracy(self) -> None:
        classifier, right = load_classifier(), []
        for split in ("calibration", "evaluation"):
            images, labels = load_reference_data(split)
            right.append(classifier(to_pixels(images)).argmax(1) == labels)
        assert torch.cat(right).double().mean() > 0.91

    def test_is_small_frozen_and_in_evaluation_mode(self) -> None:
        classifier = load_classifier()
        assert sum(parameter.numel() for parameter in classifier.parameters()) <= 400_000
        assert (HERE / "classifier.safetensors").stat().st_size <= 2 * 2**20
        assert not classifier.training
        assert not any(parameter.requires_grad for parameter in classifier.parameters())

    def test_head_reads_the_features(self, held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
        classifier, pixels = load_classifier(), held_out[0][:8]
        features = classifier.features(pixels)
        assert features.shape == (8, FEATURES)
        assert torch.equal(classifier.head(features), classifier(pixels))


class TestFrechetDistance:
    def test_agrees_with_the_matrix_square_root(self) -> None:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(2))
        (mean_a, cov_a), (mean_b, cov_b) = evaluation.feature_moments(a), evaluation.feature_moments(3 * b + 1)
        root = np.real(scipy.linalg.sqrtm((cov_a @ cov_b).numpy()))
        expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * np.trace(root)
        assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(float(expected), rel=1e-9)
        assert frechet_distance(mean_b, cov_b, mean_a, cov_a) == pytest.approx(float(expected), rel=1e-9)

    def test_of_one_dimension_is_known(self) -> None:
        one = torch.ones(1)
        assert frechet_distance(one * 2, one.view(1, 1) * 9, one * 5, one.view(1, 1) * 16) == pytest.approx(9 + 1)

    def test_of_a_singular_covariance_with_itself_is_zero(self) -> None:
        few = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
        mean, covariance = evaluation.feature_moments(few)
        assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)

    def test_mismatched_shapes_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"\[3\], \[3, 3\], \[4\], \[4, 4\]"):
            frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))


class TestScoreSamples:
    def test_real_images_score_well_and_spoiled_ones_badly(self, held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
        pixels, labels = held_out
        real = score_samples(pixels, labels)
        noisy = score_samples(
            pixels + 0.5 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)), labels
        )
        wrong = score_samples(pixels, (labels + 1) % 10)
        assert real["agreement"] > 0.88
        assert noisy["agreement"] < real["agreement"]
        assert noisy["frechet"] > 5 * real["frechet"]
        assert wrong["agreement"] < 0.1
        assert wrong["frechet"] == real["frechet"]

    @pytest.mark.parametrize(("shape", "labels"), [((4, 1, 14, 14), 4), ((4, 1, 28, 28), 3), ((1, 1, 28, 28), 1)])
    def test_wrong_shapes_are_refused(self, shape: tuple[int, ...], labels: int) -> None:
        with pytest.raises(InputError):
            score_samples(torch.zeros(shape), torch.zeros(labels, dtype=torch.int64))


def gaussian_velocity(mean: float, deviation: float) -> evaluation.VelocityFn:
    """The exact velocity where images are N(mean, deviation^2): noise eps must end at mean + deviation * eps."""

    def velocity(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert ((t > 0) & (t <= 1)).all()
        t = t.view(-1, *[1] * (x.ndim - 1))
        variance = ((1 - t) * deviation) ** 2 + t**2
        return (t - (1 - t) * deviation**2) / variance * (x - (1 - t) * mean) - mean

    return velocity


class TestSample:
    labels = torch.arange(6) % 3

    def error(self, steps: int, method: str) -> float:
        velocity, seed = gaussian_velocity(0.1, 0.2), 0
        drawn = sample(velocity, self.labels, steps, 1.0, torch.Generator().manual_seed(seed), (1, 4, 4), method=method)
        noise = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        return float((drawn - (0.1 + 0.2 * noise)).abs().max())

    def test_euler_converges_to_the_exact_flow_at_first_order(self) -> None:
        assert self.error(200, "euler") < 0.02
        assert self.error(100, "euler") / self.error(200, "euler") == pytest.approx(2, rel=0.2)

    def test_heun_converges_faster(self) -> None:
        assert self.error(40, "heun") < self.error(80, "euler") / 2

    def test_guidance_sees_both_halves_and_extrapolates(self) -> None:
        seen = []

        def velocity(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            seen.append(labels.tolist())
            return x + torch.where(labels == NULL_CLASS, 0.1, 0.2).view(-1, 1)

        drawn = sample(velocity, torch.tensor([3, 7]), 1, 2.5, torch.Generator().manual_seed(0), (5,))
        assert seen == [[NULL_CLASS, NULL_CLASS, 3, 7]]
        assert torch.allclose(drawn, torch.full((2, 5), -(0.1 + 2.5 * (0.2 - 0.1))), atol=1e-6)

    def test_guidance_of_one_skips_the_unconditional_half(self) -> None:
        sizes = []

        def velocity(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            assert NULL_CLASS not in labels
            return x

        sample(velocity, self.labels, 3, 1.0, torch.Generator().manual_seed(0), (2,), batch=4)
        assert sizes == [4, 4, 4, 2, 2, 2]

    def test_images_do_not_depend_on_the_batch_size(self) -> None:
        velocity = gaussian_velocity(0.0, 0.3)
        draws = [
            sample(velocity, self.labels, 4, 2.0, torch.Generator().manual_seed(5), batch=batch) for batch in (2, 6)
        ]
        assert torch.equal(*draws)

    @pytest.mark.parametrize(("steps", "method"), [(0, "euler"), (3, "midpoint")])
    def test_wrong_settings_are_refused(self, steps: int, method: str) -> None:
        with pytest.raises(InputError):
            sample(gaussian_velocity(0, 1), self.labels, steps, 1.0, torch.Generator(), method=method)


class TestLeaveOut:
    def test_errors_match_a_model_whose_block_does_nothing(
        self, transformer: torch.nn.Module, held_out: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        pixels = torch.nn.functional.interpolate(held_out[0][:6], size=(8, 8), mode="area")
        labels = held_out[1][:6]

        def errors() -> list[float]:
            return evaluation.leave_out_errors(transformer, pixels, labels, torch.Generator().manual_seed(0), batch=4)

        before = errors()
        assert len(before) == CONFIG["num_layers"] and min(before) > 1e-4
        block = transformer.get_submodule("transformer_blocks.3")
        linear = block.get_submodule("norm1.linear")
        saved = {name: parameter.clone() for name, parameter in linear.named_parameters()}
        try:
            for parameter in linear.parameters():  # gates of zero: the block adds nothing
                parameter.zero_()
            idle = errors()
        finally:
            linear.load_state_dict(saved)
        assert idle[3] == 0.0
        assert min(error for index, error in enumerate(idle) if index != 3) > 0
        assert errors() == before

    def test_hook_is_gone_after_an_exception(self, transformer: torch.nn.Module) -> None:
        block = transformer.get_submodule("transformer_blocks.0")
        with pytest.raises(RuntimeError, match="stop"), evaluation.without_block(block):
            raise RuntimeError("stop")
        assert not block._forward_hooks

    def test_small_models_have_no_scores_but_a_reason(self, transformer: torch.nn.Module) -> None:
        figures = evaluation.evaluate(transformer, size=4, images=4)
        assert figures["scores"] is None and "4 x 4" in figures["why_none"]
        assert len(figures["leave_out_nmse"]) == CONFIG["num_layers"]


class TestShip:
    def checkpoint(self, work: Path, model: torch.nn.Module, size: int = 28) -> None:
        recipe = {"small_steps": 50, "steps": 50, "muon_lr": 0.0, "compile": False}
        curve = [(50, 14, 0.5, 60.0), (100, size, 0.25, 180.0)]
        state = {"ema": model.state_dict(), "step": 100, "curve": curve, "recipe": recipe, "commands": None}
        work.mkdir(exist_ok=True)
        torch.save(state, work / "transformer.pt")

    def figures(self, step: int) -> dict[str, object]:
        return {
            "step": step, "size": 28, "leave_out_images": 128, "leave_out_nmse": [0.125] * 8, "samples": 1000,
            "steps": 25, "method": "euler", "scores": [{"guidance": 2.5, "agreement": 0.875, "frechet": 1.75}],
            "real": {"samples": 1000, "agreement": 0.9375, "frechet": 0.25}, "seed": 0, "dtype": "float32",
            "why_none": None,
        }  # fmt: skip

    def test_parts_without_inputs_are_left_and_say_why(self, tmp_path: Path) -> None:
        outcome = shipping.ship(tmp_path, tmp_path / "no-data", tmp_path / "target")
        assert set(outcome) == {"calibration", "classifier", "transformer", "model card"}
        assert all(text.startswith("left as it is: there is no ") for text in outcome.values())
        assert not (tmp_path / "target").exists()

    def test_unfinished_training_is_not_shipped(self, tmp_path: Path, transformer: torch.nn.Module) -> None:
        self.checkpoint(tmp_path, transformer, size=14)
        outcome = shipping.ship(tmp_path, tmp_path / "no-data", tmp_path / "target")
        assert "still at 14 x 14" in outcome["transformer"]

    def test_transformer_and_card(self, tmp_path: Path, transformer: torch.nn.Module) -> None:
        from diffusers import DiTTransformer2DModel

        work, target = tmp_path / "work", tmp_path / "target"
        self.checkpoint(work, transformer)
        target.mkdir()
        (target / "classifier.safetensors").write_bytes((HERE / "classifier.safetensors").read_bytes())
        (work / "evaluation.json").write_text(json.dumps(self.figures(step=50)))
        outcome = shipping.ship(work, tmp_path / "no-data", target)
        assert outcome["transformer"] == "written"
        assert "evaluation.json is of step 50, transformer.pt of step 100" in outcome["model card"]

        (work / "evaluation.json").write_text(json.dumps(self.figures(step=100)))
        assert "--trained-with" in shipping.ship(work, tmp_path / "no-data", target)["model card"]
        outcome = shipping.ship(work, tmp_path / "no-data", target, ["transformer --steps 50", "thin --block 2"])
        assert outcome["model card"] == "written"
        loaded = DiTTransformer2DModel.from_pretrained(target / "transformer")
        for name, tensor in transformer.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        card = (target / "MODEL_CARD.md").read_text()
        assert "    transformer --steps 50\n    thin --block 2\n" in card
        assert "| guidance 2.5 | 87.5% | 1.75 |" in card
        assert "| 1000 held-out photographs | 93.8% | 0.25 |" in card
        assert "100 steps on a CPU in 3 minutes" in card
        assert (target / "training_curve.csv").read_text().splitlines()[1:] == [
            "50,14,0.50000,60",
            "100,28,0.25000,180",
        ]
        assert not [path for path in target.rglob("*") if path.name.startswith(".")]
        modes = {path.stat().st_mode for path in target.rglob("*") if path.is_file()}
        assert len(modes) == 1, "all files may be read by the same users"


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A folder in the format of the original, with 64 shipped images to train on."""
    images, labels = load_reference_data("calibration")
    images, labels = images.repeat(9, 1, 1)[: data.HELD_OUT + 64], labels.repeat(9)[: data.HELD_OUT + 64]
    folder = tmp_path / "data"
    folder.mkdir()
    for kind, tensor in (("images-idx3", images), ("labels-idx1", labels.to(torch.uint8))):
        header = b"\x00\x00\x08" + bytes([tensor.ndim]) + b"".join(n.to_bytes(4, "big") for n in tensor.shape)
        with gzip.open(folder / f"train-{kind}-ubyte.gz", "wb", compresslevel=1) as file:
            file.write(header + tensor.numpy().tobytes())
    return folder


def stop_at(monkeypatch: pytest.MonkeyPatch, function: str, call: int) -> None:
    """Interrupt training, as a user does, in the given call of one of its functions."""
    real, calls = getattr(training, function), []

    def interrupted(*args: Any) -> Any:
        calls.append(function)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, function, interrupted)


class TestTraining:
    def test_splits_of_the_original_files(self, idx_folder: Path) -> None:
        images, labels = load_reference_data("calibration")
        train_images, train_labels = data.load_split(idx_folder, "train")
        assert torch.equal(train_images, images[:64]) and torch.equal(train_labels, labels[:64])
        assert len(data.load_split(idx_folder, "held_out")[0]) == data.HELD_OUT
        with pytest.raises(UnavailableError, match="t10k-images"):
            data.load_split(idx_folder, "test")

    def test_file_of_another_format_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "floats.gz"
        path.write_bytes(gzip.compress(b"\x00\x00\x0d\x01" + bytes(8)))
        with pytest.raises(InputError, match="00 00 0d"):
            data.read_idx(path)

    @pytest.mark.parametrize(
        ("name", "train", "interrupted_call"),
        [
            (
                "classifier.pt",
                partial(training.train_classifier, training.ClassifierRecipe(epochs=2, batch=32)),
                ("augment", 4),  # in the second of two epochs
            ),
            (
                "transformer.pt",
                partial(
                    training.train_transformer,
                    training.TransformerRecipe(small_steps=2, small_batch=2, steps=1, batch=1, compile=False),
                    save_every=0,
                ),
                ("draw_batch", 3),
            ),
        ],
        ids=["classifier", "transformer"],
    )
    def test_resumed_training_ends_where_uninterrupted_training_does(
        self,
        name: str,
        train: Callable[..., None],
        interrupted_call: tuple[str, int],
        idx_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        train(work=tmp_path / "whole", data=idx_folder)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, *interrupted_call)
            train(work=tmp_path / "parts", data=idx_folder)
        train(work=tmp_path / "parts", data=idx_folder)
        assert "resumed" in capsys.readouterr().out
        whole, parts = (torch.load(tmp_path / work / name, weights_only=True) for work in ("whole", "parts"))
        assert whole["recipe"] == parts["recipe"]
        assert whole.get("commands") == parts.get("commands")
        for key, tensor in whole["model"].items():
            assert torch.equal(parts["model"][key], tensor), key

    def test_leaving_a_block_out_for_good_is_skipping_it(
        self, tmp_path: Path, transformer: torch.nn.Module, held_out: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        state = {"ema": transformer.state_dict(), "step": 9, "curve": [(9, 28, 0.5, 1.0)], "seconds": 1.0}
        torch.save({**state, "commands": ["transformer --steps 9"]}, tmp_path / "source.pt")
        training.leave_out_block(tmp_path / "source.pt", 2, tmp_path / "work")
        thinned = torch.load(tmp_path / "work" / "transformer.pt", weights_only=True)
        assert thinned["commands"] == ["transformer --steps 9", "thin --block 2"]
        smaller = build_transformer(seed=0, layers=CONFIG["num_layers"] - 1)
        smaller.load_state_dict(thinned["ema"])
        inputs = (held_out[0][:2, :, ::4, ::4], torch.tensor([0.25, 0.75]), held_out[1][:2])
        with torch.no_grad(), evaluation.without_block(transformer.get_submodule("transformer_blocks.2")):
            skipped = evaluation.velocity_of(transformer)(*inputs)
        with torch.no_grad():
            assert torch.equal(evaluation.velocity_of(smaller)(*inputs), skipped)
        with pytest.raises(InputError, match="block 2"):
            training.leave_out_block(tmp_path / "source.pt", 2, tmp_path / "work")

    def test_commands_name_every_option(self) -> None:
        recipe = training.TransformerRecipe(steps=7, compile=False)
        command = training.command_of("transformer", recipe)
        assert command.startswith("transformer --seed 0 ") and command.endswith(" --no-compile")
        assert " --steps 7 " in command and " --small-steps 2000 " in command
