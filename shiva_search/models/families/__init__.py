"""All families that `--model` understands; a new one joins by one line."""

from __future__ import annotations

from collections.abc import Mapping

from shiva_search.models.blocks import Family
from shiva_search.models.families.auraflow import AURAFLOW
from shiva_search.models.families.cogview4 import COGVIEW4
from shiva_search.models.families.dit import DIT
from shiva_search.models.families.flux import FLUX
from shiva_search.models.families.flux2 import FLUX2
from shiva_search.models.families.ltx import LTX
from shiva_search.models.families.lumina2 import LUMINA2
from shiva_search.models.families.pixart import PIXART
from shiva_search.models.families.qwenimage import QWEN_IMAGE
from shiva_search.models.families.sd3 import SD3
from shiva_search.models.families.wan import WAN
from shiva_search.models.families.zimage import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    DIT,
    SD3,
    FLUX,
    PIXART,
    AURAFLOW,
    COGVIEW4,
    LUMINA2,
    FLUX2,
    QWEN_IMAGE,
    Z_IMAGE,
    WAN,
    LTX,
)

#: Model classes that are known not to allow it, and why.
REFUSED: Mapping[str, str] = {
    "SanaTransformer2DModel": (
        "its feed-forward is a 3x3 convolution over the grid of image tokens, so a token's output depends on "
        "neighbours that a plan would leave out"
    ),
}


def family_of(model_class: str) -> Family | None:
    """The family of a diffusers model class, or None."""
    return next((family for family in FAMILIES if family.model_class == model_class), None)
