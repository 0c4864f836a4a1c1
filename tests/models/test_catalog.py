"""What --model accepts: names, folders of transformers and of whole pipelines, hub ids, and clear refusals."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch import nn

import shiva_search as ss
from shiva_search.errors import InputError, UnavailableError
from shiva_search.models.catalog import ARCHITECTURES, list_models, load_model
from shiva_search.models.families import FAMILIES
from shiva_search.records.workload import Workload
from tests.models.conformance import FAMILY_CASES, READINGS, FamilyCase
from tests.runtime.test_pipelines import PIPELINES

#: Billions of parameters, image tokens, blocks, text tokens, batch.
PUBLISHED = {
    "sd3.5-medium": (2.243, 4096, 24, 333, 2),
    "sd3.5-large": (8.057, 4096, 38, 333, 2),
    "sd3-medium": (2.028, 4096, 24, 333, 2),
    "flux.1-dev": (11.901, 4096, 57, 512, 1),
    "flux.1-schnell": (11.891, 4096, 57, 512, 1),
    "pixart-sigma": (0.611, 4096, 28, 300, 2),
    "pixart-alpha": (0.611, 4096, 28, 120, 2),
    "dit-xl-2": (0.750, 256, 28, None, 2),
    "auraflow-v0.3": (6.859, 4096, 36, 256, 2),
    "cogview4-6b": (6.369, 4096, 28, 224, 1),
    "lumina-image-2.0": (2.610, 4096, 26, 256, 1),
    "flux.2-dev": (32.223, 4096, 56, 512, 1),
    "qwen-image": (20.430, 4096, 60, 256, 1),
    "z-image-turbo": (6.155, 4096, 30, 128, 1),
    "wan2.1-t2v-14b": (14.288, 18900, 40, 512, 1),
    "wan2.1-t2v-1.3b": (1.419, 18900, 30, 512, 1),
    "ltx-video": (1.923, 5376, 28, 128, 2),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_their_published_size(name: str) -> None:
    model = load_model(name, real=False)
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    workload = model.workload
    found = (round(parameters / 1e9, 3), model.tokens, model.layer_count, workload.text_tokens, workload.batch)
    assert found == PUBLISHED[name]
    assert workload.guidance == (workload.batch == 2)
    assert "weights_hash" not in model.fingerprint()


def test_every_architecture_is_known_by_its_size() -> None:
    assert set(ARCHITECTURES) == set(PUBLISHED)


def test_large_architectures_are_shapes_and_run_as_such() -> None:
    model = load_model("flux.1-dev", dtype="bfloat16", resolution=256)
    assert model.predict(model.example()).is_meta
    assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
    assert len({layer.signature for layer in model.layers}) == 2
    assert model.tokens == 256


def test_a_model_that_looks_at_its_inputs_is_not_given_as_shapes() -> None:
    with pytest.raises(UnavailableError, match="lumina-image-2.0 takes 9.7 GiB.*bfloat16"):
        load_model("lumina-image-2.0")


def test_tokens_of_videos_are_latent_frames_times_height_times_width() -> None:
    assert load_model("wan2.1-t2v-1.3b", real=False, resolution=256, frames=9).tokens == 3 * 16 * 16
    assert load_model("ltx-video", real=False, resolution=256, frames=9).tokens == 2 * 8 * 8
    for name, multiple in (("wan2.1-t2v-1.3b", 4), ("ltx-video", 8)):
        with pytest.raises(InputError, match=f"multiple of {multiple} and one more, got --frames 16"):
            _ = load_model(name, real=False, frames=16).tokens


def test_text_is_for_models_that_read_it() -> None:
    with pytest.raises(InputError, match="--text-tokens is for models that read text, and DiTTransformer2DModel takes"):
        load_model("dit-xl-2", real=False, text_tokens=7)
    usual = load_model("dit-xl-2", real=False)
    with pytest.raises(InputError, match="--text-tokens is for models that read text"):
        ss.wrap(usual.module, workload=Workload(batch=2, text_tokens=7))
    # What files of before say of such a model is still its default, and has the default's profile.
    for text_tokens in (0, None):
        stored = {**usual.workload.as_dict(), "text_tokens": text_tokens}
        assert ss.wrap(usual.module, workload=Workload.from_dict(stored)).workload == usual.workload
    assert load_model("sd3.5-medium", real=False, text_tokens=0).workload.text_tokens == 0


def test_images_have_no_frames() -> None:
    with pytest.raises(InputError, match="--frames is for video models, and SD3Transformer2DModel makes images"):
        load_model("sd3.5-medium", real=False, frames=4)


def test_a_plan_for_shapes_fits_any_weights_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FAMILY_CASES[0]
    family, _ = ARCHITECTURES["dit-xl-2"]
    monkeypatch.setitem(ARCHITECTURES, "tiny", (family, case.config))  # type: ignore[index]
    shapes, first = load_model("tiny", real=False), load_model("tiny", seed=1)
    second = load_model("tiny", seed=2)
    plan = ss.Plan.uniform(shapes, 0.5)
    assert dict(plan.model) == shapes.fingerprint()
    ss.apply_plan(first, plan).remove()
    with pytest.raises(InputError, match="weights_hash"):
        ss.apply_plan(second, ss.Plan.uniform(first, 0.5))
    again = load_model("tiny", seed=1)
    assert first.fingerprint() == again.fingerprint()
    assert first.predict(first.example()).isfinite().all()


@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.name)
def test_folders_load_the_same_model(case: FamilyCase, tmp_path: Path) -> None:
    module = case.module()
    module.save_pretrained(tmp_path / "pipeline" / "transformer")  # type: ignore[operator]
    expected = case.model()
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        found = load_model(str(folder), **case.workload)
        assert found.fingerprint() == {**expected.fingerprint(), "name": str(folder)}
        inputs = expected.example(seed=1)
        assert torch.equal(found.predict(inputs), expected.predict(inputs))


def test_the_workload_replaces_defaults() -> None:
    model = load_model("pixart-sigma", real=False, batch=4, resolution=512, text_tokens=77, dtype="float16")
    inputs = model.example()
    assert model.tokens == 1024
    assert inputs["hidden_states"].shape == (4, 4, 64, 64)
    assert inputs["encoder_hidden_states"].shape == (4, 77, 4096)
    assert inputs["encoder_hidden_states"].dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "workload", "message"),
    [
        ("sd3.5-medium", {"resolution": 1000}, "multiple of 16"),
        ("sd3-medium", {"resolution": 4096}, "up to 3072 pixels"),
        ("flux.1-dev", {"resolution": 1000}, "multiple of 16"),
        ("pixart-alpha", {"resolution": 1001}, "multiple of 16"),
        ("dit-xl-2", {"resolution": 100}, "multiple of 16"),
        ("auraflow-v0.3", {"resolution": 2048}, "up to 1536 pixels"),
        ("wan2.1-t2v-14b", {"resolution": 100}, "multiple of 16"),
        ("ltx-video", {"resolution": 100}, "multiple of 32"),
    ],
)
def test_resolutions_a_model_cannot_have_are_refused(name: str, workload: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _ = load_model(name, real=False, **workload).tokens


def test_unknown_names_say_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="shiva-search models"):
        load_model("fashion-dti")
    with pytest.raises(UnavailableError, match="folder with a transformer"):
        load_model(str(tmp_path))


def test_a_hub_that_is_not_there_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnavailableError, match="not in the hub's cache.*HF_HUB_OFFLINE is set.*give the folder"):
        load_model("nobody/no-such-model")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(
            UnavailableError, match="could not be reached .http://127.0.0.1.*give the folder"
        ) as refusal:
            load_model("nobody/no-such-model")
    assert "\n" not in str(refusal.value)
    assert "Retrying" not in caplog.text


def test_a_copy_in_the_cache_of_the_hub_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, commit = FAMILY_CASES[0], "0" * 40
    repository = tmp_path / "models--someone--model"
    case.module().save_pretrained(repository / "snapshots" / commit / "transformer")  # type: ignore[operator]
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = load_model("someone/model", **case.workload)
    assert found.fingerprint() == {**case.model().fingerprint(), "name": "someone/model"}


def test_a_class_without_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(InputError, match="UNet2DConditionModel"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match="no adapter for model class 'Linear'"):
        ss.wrap(nn.Linear(2, 2), example={})


def test_a_class_that_allows_no_plan_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "SanaTransformer2DModel"}')
    with pytest.raises(InputError, match="convolution over the grid of image tokens"):
        load_model(str(tmp_path))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    FAMILY_CASES[0].module().save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UnavailableError, match="cannot load the weights"):
        load_model(str(tmp_path))


def test_the_list_names_all_of_them() -> None:
    rows = list_models()
    assert {"fashion-dit", *ARCHITECTURES} <= {row["name"] for row in rows}
    assert {family.model_class for family in FAMILIES} == {row["class"] for row in rows}
    assert all(row["verified"] for row in rows)
    assert {row["family"] for row in rows if row["name"] in ARCHITECTURES} == {family.name for family in FAMILIES}


def test_what_is_called_verified_has_a_test() -> None:
    tested = {case.model_class for case in FAMILY_CASES}
    assert {family.model_class for family in FAMILIES} == tested
    assert set(READINGS) == {name for family in FAMILIES for name in family.adapters}
    pipelines = {case.name for case in PIPELINES}
    said = {word for family in FAMILIES for word in family.verified.split() if word.endswith("Pipeline")}
    assert said == pipelines


@pytest.mark.parametrize("case", FAMILY_CASES, ids=lambda case: case.name)
def test_wrap_reads_the_workload_from_an_example(case: FamilyCase) -> None:
    inputs = case.model().example(seed=1)
    model = ss.wrap(case.module(), example=inputs)
    assert model.workload.batch == 2
    assert model.tokens == case.model().tokens
    assert model.workload.frames == case.workload.get("frames")
    if "encoder_hidden_states" in inputs:
        assert model.workload.text_tokens == inputs["encoder_hidden_states"].shape[1]
    with ss.apply_plan(model, ss.Plan.uniform(model, 0.5)):
        planned = model.predict(inputs)
    assert planned.shape == model.predict(inputs).shape


def test_wrap_refuses_examples_that_are_not_square() -> None:
    for case in FAMILY_CASES:
        model = case.model()
        inputs, image = model.example(), model.family.image_argument
        packed = inputs[image].ndim == 3
        cut = inputs[image][:, :12] if packed else inputs[image][..., :4]
        with pytest.raises(InputError, match="square"):
            ss.wrap(case.module(), example={**inputs, image: cut})
