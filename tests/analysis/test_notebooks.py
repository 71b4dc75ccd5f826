"""The notebooks run from top to bottom on real runs, from the folder they are in, and only call analysis."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
from analysis_folders import config, write_run
from helpers import REPOSITORY

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((REPOSITORY / "analysis").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory):
    """The quickstart's runs with fewer steps and targets, diagnostics, and a small ablation."""
    runs = tmp_path_factory.mktemp("demo") / "runs"
    small = ["trainer.steps=5", "trainer.eval_every=2", "trainer.log_every=1", "split.target=0,15", f"runs_dir={runs}"]
    for sweep in (
        ["experiment=quickstart"],
        ["experiment=quickstart", "algorithm=pcgrad,grad_surgery", "algorithm.diagnostics=true", "split.trial_seed=1"],
        [
            "experiment=ablation/alpha_n_parts_digits",
            "algorithm.alpha=0,1",
            "algorithm.n_parts=1,5",
            "split.target=0,30",
        ],
    ):
        overrides = {one.split("=")[0]: one for one in [*small, *sweep]}  # a sweep's own values beat `small`
        command = [sys.executable, "launch.py", "-m", *overrides.values()]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return runs


def executed(path, runs):
    """The notebook after a run of all its cells in its own folder, `runs` in place of its RUNS."""
    book = nbformat.read(path, as_version=4)
    (first,) = [cell for cell in book.cells if cell.source.startswith("RUNS = ")]
    lines = first.source.splitlines()
    first.source = "\n".join([f"RUNS = {str(runs)!r}", *lines[1:]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY) + os.pathsep + os.environ.get("PYTHONPATH", ""))
        client = nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(path.parent)}})
        return client.execute()


def shown(book) -> str:
    """Every output, as text; pictures as their type."""
    found = []
    for cell in book.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output
            data = output.get("data", {})
            found += [output.get("text", ""), data.get("text/html", ""), data.get("text/plain", ""), *data]
    return "\n".join(found)


def test_there_are_four():
    assert NAMES == ["1_results", "2_ablation", "3_conflicts", "4_compare_with_domainbed"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_runs_on_the_demos_runs(path, demo_runs):
    text = shown(executed(path, demo_runs))
    wanted = {
        "1_results": ["rotated_digits, training_domain", "the runs behind the numbers", "image/png", "against erm"],
        "2_ablation": ["image/png", "grad_surgery (alpha=", "average rank"],
        "3_conflicts": ["image/png"],
        "4_compare_with_domainbed": ["rotated_digits, leave_one_domain_out", "needs the runs that leave out"],
    }
    for words in wanted[path.stem]:
        assert words in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_runs_where_there_is_hardly_anything(path, tmp_path):
    write_run(tmp_path, "r", config(), state="running")
    assert "image/png" not in shown(executed(path, tmp_path))


def test_an_empty_folder_is_no_error_either(tmp_path):
    assert "no runs here yet" in shown(executed(NOTEBOOKS[0], tmp_path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_is_committed_without_output_and_only_calls(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    allowed = (ast.Assign, ast.Expr, ast.ImportFrom)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
            for node in ast.parse(cell.source).body:
                assert isinstance(node, allowed), ast.unparse(node)
                if isinstance(node, ast.ImportFrom):
                    assert node.module.split(".")[0] == "analysis"
