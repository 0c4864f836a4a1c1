"""What goes wrong, and which exit code it means: every refusal of the package is a ShivaError."""

from __future__ import annotations

from typing import Any


class ShivaError(Exception):
    """Base of all refusals. The message is one line: the rule, the value, the next step."""

    exit_code = 2


class InputError(ShivaError):
    """Bad input or usage (exit code 2)."""


class InfeasibleBudgetError(ShivaError):
    """No plan fits the budget (exit code 3); the message names the floor and the budget that binds."""

    exit_code = 3


class UnavailableError(ShivaError):
    """A device, sensor or model is not available (exit code 4)."""

    exit_code = 4


class BudgetBrokenError(ShivaError):
    """The measured plan breaks the budget after all corrections (exit code 5).

    Attributes:
        nearest: from `search`: the SearchResult of the measured plan that came nearest to the budget.
    """

    exit_code = 5
    nearest: Any = None
