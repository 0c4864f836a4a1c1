"""Raw samples on disk, a round at a time. In: finished rounds. Out: what an interrupted run had measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shiva_search.errors import InputError
from shiva_search.records.files import write_text
from shiva_search.records.profile import Sample, read_samples, to_csv


@dataclass(frozen=True)
class Round:
    """A stretch of the run and the conditions it was taken in.

    Attributes:
        index: number of the round.
        started_s: seconds since the run began, pauses left out.
        seconds: how long it took.
        conditions: of the device; names that end in `_total` are counted over the round.
    """

    index: int
    started_s: float
    seconds: float
    conditions: Mapping[str, Any] = field(default_factory=dict)


class SampleLog:
    """Raw samples and rounds on disk, appended a round at a time, so that a kill loses at most the round under way."""

    def __init__(self, folder: Path) -> None:
        self.samples_path = folder / "samples.csv"
        self.rounds_path = folder / "rounds.jsonl"

    def read(self) -> tuple[list[Sample], list[Round]]:
        """What is there; lines cut short are dropped, from the files as well."""
        samples = read_samples(self.samples_path)
        text = self.rounds_path.read_text(encoding="utf-8") if self.rounds_path.exists() else ""
        rounds = [Round(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]
        # A round counts once both files hold it.
        known = {item.index for item in rounds}
        samples = [sample for sample in samples if sample.round in known]
        self.restart(samples, rounds)
        return samples, rounds

    def restart(self, samples: Iterable[Sample] = (), rounds: Iterable[Round] = ()) -> None:
        """Replace both files."""
        write_text(self.samples_path, to_csv(Sample, samples))
        write_text(self.rounds_path, "".join(_line(item) for item in rounds))

    def append(self, samples: Sequence[Sample], finished: Round) -> None:
        """Add a round: its samples first, then the line that makes them count.

        Raises:
            InputError: the disk is full or the folder is gone.
        """
        try:
            for path, text in (
                (self.samples_path, to_csv(Sample, samples, header=False)),
                (self.rounds_path, _line(finished)),
            ):
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write {self.samples_path}: {error.strerror or error}; "
                "choose another folder with --out, or free space"
            ) from error


def _line(finished: Round) -> str:
    return json.dumps(finished.__dict__, default=str) + "\n"
