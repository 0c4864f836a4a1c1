"""What a command says. In: figures. Out: an Answer, for people and for --json; progress is said while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shiva_search.errors import BudgetBrokenError

#: Told short lines while a command works.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What a command has to say: an object for --json, a text for people, and whether the budget held."""

    summary: dict[str, Any]
    text: Callable[[], str]
    broken: str | None = None

    def raise_if_broken(self) -> None:
        """Raises BudgetBrokenError (exit code 5) where the measured plan breaks its budget."""
        if self.broken is not None:
            raise BudgetBrokenError(self.broken)
