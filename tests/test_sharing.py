"""Plans as folders for a hub: written, read back, applied; and refused on another model with the difference named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import shiva_search as ss
from shiva_search.models.model import Model
from shiva_search.selection.adapters import adapted, adapter_state
from shiva_search.selection.router import Router
from tests.models.conformance import FAMILY_CASES

CASES = {case.name: case for case in FAMILY_CASES}


@pytest.fixture(scope="module")
def model() -> Model:
    return CASES["sd3"].model()


@pytest.fixture(scope="module")
def inputs(model: Model) -> dict[str, Any]:
    return model.example(1)


def made(model: Model, folder: Path) -> Router:
    """A run's folder with a plan and a selector that is not like any other."""
    router = Router.for_model(model, seed=5)
    with torch.no_grad():
        for unit in router.units:
            unit.score.mul_(100.0)
    router.save(folder / "selector.safetensors")
    plan = ss.Plan.uniform(
        model, 0.5, workload=model.workload.as_dict(), device="cpu",
        predicted={"latency_ms": 4.0, "dense_latency_ms": 10.0, "gflops": 3.0},
        measured={"latency_ms": 4.25, "dense_latency_ms": 8.5, "energy_j": None},
    )  # fmt: skip
    plan.save(folder / "plan.json")
    return router


def test_a_run_goes_to_a_folder_and_back(model: Model, inputs: dict[str, Any], tmp_path: Path) -> None:
    router = made(model, tmp_path / "run")
    with ss.apply_plan(model, tmp_path / "run"):
        expected = model.predict(inputs)
    folder = ss.save_pretrained(tmp_path / "run", tmp_path / "hub")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "plan.json", "selector.safetensors"]
    plan = ss.from_pretrained(folder)
    assert plan == ss.Plan.from_file(tmp_path / "run")
    assert torch.equal(ss.load_selector(folder).units[0].score, router.units[0].score)
    for given in (plan, folder, str(folder)):
        with ss.apply_plan(model.module, given):
            assert torch.equal(model.predict(inputs), expected)
    with ss.apply_plan(model, plan, "stride"):
        assert not torch.equal(model.predict(inputs), expected)


def test_the_card_says_what_it_is_for(model: Model, tmp_path: Path) -> None:
    made(model, tmp_path / "run")
    text = (ss.save_pretrained(tmp_path / "run", tmp_path / "hub") / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: shiva-search\n")
    for said in (model.fingerprint()["weights_hash"], "SD3Transformer2DModel", "16 8 8 8", "cpu"):
        assert said in text
    assert "energy" not in text  # not measured
    assert "|  | dense, measured | plan, measured | of dense, measured | of dense, predicted |" in text
    assert "| latency, ms | 8.500 | 4.250 | 50 % | 40 % |" in text  # not 4 of 8.5: the profile put dense at 10


def test_the_card_says_what_is_predicted(model: Model, tmp_path: Path) -> None:
    made(model, tmp_path / "run")
    plan = ss.Plan.from_file(tmp_path / "run")

    def card(**known: Any) -> str:
        return (ss.save_pretrained(plan.with_(**known), tmp_path / "hub") / "README.md").read_text()

    text = card(measured={})
    assert "|  | plan, predicted | of dense, predicted |" in text and "| latency, ms | 4.000 | 40 % |" in text
    assert "measured" not in text.partition("## Cost")[2]
    text = card(measured={**plan.measured, "replayed": True})
    assert "|  | dense, predicted from a recording | plan, predicted from a recording |" in text
    assert "measured" not in text.partition("## Cost")[2]
    assert "Not measured." in card(measured={}, predicted={})


def test_no_file_says_where_the_model_lies_here(model: Model, tmp_path: Path) -> None:
    (tmp_path / "my-sd3").mkdir()
    here = {**model.fingerprint(), "name": str(tmp_path / "my-sd3")}
    router = Router.for_model(model)
    router.model = here
    folder = ss.save_pretrained(ss.Plan.uniform(model, 0.5).with_(model=here), tmp_path / "hub", selector=router)
    assert "# A token plan for my-sd3" in (folder / "README.md").read_text()
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert router.model == here
    assert ss.load_selector(folder).model == {**here, "name": "my-sd3"}


def test_a_plan_at_hand_is_saved_with_a_selector_at_hand(model: Model, tmp_path: Path) -> None:
    router = Router.for_model(model)
    folder = ss.save_pretrained(ss.Plan.uniform(model, 0.5), tmp_path, selector=router)
    assert ss.load_selector(folder).config == router.config
    ss.save_pretrained(ss.Plan.uniform(model, 0.4), tmp_path)  # a plan without one takes the old one's away
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "plan.json"]


def test_adapters_come_on_and_go_off_with_the_plan(model: Model, inputs: dict[str, Any], tmp_path: Path) -> None:
    dense = model.predict(inputs)
    plan = ss.Plan.uniform(model, 0.5)
    with adapted(model, rank=2) as parameters, torch.no_grad():
        for name, value in parameters.items():
            if "lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(1))
        state = adapter_state(parameters)
        with ss.apply_plan(model, plan, "norm"):
            expected = model.predict(inputs)
    folder = ss.save_pretrained(plan, tmp_path, adapters=state)
    with safe_open(folder / "adapters.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(state)
    handle = ss.apply_plan(model, folder, "norm")
    torch.testing.assert_close(model.predict(inputs), expected, atol=1e-5, rtol=1e-5)  # no gradients: other kernels
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    again = ss.apply_plan(model, folder, "norm")  # a new plan replaces the old one, adapters included
    adapted_again = model.predict(inputs)
    torch.testing.assert_close(adapted_again, expected, atol=1e-5, rtol=1e-5)
    handle.remove()
    assert torch.equal(model.predict(inputs), adapted_again)
    again.remove()
    assert torch.equal(model.predict(inputs), dense)
    assert not hasattr(model.module, "peft_config")


def test_adapters_do_not_go_over_others(model: Model, tmp_path: Path) -> None:
    plan = ss.Plan.uniform(model, 0.5)
    with adapted(model, rank=2) as parameters:
        state = adapter_state(parameters)
    folder = ss.save_pretrained(plan, tmp_path, adapters=state)
    with adapted(model, rank=2), pytest.raises(ss.InputError, match="already has adapters on"):
        ss.apply_plan(model, folder)
    ss.remove_plan(model)  # nothing is on


@pytest.mark.parametrize("what", ["plan", "selector"])
def test_a_foreign_model_is_refused_and_the_difference_named(what: str, model: Model, tmp_path: Path) -> None:
    made(model, tmp_path / "run")
    folder = ss.save_pretrained(tmp_path / "run", tmp_path / "hub")
    other = CASES["sd3"].model(seed=1)
    if what == "selector":
        ss.Plan.uniform(other, 0.5).save(folder / "plan.json")
    with pytest.raises(ss.InputError, match=f"weights_hash is '{model.fingerprint()['weights_hash']}' in the {what}"):
        ss.apply_plan(other, folder)
    with pytest.raises(ss.InputError, match="architecture is 'SD3Transformer2DModel' in the plan"):
        ss.apply_plan(CASES["pixart-sigma"].model(), ss.Plan.from_file(tmp_path / "run"))


def test_a_selector_of_another_model_is_not_saved(model: Model, tmp_path: Path) -> None:
    router = Router.for_model(CASES["sd3"].model(seed=1))
    with pytest.raises(ss.InputError, match="weights_hash is .* in the selector"):
        ss.save_pretrained(ss.Plan.uniform(model, 0.5), tmp_path, selector=router)
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_refused(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ss.UnavailableError, match="'owner/name' is no folder here, and the hub does not give it"):
        ss.apply_plan(model, "owner/name")
    with pytest.raises(ss.InputError, match="cannot read plan"):
        ss.from_pretrained(tmp_path)
    with pytest.raises(ss.InputError, match="cannot read plan"):
        ss.from_pretrained(tmp_path / "a" / "b")
    plan = ss.Plan(tokens=16, tokens_kept=((16, 8, 8, 8),))
    with pytest.raises(ss.InputError, match="which model it is for"):
        ss.save_pretrained(plan, tmp_path)


def test_a_plan_stays_on_without_a_handle(model: Model, inputs: dict[str, Any]) -> None:
    dense = model.predict(inputs)
    ss.apply_plan(model.module, ss.Plan.uniform(model, 0.5))
    assert not torch.equal(model.predict(inputs), dense)
    ss.remove_plan(model.module)
    assert torch.equal(model.predict(inputs), dense)
    ss.remove_plan(model)
