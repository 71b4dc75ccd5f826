"""The drawing of the house holds: imports point toward floor 0, and composing a config never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FLOORS = [
    {
        "gsdg",
        "gsdg.errors",
        "gsdg.seeding",
        "gsdg.environment",
        "gsdg.own_code",
        "gsdg.identity",
        "gsdg.signals",
        "gsdg.owner",
        "gsdg.runs",
        "gsdg.batch",
        "gsdg.config_checks",
        "gsdg.schema",
        "gsdg.search",
    },
    {"gsdg.data", "gsdg.models", "gsdg.surgery"},
    {"gsdg.algorithms"},
    {
        "gsdg.averaging",
        "gsdg.checkpoint",
        "gsdg.devices",
        "gsdg.evaluate",
        "gsdg.experiment",
        "gsdg.outcome",
        "gsdg.reuse",
        "gsdg.trainer",
    },
    {"gsdg.sweep"},
]
NEIGHBOURS = FLOORS[1]  # they never import one another
SIDE_HOUSE = {"gsdg.errors", "gsdg.identity", "gsdg.runs"}  # all that analysis may import of gsdg
MODULES = sorted(path for folder in ("gsdg", "analysis") for path in (REPOSITORY / folder).rglob("*.py"))


def room(module: str) -> str:
    """`gsdg.data.split` -> `gsdg.data`: the unit the drawing speaks of."""
    return ".".join(module.split(".")[:2])


def imported(path: Path) -> set[str]:
    """Every module of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = node.module in ("gsdg", "analysis")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return found


def floor(name: str) -> int:
    name = "gsdg" if name == "gsdg.__version__" else name
    floors = [number for number, rooms in enumerate(FLOORS) if name in rooms]
    assert floors, f"{name} is on no floor: add it to FLOORS and to the README's drawing"
    return floors[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_toward_floor_0(path):
    own = room(".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"))
    others = {room(name) for name in imported(path) if name.split(".")[0] == "gsdg"} - {own}
    if own.startswith("analysis"):
        assert others <= SIDE_HOUSE
        assert not any(name.split(".")[0] in ("torch", "torchvision") for name in imported(path))
        return
    for other in others:
        assert floor(other) <= floor(own), f"{own} imports {other}, which is above it"
        assert not {own, other} <= NEIGHBOURS, f"{own} and {other} are neighbours: neither may import the other"
    assert not any(name.split(".")[0] == "analysis" for name in imported(path))


@pytest.mark.parametrize("option", [["--cfg", "job"], ["--help"]])
def test_composing_does_not_import_torch(option):
    code = f"""
import runpy, sys
sys.argv = ["launch.py", *{option!r}]
try:
    runpy.run_path("launch.py", run_name="__main__")
finally:
    assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)


def test_looking_at_data_on_disk_does_not_import_torch():
    code = "import sys, gsdg.data.__main__ as data; data.options(['verify', 'pacs']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)


def test_each_file_of_analysis_knows_only_those_before_it():
    """In the order of the package's docstring."""
    rows = ast.get_docstring(ast.parse((REPOSITORY / "analysis" / "__init__.py").read_text())).splitlines()[2:]
    order = [name for row in rows for name in row.split("  ")[0].split(", ")] + ["__main__"]
    assert {path.stem for path in MODULES if path.parent.name == "analysis"} == {*order, "__init__"}
    for place, name in enumerate(order):
        found = {
            other.split(".")[1] for other in imported(REPOSITORY / "analysis" / f"{name}.py") if "analysis." in other
        }
        assert found <= set(order[:place]), f"analysis.{name} imports {found - set(order[:place])}"
