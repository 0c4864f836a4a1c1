"""All families that `--model` understands; a new one joins by one line."""

from __future__ import annotations

from shiva_search.models.blocks import Family
from shiva_search.models.families.dit import DIT
from shiva_search.models.families.flux import FLUX
from shiva_search.models.families.pixart import PIXART
from shiva_search.models.families.sd3 import SD3

FAMILIES: tuple[Family, ...] = (DIT, SD3, FLUX, PIXART)


def family_of(model_class: str) -> Family | None:
    """The family of a diffusers model class, or None."""
    return next((family for family in FAMILIES if family.model_class == model_class), None)
