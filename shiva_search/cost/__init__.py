"""From a profile to the predicted cost of any plan. No torch here."""

from .cost_model import CostModel, fit_cost_model, load_cost_model

__all__ = ["CostModel", "fit_cost_model", "load_cost_model"]
