"""Write files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shiva_search.errors import InputError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary neighbour of `path`, then rename it into place.

    Raises:
        InputError: the folder cannot be made or written, or the disk is full; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix is kept, since writers of images choose the format by it.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; choose another folder with --out, or free space"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: missing, unreadable, not JSON or not an object; `what` names the file in the message.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror or error}; check the path") from error
    except ValueError as error:
        raise InputError(f"{what} {path} is not valid JSON ({error}); restore it or run the stage again") from error
    if not isinstance(value, dict):
        raise InputError(f"{what} {path} must hold a JSON object, found {type(value).__name__}")
    return value


def check_folder_writable(folder: Path) -> None:
    """Fail early, before hours of work, if results could not be written to `folder`; what is there stays as it was.

    Raises:
        InputError: the folder cannot be made, is not a folder, is read-only or the disk is full.
    """
    absent = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    probe = folder / ".probe"
    try:
        write_text(probe, "shiva-search\n" * 512)
        probe.unlink()
    finally:
        # The work may still be refused: a folder comes into being with its first file.
        for place in absent:
            with suppress(OSError):
                place.rmdir()
