"""The tests that use a GPU where there is one: all tests of the files that ask for CUDA."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from timing import Row

from gpu_parts.measurement import Measurement, Setting, row

REPOSITORY = Path(__file__).parents[2]
ASKS_FOR_CUDA = "torch.cuda.is_available()"


def measurements(setting: Setting) -> list[Measurement]:
    """One measurement per file of tests."""
    tests = REPOSITORY / "tests"
    paths = [path for path in sorted(tests.rglob("test_*.py")) if ASKS_FOR_CUDA in path.read_text()]
    paths = [path for path in paths if path.name == "test_loader.py"] if setting.tiny else paths
    return [Measurement(str(path.relative_to(tests)), 30, partial(_results, path, setting)) for path in paths]


def _results(path: Path, setting: Setting, left: float) -> list[Row]:
    """The row of one file: how many tests passed, failed and were skipped, and which failed."""
    report = setting.scratch / f"{path.stem}.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=left)
    if not report.exists():
        raise RuntimeError((done.stdout + done.stderr)[-400:])
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [_name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    note = f"failed: {', '.join(failed)}" if failed else f"pytest's exit status {done.returncode}"
    return [row("tests", passed=passed, failed=len(failed), skipped=skipped, note=note)]


def _name(case: ElementTree.Element) -> str:
    return case.get("name", "?")
