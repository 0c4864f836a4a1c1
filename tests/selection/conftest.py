"""A small transformer with random weights whose blocks do something: six blocks of 64 tokens, width 64."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel

from shiva_search.models.catalog import as_model
from shiva_search.models.model import Model


def build_tiny(layers: int = 6, size: int = 8, heads: int = 4) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=layers,
            sample_size=size, patch_size=1, num_embeds_ada_norm=10, norm_num_groups=1,
            activation_fn="gelu-approximate",
        ).eval()  # fmt: skip
        for block in module.transformer_blocks:
            torch.nn.init.normal_(block.norm1.linear.weight, std=0.3)  # modulation near zero would leave blocks idle
    return as_model(module, "tiny")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    # Exact equality of two runs needs one order of summation.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> Model:
    return build_tiny()


@pytest.fixture
def smaller() -> Model:
    return build_tiny(layers=5, size=4, heads=2)
