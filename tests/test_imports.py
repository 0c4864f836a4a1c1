"""Who may import whom: the table below is the architecture, and every file of the package is held to it.

In: the source of shiva_search/, read but not imported. Out: one line per import that goes against the table.
Imports inside functions and under TYPE_CHECKING count too: they are dependencies all the same.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

PACKAGE = "shiva_search"
ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py"))

ROOMS_ON_DISK = {PurePosixPath(file).with_suffix("").parts[1] for file in FILES}

FOUNDATION = {"errors", "records"}  # open to every room
STAGES = {"devices", "models", "runtime", "profiling", "cost", "search", "selection", "reporting"}

# room -> rooms it may import besides itself. `__init__` is the package's front door.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "records": {"errors"},
    "devices": FOUNDATION,
    "models": FOUNDATION,
    "runtime": FOUNDATION | {"models"},
    "profiling": FOUNDATION | {"models", "devices", "runtime"},
    "cost": FOUNDATION,
    "search": FOUNDATION | {"cost", "runtime", "models"},
    "selection": FOUNDATION | {"runtime", "models", "cost"},
    "reporting": FOUNDATION,
    "generation": FOUNDATION | {"models", "runtime"},
    "sharing": FOUNDATION | {"selection", "runtime", "reporting"},
    "arguments": FOUNDATION | {"sharing", "selection", "runtime", "models"},
    "workflow": FOUNDATION | STAGES | {"generation"},
    "api": FOUNDATION | STAGES | {"workflow", "generation", "sharing", "arguments"},
    "cli": FOUNDATION | {"api", "devices", "models", "workflow"},
    "__init__": FOUNDATION | STAGES | {"api"},
    "__main__": {"cli"},
}

# rooms that `cli` reaches for only once a command runs, so that --help answers at once
CLI_ONLY_INSIDE_FUNCTIONS = {"devices", "models"}

# library -> the one place that imports it
HOMES = {
    "pynvml": "shiva_search/devices/",
    "fvcore": "shiva_search/profiling/flops.py",
    "optuna": "shiva_search/search/",
    "matplotlib": "shiva_search/reporting/plots.py",
    "typer": "shiva_search/cli.py",
}

# room -> libraries it does without: records are read on machines that have no use for torch
WITHOUT = {"errors": {"torch"}, "records": {"torch"}}

HEAVY = {"torch", "diffusers", "transformers", "optuna", "matplotlib", "pandas"}


class Import(NamedTuple):
    line: int
    module: str  # absolute, "shiva_search.records.plan"
    lazy: bool  # inside a function or under TYPE_CHECKING


def room_of(module: str) -> str:
    """The room of a module of the package: "shiva_search.cost.cost_model" -> "cost"; the package itself: "__init__"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def package_of(file: str) -> list[str]:
    return list(PurePosixPath(file).parent.parts)


def file_room(file: str) -> str:
    """The room of a file: "shiva_search/cost/cost_model.py" -> "cost"; "shiva_search/errors.py" -> "errors"."""
    return PurePosixPath(file).with_suffix("").parts[1]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports_of(source: str, file: str) -> Iterator[Import]:
    """All imports of a file as absolute module names, importlib.import_module("...") among them."""

    def absolute(level: int, module: str) -> str:
        package = package_of(file)
        base = package[: len(package) - level + 1] if level else []
        return ".".join([*base, *([module] if module else [])])

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(node.lineno, alias.name, lazy)
            case ast.ImportFrom(module=module, names=names, level=level):
                origin = absolute(level, module or "")
                for alias in names:
                    # `from shiva_search import x` names a room or something the front door hands out; the version is
                    # there for all, since importing any room runs the front door anyway
                    if origin != PACKAGE:
                        yield Import(node.lineno, origin, lazy)
                    elif alias.name in ROOMS_ON_DISK | MAY_IMPORT.keys():
                        yield Import(node.lineno, f"{origin}.{alias.name}", lazy)
                    elif alias.name != "__version__":
                        yield Import(node.lineno, origin, lazy)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(func).split(".")[-1] in {
                "import_module",
                "__import__",
            }:
                bare = name.lstrip(".")
                yield Import(node.lineno, absolute(len(name) - len(bare), bare), lazy)
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(source, file), lazy=False)


def violations(source: str, file: str) -> list[str]:
    """What a file imports and should not, one line each."""
    room = file_room(file)
    if room not in MAY_IMPORT:
        return [f"{file}: {room} is no room of the architecture; add it to MAY_IMPORT with what it may import"]
    found = []
    for line, module, lazy in imports_of(source, file):
        top = module.split(".")[0]
        home = HOMES.get(top, PACKAGE)
        if top == PACKAGE:
            target = room_of(module)
            if target not in {room} | MAY_IMPORT[room]:
                found.append(f"{file}:{line}: {room} may not import {target}")
            if room == "cli" and target in CLI_ONLY_INSIDE_FUNCTIONS and not lazy:
                found.append(f"{file}:{line}: cli imports {target} only inside functions")
        elif not file.startswith(home):
            found.append(f"{file}:{line}: {top} is imported by {home} alone")
        elif top in WITHOUT.get(room, set()):
            found.append(f"{file}:{line}: {room} does without {top}")
    return found


@pytest.mark.parametrize("file", FILES)
def test_file_keeps_to_the_import_directions(file: str) -> None:
    assert violations((ROOT / file).read_text(encoding="utf-8"), file) == []


def test_every_room_is_there() -> None:
    assert MAY_IMPORT.keys() == ROOMS_ON_DISK


def test_directions_have_no_circle() -> None:
    remaining = dict(MAY_IMPORT)
    while leaves := [room for room, targets in remaining.items() if not targets & remaining.keys()]:
        for room in leaves:
            del remaining[room]
    assert remaining == {}


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("shiva_search/runtime/apply.py", "import shiva_search.selection.router", "runtime may not import selection"),
        ("shiva_search/runtime/apply.py", "from shiva_search import selection", "runtime may not import selection"),
        ("shiva_search/runtime/apply.py", "from ..selection import router", "runtime may not import selection"),
        ("shiva_search/runtime/apply.py", "from .. import selection", "runtime may not import selection"),
        ("shiva_search/runtime/apply.py", "import shiva_search", "runtime may not import __init__"),
        ("shiva_search/runtime/apply.py", "from shiva_search import search_plan", "runtime may not import __init__"),
        ("shiva_search/cost/__init__.py", "from ..search.pareto import front", "cost may not import search"),
        ("shiva_search/cost/fit.py", "def f():\n    from shiva_search.search import x", "cost may not import search"),
        ("shiva_search/cost/fit.py", "importlib.import_module('shiva_search.api')", "cost may not import api"),
        ("shiva_search/cli.py", "from shiva_search.search import study", "cli may not import search"),
        ("shiva_search/cli.py", "from shiva_search import models", "cli imports models only inside functions"),
        ("shiva_search/reporting/html.py", "import matplotlib.pyplot as plt", "matplotlib is imported by"),
        ("shiva_search/profiling/sampler.py", "async def f():\n    import fvcore.nn", "fvcore is imported by"),
        ("shiva_search/records/plan.py", "if TYPE_CHECKING:\n    import torch", "records does without torch"),
        ("shiva_search/utils.py", "", "utils is no room of the architecture"),
    ],
)
def test_forbidden_import_is_seen(file: str, source: str, complaint: str) -> None:
    [found] = violations(source, file)
    assert complaint in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("shiva_search/runtime/apply.py", "from .token_ops import gather\nfrom ..models.blocks import adapter_of"),
        ("shiva_search/records/plan.py", "from ..errors import InputError\nfrom . import files"),
        ("shiva_search/cli.py", "import typer\nfrom . import api\n\ndef devices():\n    from .devices import base"),
        ("shiva_search/search/study.py", "import optuna\nimport torch\nfrom shiva_search import __version__"),
        ("shiva_search/__init__.py", "if TYPE_CHECKING:\n    from .cost import CostModel"),
    ],
)
def test_allowed_import_passes(file: str, source: str) -> None:
    assert violations(source, file) == []


def heavy_modules_after(program: str) -> set[str]:
    """The heavy libraries that a fresh interpreter holds once it has run the program."""
    report = f"import sys; print(*sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{report}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.errors", f"{PACKAGE}.records", f"{PACKAGE}.cli"])
def test_import_is_light(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == set()


HELP = """
import sys
from shiva_search.cli import main
sys.argv = ["shiva-search", {arguments}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


@pytest.mark.parametrize("arguments", ['"--help"', '"--version"', '"optimize", "--help"'])
def test_help_is_light(arguments: str) -> None:
    assert heavy_modules_after(HELP.format(arguments=arguments)) == set()


def test_the_search_for_heavy_modules_finds_them() -> None:
    assert heavy_modules_after("import numpy, pandas") == {"pandas"}
