"""Read a selector of any kind. In: a safetensors file, or a run's folder. Out: the selector, ready for inference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shiva_search.errors import InputError
from shiva_search.runtime.bypass import BypassBank
from shiva_search.runtime.selector import SCHEMA_VERSION, Selector
from shiva_search.selection.router import Router

#: What a file says it holds -> how to build it, untrained, from its shape.
KINDS: Mapping[str, Callable[[Mapping[str, Any]], Selector]] = {
    Router.kind: Router.of_shape,
    BypassBank.kind: lambda shape: BypassBank(**shape),
}


def load_selector(path: str | Path) -> Selector:
    """Read a selector from its file, or from selector.safetensors in a run's folder.

    Raises:
        InputError: missing, unreadable, not a selector, or of another schema version.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "selector.safetensors"
    again = "train it again with `shiva-search train`"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except OSError as error:
        raise InputError(f"cannot read selector {path}: {error.strerror or error}; check the path") from error
    except SafetensorError as error:
        raise InputError(f"selector {path} is not a safetensors file ({error}); {again}") from error
    if metadata.get("kind") not in KINDS:
        raise InputError(f"{path} holds no selector of shiva-search; {again}")
    if metadata.get("schema_version") != str(SCHEMA_VERSION):
        version = metadata.get("schema_version")
        raise InputError(f"selector {path} has schema_version {version}, this release reads {SCHEMA_VERSION}; {again}")
    try:
        selector = KINDS[metadata["kind"]](json.loads(metadata["config"]))
        selector.load_state_dict(state)
        selector.model, selector.origin = json.loads(metadata["model"]), json.loads(metadata.get("origin", "{}"))
    except RuntimeError as error:  # from load_state_dict
        raise InputError(f"selector {path} was made by another release, or is damaged; make the run again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"selector {path} is damaged: {str(error).splitlines()[0]}; {again}") from error
    return selector.eval().requires_grad_(False)
