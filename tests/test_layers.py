"""Imports point toward the base, and what composes a config or reads results never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LAYERS = [  # from the base upward: a module imports only from its own layer and from those above it in this list
    {"gsdg", "gsdg.utils"},
    {"gsdg.types", "gsdg.metrics"},
    {"gsdg.config"},
    {"gsdg.data", "gsdg.models", "gsdg.surgery", "gsdg.runs"},
    {"gsdg.algorithms"},
    {"gsdg.averaging", "gsdg.compilation"},
    {
        "gsdg.adaptation",
        "gsdg.callbacks",
        "gsdg.evaluation",
        "gsdg.head_only",
        "gsdg.loggers",
        "gsdg.optimizer_groups",
        "gsdg.runtime",
        "gsdg.loss_scaling",
        "gsdg.schedules",
        "gsdg.step_metrics",
        "gsdg.trainer",
        "gsdg.training_loop",
    },
    {"gsdg.fits"},
    {"gsdg.plan"},
    {"gsdg.experiment"},
    {"gsdg.predict", "gsdg.sweep", "gsdg.analysis"},
    {"gsdg.evaluate", "gsdg.export", "gsdg.extend", "gsdg.log", "gsdg.soup"},
    {"gsdg.cli"},
]
SEPARATE = [LAYERS[3], LAYERS[10]]  # packages of one layer that never import one another
ANALYSIS_USES = {"gsdg.utils", "gsdg.metrics", "gsdg.runs", "gsdg.config.identity"}
MODULES = sorted((REPOSITORY / "gsdg").rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    """`gsdg.data.split` -> `gsdg.data`: the unit that LAYERS lists."""
    return ".".join(module.split(".")[:2]).removesuffix(".__version__")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; of `from package import module`, the module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {part for part in parts if part in map(name_of, MODULES) or part == "gsdg.__version__"}
            names |= submodules | ({node.module} if parts - submodules else set())
    return names


def test_imports_point_toward_the_base():
    assert [fault for path in MODULES for fault in faults(path)] == []


def faults(path: Path) -> list[str]:
    """What a file imports from a higher layer, or from a separate package of its own layer."""
    package = package_of(name_of(path))
    others = {package_of(name) for name in imported(path) if name.split(".")[0] == "gsdg"} - {package}
    above = [other for other in others if layer(other) > layer(package)]
    beside = [other for other in others if any({other, package} <= packages for packages in SEPARATE)]
    return [f"{name_of(path)} imports {other}" for other in above + beside]


def layer(package: str) -> int:
    numbers = [number for number, packages in enumerate(LAYERS) if package in packages]
    assert numbers, f"{package} is in no layer: add it to LAYERS and to the list in docs/reference/code.md"
    return numbers[0]


def test_analysis_reads_runs_and_uses_nothing_that_makes_them():
    paths = [path for path in MODULES if "analysis" in path.parts]
    names = {name for path in paths for name in imported(path) if name.startswith("gsdg.")}
    others = {name for name in names if package_of(name) != "gsdg.analysis"}
    assert {name for name in others if not {name, package_of(name)} & ANALYSIS_USES} == set()


@pytest.mark.parametrize("module", ["gsdg.analysis.__main__", "gsdg.runs.__main__", "gsdg.sweep.__main__"])
def test_what_reads_runs_does_not_import_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)


def test_the_base_imports_the_standard_library_only():
    for path in (REPOSITORY / "gsdg" / "utils").glob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            name.split(".")[0]
            for node in top
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        }
        assert names <= {*sys.stdlib_module_names, "gsdg"}, path


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
    code = "import sys, gsdg.data.__main__ as data; data.parse(['verify', 'pacs']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)


def test_each_file_of_analysis_imports_only_those_before_it():
    """In the order of the package's docstring."""
    folder = REPOSITORY / "gsdg" / "analysis"
    rows = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())).splitlines()[2:]
    order = [name for row in rows for name in row.split("  ")[0].split(", ")] + ["__main__"]
    files = {name_of(path).removeprefix("gsdg.analysis."): path for path in folder.rglob("*.py")}
    assert set(order) == {name for name, path in files.items() if path.name != "__init__.py"}
    for place, name in enumerate(order):
        others = {other.removeprefix("gsdg.analysis.") for other in imported(files[name]) if "gsdg.analysis." in other}
        assert others <= set(order[:place]), f"{name} imports {others - set(order[:place])}"
