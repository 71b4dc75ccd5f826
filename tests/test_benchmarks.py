"""The benchmarks are not run here, but the GSDG names that they import must exist, and `gpu.py` must test itself."""

from __future__ import annotations

import ast
import csv
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import REPOSITORY, in_case

BENCHMARKS = REPOSITORY / "benchmarks"


def test_what_the_benchmarks_import_exists():
    paths = list(BENCHMARKS.rglob("*.py"))
    assert paths
    for path in paths:
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        for node in (node for node in imports if node.module.split(".")[0] in ("gsdg", "analysis")):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    with in_case(path):
                        importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.slow
def test_the_gpu_benchmark_tests_itself_on_the_cpu(tmp_path):
    output = tmp_path / "gpu.csv"
    parts = ["--part", "kernels", "--part", "step", "--only", "bf16"]
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", *parts, "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(output)
    assert {row["part"] for row in rows} == {"kernels", "step"}
    assert {row["device"] for row in rows} == {"cpu"}
    assert all(row["note"].startswith("self-test") and not row["aim"] for row in rows)
    assert {"erm", "grad_surgery", "both passes"} <= {row["what"] for row in rows if float(row["ms"] or 0) > 0}
    assert "skipped" in {row["what"] for row in rows if row["mode"] in ("", "triton")}  # no CUDA graph, no Triton


@pytest.fixture
def gpu_parts(monkeypatch):
    """Modules of benchmarks/gpu_parts, by name. Afterwards neither their folder nor they can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield lambda name: importlib.import_module(f"gpu_parts.{name}")
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("gpu_parts", "timing"):
            del sys.modules[name]


@pytest.fixture
def measure(gpu_parts, monkeypatch, tmp_path):
    """A function: {name: (seconds that it may need, seconds that it takes)}, limit -> rows. Its clock is false."""
    budget, measurement = gpu_parts("budget"), gpu_parts("measurement")
    clock = [0.0]
    monkeypatch.setattr(budget, "free_memory", lambda device: None)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def made(name: str, seconds: float) -> list:
        clock[0] += seconds
        if name == "broken":
            raise RuntimeError("no such kernel")
        return [measurement.row(name, ms=seconds)]

    def measure(cases: dict[str, tuple[float, float]], limit: float) -> list:
        measurements = [
            measurement.Measurement(name, needs, lambda left, name=name, takes=takes: made(name, takes))
            for name, (needs, takes) in cases.items()
        ]
        kept = []
        rows = budget.measure_part("part", measurements, limit, measurement.Setting("cuda", tmp_path), kept.extend)
        assert kept == rows
        return rows

    return measure


def test_a_part_that_exceeds_its_time_says_what_it_left_out(measure):
    rows = measure({"first": (10, 15), "long": (10, 1), "short": (4, 1)}, limit=20)
    assert [row["what"] for row in rows] == ["first", "left out", "short"]
    assert rows[1]["measurement"] == "long"
    assert "10 s" in rows[1]["note"]
    assert "--only 'long'" in rows[1]["note"]


def test_a_measurement_that_fails_does_not_end_the_part(measure):
    rows = measure({"broken": (1, 1), "first": (1, 1)}, limit=20)
    assert [row["what"] for row in rows] == ["failed", "first"]
    assert rows[0]["note"] == "RuntimeError: no such kernel"


def test_rows_replace_those_of_the_same_measurement_unless_left_out(gpu_parts, tmp_path):
    budget, output = gpu_parts("budget"), tmp_path / "gpu.csv"

    def merge(measurement: str, what: str, ms: float, device: str = "NVIDIA") -> None:
        budget.merge(output, [{"part": "step", "measurement": measurement, "what": what, "ms": ms, "device": device}])

    merge("a", budget.LEFT_OUT, 0)
    merge("a", "erm", 1)
    merge("b", "erm", 2)
    merge("a", "erm", 3)
    merge("a", "erm", 5, device="cpu")
    merge("b", budget.LEFT_OUT, 0)
    assert [(row["measurement"], row["what"], row["ms"]) for row in read(output)] == [
        ("b", "erm", "2"),
        ("a", "erm", "3"),
        ("a", "erm", "5"),
    ]


def read(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
