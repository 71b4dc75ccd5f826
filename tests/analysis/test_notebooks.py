"""The notebooks run from top to bottom on real runs, from the folder they are in, and only call analysis."""

from __future__ import annotations

import ast
import itertools
import os
from pathlib import Path

import hydra
import pytest
from analysis_folders import config, write_run
from helpers import REPOSITORY

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

# Words that the notebook shows of `demo_runs`.
SHOWN = {
    "1_results": ["rotated_digits, training_domain", "the runs behind the numbers", "image/png", "against erm"],
    "2_ablation": ["image/png", "grad_surgery (alpha=", "average rank"],
    "3_conflicts": ["image/png"],
    "4_compare_with_domainbed": ["rotated_digits, leave_one_domain_out", "needs the runs that also leave out"],
}


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory):
    """Runs of the quickstart's two algorithms with fewer steps and targets, with an ablation and diagnostics."""
    from gsdg.experiment import run
    from gsdg.plan import prepare

    runs = tmp_path_factory.mktemp("demo") / "runs"
    small = ["trainer.steps=5", "trainer.eval_every=2", "trainer.log_every=1", "device=cpu", f"runs_dir={runs}"]
    sweep = [["algorithm=erm", f"split.target={target}"] for target in (0, 15)]
    for alpha, n_parts in itertools.product((0, 1), (1, 5)):
        knobs = [f"algorithm.alpha={alpha}", f"algorithm.n_parts={n_parts}", "algorithm.diagnostics=true"]
        sweep.append(["algorithm=grad_surgery", "split.target=0", *knobs])
    with hydra.initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        for overrides in sweep:
            run(prepare(hydra.compose("config", ["experiment=quickstart", *small, *overrides])))
    return runs


def executed(name: str, *folders: Path) -> list[str]:
    """What the notebook shows of each folder in place of its RUNS: all its cells run in its own folder.

    The folders share a kernel, whose names are deleted in between.
    """
    path = REPOSITORY / "analysis" / f"{name}.ipynb"
    book = nbformat.read(path, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    (number,) = [number for number, cell in enumerate(cells) if cell.source.startswith("RUNS = ")]
    _, _, rest = cells[number].source.partition("\n")
    book.cells = []
    for folder in folders:
        copies = [nbformat.v4.new_code_cell(cell.source) for cell in cells]
        copies[number].source = f"RUNS = {str(folder)!r}\n{rest}"
        book.cells += [*copies, nbformat.v4.new_code_cell("%reset -f")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY) + os.pathsep + os.environ.get("PYTHONPATH", ""))
        nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    size = len(cells) + 1
    batches = [book.cells[start : start + size] for start in range(0, len(book.cells), size)]
    return ["\n".join(map(outputs, batch)) for batch in batches]


def outputs(cell) -> str:
    """Every output, as text; pictures as their type."""
    parts = []
    for output in cell.outputs:
        assert output.output_type != "error", output
        data = output.get("data", {})
        parts += [output.get("text", ""), data.get("text/html", ""), data.get("text/plain", ""), *data]
    return "\n".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs_on_the_demos_runs_on_a_single_running_run_and_on_an_empty_folder(name, demo_runs, tmp_path):
    write_run(tmp_path / "running", "r", config(), state="running")
    (tmp_path / "empty").mkdir()
    demo, running, empty = executed(name, demo_runs, tmp_path / "running", tmp_path / "empty")
    for words in SHOWN[name]:
        assert words in demo
    assert "Traceback" not in demo
    assert "image/png" not in running
    assert "no runs here yet" in empty


def test_the_four_notebooks_are_committed_without_output_and_only_call():
    paths = sorted((REPOSITORY / "analysis").glob("*.ipynb"))
    assert [path.stem for path in paths] == list(SHOWN)
    for path in paths:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        for cell in book.cells:
            if cell.cell_type == "code":
                assert (cell.outputs, cell.execution_count) == ([], None), path
                for node in ast.parse(cell.source).body:
                    assert isinstance(node, ast.Assign | ast.Expr | ast.ImportFrom), (path, ast.unparse(node))
                    if isinstance(node, ast.ImportFrom):
                        assert node.module.split(".")[:2] == ["gsdg", "analysis"], path
