"""Workload: the conditions a plan is made for. They decide what a block costs, so they travel with every file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from shiva_search.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")
_SAID_ONLY = ("frames", "cuda_graph")


@dataclass(frozen=True)
class Workload:
    """One forward of the model as it is deployed.

    Attributes:
        batch: samples in one forward; with guidance this counts both halves.
        dtype: "float32", "bfloat16" or "float16".
        resolution: image height and width, pixels (None: the model's own).
        frames: frames of a video (None: the model's own, and for images).
        text_tokens: context tokens (None: the model's own, and for models without).
        guidance: the batch is [unconditional half, conditional half]; both share one selection (eq. 32).
        compile: blocks run through torch.compile.
        cuda_graph: forwards run as CUDA graphs, which spare the host its part.
        threads: CPU threads (None: torch's default).
    """

    batch: int = 1
    dtype: str = "float32"
    resolution: int | None = None
    text_tokens: int | None = None
    guidance: bool = False
    compile: bool = False
    threads: int | None = None
    frames: int | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"--batch must be at least 1, got {self.batch}")
        if self.guidance and self.batch % 2:
            raise InputError(f"with guidance the batch holds two halves and must be even, got --batch {self.batch}")
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        for name in ("resolution", "threads", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        if self.text_tokens is not None and self.text_tokens < 0:
            raise InputError(f"--text-tokens must not be negative, got {self.text_tokens}")

    def override(self, **changes: Any) -> Workload:
        """This workload with the given fields replaced where they are not None.

        Raises:
            InputError: there is no such field, or a bad value.
        """
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise InputError(f"a workload has no {name!r}; it has {', '.join(known)}")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `frames` and `cuda_graph` only where they are said, so that other files stay as they were."""
        return {name: value for name, value in asdict(self).items() if name not in _SAID_ONLY or value}

    def differences(self, other: Workload) -> list[tuple[str, str]]:
        """What differs, in words, by field: of this workload and of the other ("batch 2", "batch 4")."""
        mine, its = asdict(self), asdict(other)
        return [(_in_words(name, mine[name]), _in_words(name, its[name])) for name in mine if mine[name] != its[name]]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Workload:
        """Inverse of as_dict.

        Raises:
            InputError: unknown fields or bad values.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"the workload has unknown fields: {error}") from None


def _in_words(name: str, value: Any) -> str:
    name = name.replace("_", " ")
    if value is None:
        return f"default {name}"
    if isinstance(value, bool):
        return f"{name} {'on' if value else 'off'}"
    return f"{name} {value}"
