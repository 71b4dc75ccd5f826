"""What is printed, from run folders on disk to text, CSV and the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.tables import report
from gsdg.errors import UserError

ROOT = Path(__file__).parents[2]


def write_run(runs: Path, target: str, trial_seed: int, accuracy: float, name: str = "erm", **changes) -> Path:
    """A run of two evaluations: the target's `in` is 0.1 at step 0 and `accuracy` at step 10, the sources' best."""
    settings = {"algorithm": {"name": name}, "seed": 0, "domains": ["photo", "art"], "state": "done", "reason": None}
    settings |= changes
    folder = runs / f"{name}_{target}_{trial_seed}_{settings['seed']}_{len(list(runs.glob('*')))}"
    folder.mkdir(parents=True)
    config = {
        "dataset": {"name": "toy", "domains": settings["domains"]},
        "split": {"target": target.split("+"), "trial_seed": trial_seed},
        "model": {"name": "convnet"},
        "algorithm": settings["algorithm"],
        "trainer": {"steps": 20},
        "seed": settings["seed"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    status = {"state": settings["state"], "step": 10, "steps": 20, "reason": settings["reason"]}
    (folder / "status.json").write_text(json.dumps({**status, "heartbeat": time.time()}))
    lines = []
    for step, inside, source in [(0, 0.1, 0.2), (10, accuracy, 0.9)]:
        domains = {domain: {"in": 0.5, "out": source} for domain in ("photo", "art")}
        lines.append(json.dumps({"step": step, "accuracy": {**domains, target: {"in": inside, "out": source}}}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_sweep(runs: Path) -> None:
    """erm: photo 80 and 90, art 70 and 60. grad_surgery: photo 90, art failed; one seed."""
    for target, trial_seed, accuracy in [("photo", 0, 0.8), ("photo", 1, 0.9), ("art", 0, 0.7), ("art", 1, 0.6)]:
        write_run(runs, target, trial_seed, accuracy)
    write_run(runs, "photo", 0, 0.9, "grad_surgery")
    write_run(runs, "art", 0, 0.9, "grad_surgery", state="failed", reason="loss is nan")


def body(text: str) -> list[list[str]]:
    """Header and rows, split at two spaces or more."""
    table = text.split("\n\n")[0].splitlines()[1:]
    return [[entry.strip() for entry in line.split("  ") if entry.strip()] for line in table if "  " in line]


def test_the_table_has_targets_in_domain_order_the_average_last_and_the_errors(tmp_path):
    for target, trial_seed, accuracy in [("photo", 0, 0.8), ("photo", 1, 0.9), ("art", 0, 0.7), ("art", 1, 0.6)]:
        write_run(tmp_path, target, trial_seed, accuracy)
    text = report(tmp_path)
    # 5 / sqrt(2) = 3.5; both seeds average 75
    assert body(text) == [
        ["algorithm", "photo", "art", "average"],
        ["erm", "85.0 ± 3.5", "65.0 ± 3.5", "75.0 ± 0.0"],
    ]
    assert text.splitlines()[0] == "toy, training_domain"
    assert "best mean held-out accuracy of the source domains" in text
    assert "accuracy on the target's in split, %; mean ± standard error (population form); seeds: 2" in text
    assert "missing" not in text


def test_columns_are_aligned(tmp_path):
    write_sweep(tmp_path)
    header, erm, surgery = report(tmp_path).splitlines()[1:4]
    assert len(header) == len(erm) == len(surgery)
    assert erm.index("85.0") + len("85.0 ± 3.5") == header.index("photo") + len("photo")


def test_missing_cells_are_dashes_with_their_reason_below_and_seeds_per_row_where_they_differ(tmp_path):
    write_sweep(tmp_path)
    text = report(tmp_path)
    assert body(text) == [
        ["algorithm", "photo", "art", "average", "seeds"],
        ["erm", "85.0 ± 3.5", "65.0 ± 3.5", "75.0 ± 0.0", "2"],
        ["grad_surgery", "90.0", "-", "-", "1"],
    ]
    assert "missing: grad_surgery art seed 0: failed at step 10: loss is nan (grad_surgery_art_0_0_5)" in text
    assert "missing: grad_surgery photo, art seed 1: no such run" in text
    assert "; seeds:" not in text


def test_a_cell_with_fewer_seeds_than_its_row_is_marked(tmp_path):
    write_run(tmp_path, "photo", 0, 0.8)
    write_run(tmp_path, "photo", 1, 0.9)
    write_run(tmp_path, "art", 0, 0.7)
    text = report(tmp_path)
    assert body(text)[1] == ["erm", "85.0 ± 3.5", "70.0 (1)", "75.0 (1)"]
    assert "(n): fewer seeds" in text


def test_different_configs_have_their_own_rows(tmp_path):
    for alpha, accuracy in [(0.3, 0.5), (0.6, 0.7)]:
        for target in ("photo", "art"):
            write_run(tmp_path, target, 0, accuracy, algorithm={"name": "erm", "alpha": alpha, "n_parts": 5})
    assert body(report(tmp_path))[1:] == [
        ["erm (alpha=0.3)", "50.0", "50.0", "50.0"],
        ["erm (alpha=0.6)", "70.0", "70.0", "70.0"],
    ]


def test_a_sweep_in_which_everything_failed_still_says_why(tmp_path):
    write_run(tmp_path, "photo", 0, 0.8, state="failed", reason="disk full")
    text = report(tmp_path)
    assert body(text)[1] == ["erm", "-", "-", "-"]
    assert "missing: erm photo seed 0: failed at step 10: disk full" in text


def test_several_selections_are_several_tables(tmp_path):
    write_sweep(tmp_path)
    tables = report(tmp_path, ("last", "oracle")).split("\n\n")
    assert [table.splitlines()[0] for table in tables] == ["toy, last", "toy, oracle"]


def test_only_the_runs_asked_for_are_in_the_report(tmp_path):
    write_sweep(tmp_path)
    wanted = [path.name for path in tmp_path.glob("erm_*_0_0_*")]
    assert body(report(tmp_path, run_ids=wanted))[1:] == [["erm", "80.0", "70.0", "75.0"]]


def test_what_could_not_be_read_or_is_not_shown_is_said_below(tmp_path):
    write_run(tmp_path, "photo", 0, 0.8)
    write_run(tmp_path, "photo+art", 0, 0.8)
    for name in "vwxyz":
        (tmp_path / name).mkdir()
    text = report(tmp_path)
    assert "note: trained with several targets, not in the tables (erm_photo+art_0_0_1)" in text
    assert "note: no config.json: not a run (v, w, x, y and 1 more)" in text


def test_an_empty_folder_says_so(tmp_path):
    assert "no runs here yet" in report(tmp_path)


def test_an_unknown_selection_lists_the_valid_ones(tmp_path):
    with pytest.raises(UserError, match="best_of_all.*\n.*training_domain, oracle, oracle_best, last"):
        report(tmp_path, ["best_of_all"])


def test_csv_has_the_same_numbers_and_no_error_for_a_single_run(tmp_path, capsys):
    write_sweep(tmp_path)
    assert main([str(tmp_path), "--format", "csv", "--selection", "training_domain", "last"]) == 0
    printed = capsys.readouterr()
    table = pd.read_csv(io.StringIO(printed.out))
    assert list(table.columns) == ["dataset", "algorithm", "selection", "target", "mean", "se", "n"]
    table = table[table["selection"] == "last"].set_index(["algorithm", "target"])
    assert table.loc[("erm", "photo"), ["mean", "se", "n"]].tolist() == pytest.approx([85.0, 5 / 2**0.5, 2], abs=1e-6)
    assert table.loc[("erm", "average"), "mean"] == pytest.approx(75.0)
    assert pd.isna(table.loc[("grad_surgery", "photo"), "se"])
    assert ("grad_surgery", "art") not in table.index
    assert "grad_surgery art seed 0: failed at step 10: loss is nan" in printed.err


def test_a_users_mistake_is_a_message_on_stderr_and_exit_2(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no folder of runs at" in printed.err


def test_the_command_line_prints_the_report(tmp_path):
    write_sweep(tmp_path)
    command = [
        sys.executable,
        "-m",
        "analysis",
        str(tmp_path),
        "--selection",
        "oracle_best",
        "--runs",
        "erm_photo_0_0_0",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout.startswith("toy, oracle_best\n")
    assert body(done.stdout)[1] == ["erm", "80.0", "-", "-"]
    assert done.stderr == ""


def test_analysis_does_not_import_torch():
    code = "import sys, analysis.__main__; assert 'pandas' in sys.modules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
