"""The benchmarks are not run here, but the GSDG names that they import must exist."""

from __future__ import annotations

import ast
import importlib

from helpers import REPOSITORY, in_case


def test_what_the_benchmarks_import_exists():
    paths = list((REPOSITORY / "benchmarks").glob("*.py"))
    assert paths
    for path in paths:
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        for node in (node for node in imports if node.module.split(".")[0] in ("gsdg", "analysis")):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    with in_case(path):
                        importlib.import_module(f"{node.module}.{alias.name}")
