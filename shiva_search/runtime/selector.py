"""Selector: a scorer with weights, that knows which model it is for. In and out: a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import nn

from shiva_search.errors import InputError
from shiva_search.records.files import write_atomic

SCHEMA_VERSION = 1


class Selector(nn.Module):
    """What routers and bypasses have in common.

    Attributes:
        kind: what the file says it holds.
        shape: JSON-able, enough to build an untrained one.
        model: fingerprint of the model it was made for; empty where unknown.
        origin: how it was made, JSON-able.
    """

    kind: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.model: Mapping[str, Any] = {}
        self.origin: dict[str, Any] = {}

    @property
    def shape(self) -> dict[str, Any]:
        """See the class."""
        raise NotImplementedError

    def check_model(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse a foreign model.

        Raises:
            InputError: names what differs.
        """
        differing = [
            f"{name} is {self.model[name]!r} in the selector and {fingerprint.get(name)!r} in the model"
            for name in ("architecture", "config_hash", "layers", "weights_hash")
            if name in self.model and self.model[name] != fingerprint.get(name)
        ]
        if differing:
            raise InputError(f"this selector was trained for another model: {'; '.join(differing)}; train it again")

    def save(self, path: str | Path) -> None:
        """Write safetensors with the shape, the model's fingerprint and the origin as metadata, atomically.

        Raises:
            InputError: the folder cannot be written.
        """
        metadata = {
            "kind": self.kind,
            "schema_version": str(SCHEMA_VERSION),
            "config": json.dumps(self.shape),
            "model": json.dumps(dict(self.model)),
            "origin": json.dumps(self.origin),
        }
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_atomic(Path(path), lambda temporary: save_file(state, temporary, metadata=metadata))
