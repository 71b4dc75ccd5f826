"""Runs the tests on a copy of the repository in which one mutant is written.

A mutant may signal or delete anything, for example because a process ID has changed. Therefore every test run has its
own process IDs, and a file system that is read-only outside the copy. This needs Linux, root and util-linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.mutation.mutator import Mutant

ROOT = Path(__file__).parents[2]
# At the top of the repository:
LEFT_OUT = {".git", ".venv", ".venv-lowest", "runs", "data", "core", "report", "build", "dist"}
UNTIL_PARENT_ENDS = ["setpriv", "--pdeathsig", "KILL"]
SEPARATE = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]
# setsid: otherwise the process group belongs to the outer namespace, and os.getpgrp() is 0 in the tests.
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && cd "$0/copy" && setsid --wait "$@"; exit $?'
PYTEST = ["-m", "pytest", "-m", "not slow", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-W", "ignore"]
TIME_LIMIT = 5.0  # times the duration of the unmutated tests
NO_TESTS_COLLECTED = 5  # pytest's exit status


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant. result: killed, survived or timeout; test: the first test that failed."""

    name: str
    kind: str
    result: str
    seconds: float
    test: str


@dataclass(frozen=True)
class Baseline:
    """Durations of the unmutated tests in seconds. files: per test file; start: everything outside the tests."""

    files: Mapping[str, float]
    start: float

    def near(self, path: str) -> list[str]:
        """The test files named after a module: gsdg/runs/lock.py -> tests/runs/test_lock.py, test_lock_*.py."""
        module = Path(path).with_suffix("")
        stem = f"test_{module.parent.name if module.name in ('__init__', '__main__') else module.name}"
        return [file for file in self.files if Path(file).stem == stem or Path(file).stem.startswith(f"{stem}_")]

    def limit(self, files: Sequence[str]) -> float:
        return TIME_LIMIT * (self.start + sum(self.files[file] for file in files))


def _ignored(folder: str, names: list[str]) -> set[str]:
    """What is not copied: the user's runs and data, not gsdg/runs and gsdg/data; and bytecode."""
    return {"__pycache__"} | (LEFT_OUT if Path(folder) == ROOT else set())


class Copy:
    """A copy of the repository in a temporary folder, which holds one mutant at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gsdg-mutants-", ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        self.path.chmod(0o755)  # some tests run commands as another user
        shutil.copytree(ROOT, self.path / "copy", ignore=_ignored, symlinks=True)
        imported = self._python(["-c", "import gsdg; print(gsdg.__file__)"], None)
        if imported.stdout.strip() != str(self.path / "copy/gsdg/__init__.py"):
            raise SystemExit(f"the copy's gsdg is not imported: {imported.stdout}{imported.stderr}")

    def measure(self, tests: Sequence[str]) -> Baseline:
        """Run tests without a mutant. Exits if one fails, because then its failure would kill every mutant."""
        report, start = self.path / "report.xml", time.monotonic()
        done = self._python([*PYTEST, f"--junitxml={report}", *tests], None)
        if done.returncode:
            raise SystemExit(f"the tests fail without a mutant: {' '.join(tests)}\n{done.stdout[-3000:]}{done.stderr}")
        files: Counter[str] = Counter()
        for case in ElementTree.parse(report).iter("testcase"):
            files[self._file_of(case.get("classname"))] += float(case.get("time"))
        return Baseline(files, time.monotonic() - start - sum(files.values()))

    def try_mutant(self, mutant: Mutant, tests: Sequence[str], baseline: Baseline) -> Outcome:
        """Run the tests named after the module, and if they pass the other tests of its package."""
        near, start = baseline.near(mutant.path), time.monotonic()
        original = (self.path / "copy" / mutant.path).read_text()
        self._write(mutant.path, mutant.apply(original))
        try:
            result, test = self._run(near, baseline.limit(near)) if near else ("survived", "")
            if result == "survived":
                others = [*tests, *(f"--ignore={file}" for file in near)]
                result, test = self._run(others, baseline.limit(set(baseline.files) - set(near)))
        finally:
            self._write(mutant.path, original)
        return Outcome(mutant.name, mutant.kind, result, round(time.monotonic() - start, 1), test)

    def _run(self, arguments: Sequence[str], limit: float) -> tuple[str, str]:
        try:
            done = self._python([*PYTEST, *arguments], limit)
        except subprocess.TimeoutExpired:
            return "timeout", ""
        if done.returncode in (0, NO_TESTS_COLLECTED):
            return "survived", ""
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return "killed", failed[0].split(" - ")[0] if failed else f"pytest ended with {done.returncode}"

    def _python(self, arguments: Sequence[str], limit: float | None) -> subprocess.CompletedProcess:
        """Run python inside the copy; killing `unshare` kills every process that it has started."""
        temporary = self.path / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(exist_ok=True)
        environment = {"GSDG_TEST_PACS": str(ROOT.parent / "shared/data/PACS"), **os.environ, "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(self.path / "copy"), "TMPDIR": str(temporary)}
        command = [*UNTIL_PARENT_ENDS, *SEPARATE, READ_ONLY, str(self.path), sys.executable, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)

    def _write(self, path: str, text: str) -> None:
        """Write a module of the copy, and remove its bytecode: within one second its time stamp would look current."""
        file = self.path / "copy" / path
        file.write_text(text)
        for bytecode in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
            bytecode.unlink()

    def _file_of(self, test_class: str) -> str:
        """The test file of a class name in pytest's report, such as tests.runs.test_lock.TestLock."""
        parts = test_class.split(".")
        names = [Path(*parts[:n]).with_suffix(".py") for n in range(1, len(parts) + 1)]
        return str(next(name for name in names if (self.path / "copy" / name).is_file()))
