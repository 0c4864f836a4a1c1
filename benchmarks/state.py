"""What a long benchmark has done so far, in a file it goes on from: what was asked, then a JSON line for each row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shiva_search.errors import InputError


def begun(state: Path | None, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier piece has done; none without a file.

    Raises:
        InputError: it was asked for something else.
    """
    if state is None:
        return []
    if not state.is_file():
        state.write_text(json.dumps(asked) + "\n")
        return []
    before, *rows = [json.loads(line) for line in state.read_text().splitlines()]
    if before != asked:
        raise InputError(f"{state} is about {before}, not {asked}; name another file")
    return list(rows)


def keep(state: Path | None, row: dict[str, Any]) -> None:
    """One more row, kept and printed."""
    line = json.dumps(row)
    if state is not None:
        with state.open("a") as file:
            file.write(line + "\n")
    print(line, flush=True)
