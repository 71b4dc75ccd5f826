"""What is printed, from run folders on disk to text, CSV and the command line."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from analysis_folders import write_evaluated, write_files, write_lines
from helpers import REPOSITORY
from table_command import printed, refused

from gsdg.analysis.__main__ import main
from gsdg.analysis.read.frames import read_runs
from gsdg.analysis.tables import missing_lines, read_published, report, summary
from gsdg.utils.errors import UserError

ERM = [("photo", 0, 0.8), ("photo", 1, 0.9), ("art", 0, 0.7), ("art", 1, 0.6)]


def write_erm(runs: Path) -> None:
    """photo 80 and 90, art 70 and 60."""
    for target, trial_seed, accuracy in ERM:
        write_evaluated(runs, target, trial_seed, accuracy)


def write_sweep(runs: Path) -> None:
    """erm as above. grad_surgery: photo 90, art failed; one seed."""
    write_erm(runs)
    write_evaluated(runs, "photo", 0, 0.9, "grad_surgery")
    write_evaluated(runs, "art", 0, 0.9, "grad_surgery", state="failed", reason="loss is nan")


def write_two_methods(runs: Path) -> None:
    """erm as above; x: two points above it on photo, four below on art."""
    write_erm(runs)
    for target, trial_seed, accuracy in ERM:
        write_evaluated(runs, target, trial_seed, accuracy + (0.02 if target == "photo" else -0.04), "x")


def cells_of(line: str) -> list[str]:
    """The cells of a line, split at two spaces or more."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def body(text: str) -> list[list[str]]:
    """The header and the rows of the first table."""
    return [cells_of(line) for line in text.split("\n\n")[0].splitlines()[1:] if "  " in line]


def printed_csv(capsys, *arguments: object) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(printed(capsys, *arguments, "--format", "csv")))


def test_the_table_has_targets_in_domain_order_the_average_last_and_the_errors(tmp_path, capsys):
    write_erm(tmp_path)
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
    text = printed(capsys, tmp_path, "--error", "sample")
    assert "85.0 ± 5.0" in text  # 7.07 / sqrt(2)
    assert "standard error (sample form)" in text


def test_missing_draws_of_the_same_targets_and_seeds_are_named_together():
    cells = [(target, seed, draw) for target in ("photo", "art") for seed in (0, 1) for draw in (0, 1, 2)]
    rows = [("erm", *cell, "", "missing", "no such run") for cell in [*cells, ("dog", 2, 0)]]
    columns = ["algorithm", "target", "trial_seed", "hparams_seed", "run_id", "kind", "reason"]
    (line,) = missing_lines(pd.DataFrame(rows, columns=columns))
    assert line == "missing: erm photo, art seeds 0, 1 draws 0, 1, 2; dog seed 2: no such run"


def test_missing_cells_are_dashes_with_their_reason_below_and_seeds_per_row_where_they_differ(tmp_path):
    write_sweep(tmp_path)
    text = report(tmp_path)
    assert body(text) == [
        ["algorithm", "photo", "art", "average", "seeds"],
        ["erm", "85.0 ± 3.5", "65.0 ± 3.5", "75.0 ± 0.0", "2"],
        ["grad_surgery", "90.0", "-", "-", "1"],
    ]
    assert "missing: grad_surgery art seed 0: failed at step 10: loss is nan (r005)" in text
    assert "missing: grad_surgery photo, art seed 1: no such run" in text
    assert "; seeds:" not in text
    header, erm, surgery = text.splitlines()[1:4]
    assert len(header) == len(erm) == len(surgery)
    assert erm.index("85.0") + len("85.0 ± 3.5") == header.index("photo") + len("photo")


def test_a_cell_with_fewer_seeds_than_its_row_is_marked(tmp_path):
    for target, trial_seed, accuracy in ERM[:3]:
        write_evaluated(tmp_path, target, trial_seed, accuracy)
    text = report(tmp_path)
    assert body(text)[1] == ["erm", "85.0 ± 3.5", "70.0 (1)", "77.5 (1)"]
    assert "(n): fewer seeds" in text


def test_several_selections_are_several_tables_and_an_unknown_one_lists_the_valid_ones(tmp_path):
    write_sweep(tmp_path)
    tables = report(tmp_path, ("last", "oracle")).split("\n\n")
    titles = [table.splitlines()[0] for table in tables]
    assert titles == ["toy, last", "toy, oracle", "read: 6 runs: 5 done | 1 failed"]
    results = summary(read_runs(tmp_path), ("last", "oracle"))
    frames = (results.cells, results.chosen, results.missing, results.draws)
    assert all(list(frame.index) == list(range(len(frame))) and len(frame) > 1 for frame in frames)
    names = "training_domain, leave_one_domain_out, oracle, oracle_best, last"
    with pytest.raises(UserError, match=f"best_of_all.*\n.*{names}"):
        report(tmp_path, ["best_of_all"])


def test_what_could_not_be_read_or_is_not_shown_is_listed_below(tmp_path):
    write_evaluated(tmp_path)
    write_evaluated(tmp_path, "photo+art")
    for name in "vwxyz":
        (tmp_path / name).mkdir()
    text = report(tmp_path)
    assert "note: trained with several targets, only for leave_one_domain_out (r001)" in text
    assert "note: neither config.json nor results.jsonl: not a run (v, w, x, y and 1 more)" in text
    assert "several targets" not in report(tmp_path, ["leave_one_domain_out"])


def test_csv_has_the_same_numbers_and_no_error_for_a_single_run(tmp_path, capsys):
    write_sweep(tmp_path)
    assert main([str(tmp_path), "--format", "csv", "--selection", "training_domain", "last"]) == 0
    output = capsys.readouterr()
    table = pd.read_csv(io.StringIO(output.out))
    assert list(table.columns) == ["dataset", "algorithm", "selection", "target", "mean", "se", "n"]
    table = table[table["selection"] == "last"].set_index(["algorithm", "target"])
    assert table.loc[("erm", "photo"), ["mean", "se", "n"]].tolist() == pytest.approx([85.0, 5 / 2**0.5, 2], abs=1e-6)
    assert table.loc[("erm", "average"), "mean"] == pytest.approx(75.0)
    assert pd.isna(table.loc[("grad_surgery", "photo"), "se"])
    assert ("grad_surgery", "art") not in table.index
    assert "grad_surgery art seed 0: failed at step 10: loss is nan" in output.err


def test_an_average_without_a_complete_seed_is_in_the_csv_too(tmp_path, capsys):
    write_evaluated(tmp_path, "photo", 0, 0.8)
    write_evaluated(tmp_path, "art", 1, 0.6)
    table = printed_csv(capsys, tmp_path).set_index("target")
    assert table.loc["average", ["mean", "n"]].tolist() == [70.0, 0]


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_prints_the_report_and_does_not_import_torch(tmp_path):
    write_sweep(tmp_path / "runs")
    path = write_files(tmp_path / "path", {"torch.py": "raise SystemExit('torch was imported')"})
    options = [str(tmp_path / "runs"), "--selection", "oracle_best", "--runs", "r000"]
    command = [sys.executable, "-m", "analysis", *options]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("toy, oracle_best\n")
    assert body(done.stdout)[1] == ["erm", "80.0", "-", "-"]


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    write_sweep(tmp_path)
    command = f"{sys.executable} -m analysis {tmp_path} --selection oracle last | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_best_is_bold_and_the_second_underlined_by_what_is_printed(tmp_path, capsys):
    write_two_methods(tmp_path)
    for trial_seed in (0, 1):
        write_evaluated(tmp_path, "photo", trial_seed, 0.8504, "y")
    table = printed(capsys, tmp_path, "--format", "markdown").splitlines()
    rows = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in table if row.startswith("| ")}
    assert rows["x"] == ["**87.0 ± 3.5**", "<u>61.0 ± 3.5</u>", "<u>74.0 ± 0.0</u>"]
    assert rows["erm"] == ["<u>85.0 ± 3.5</u>", "**65.0 ± 3.5**", "**75.0 ± 0.0**"]
    assert rows["y"] == ["<u>85.0 ± 0.0</u>", "-", "-"]  # 85.04 is printed as 85.0, as erm's 85.00


def test_ranks_are_over_all_cells(tmp_path, capsys):
    write_two_methods(tmp_path)
    text = printed(capsys, tmp_path, "--ranks").split("average rank, training_domain")[1]
    assert [cells_of(line) for line in text.splitlines()[2:4]] == [["erm", "1.50"], ["x", "1.50"]]
    assert "over the 2 cells" in text


def test_several_folders_are_one_table_and_several_data_sets_have_one_of_all(tmp_path, capsys):
    write_evaluated(tmp_path / "one", "photo", 0, 0.8)
    write_evaluated(tmp_path / "two", "art", 0, 0.7)
    write_evaluated(tmp_path / "three", "art", 0, 0.7, dataset="zoo")
    assert "75.0" in printed(capsys, tmp_path / "one", tmp_path / "two")
    tables = printed(capsys, tmp_path / "one", tmp_path / "three").split("\n\n")
    assert [table.splitlines()[0].split(",")[0] for table in tables[:3]] == ["toy", "zoo", "all"]
    assert cells_of(tables[2].splitlines()[1]) == ["algorithm", "toy", "zoo", "average"]


def test_published_results_are_shown_beside_the_runs_and_labelled(tmp_path, capsys):
    write_evaluated(tmp_path / "toy", domains=["photo"])
    write_evaluated(tmp_path / "pacs", domains=["photo"], dataset="pacs")
    assert "published" not in printed(capsys, tmp_path / "toy", "--published")
    text = printed(capsys, tmp_path / "pacs", "--published")
    rows = {cells[0]: cells[-1] for cells in body(text)}
    assert rows["GradSurgery (published)"] == "82.1 ± 0.4"
    assert rows["erm"] == "80.0"
    assert "published: the paper's results" in text
    overall = [cells_of(line) for line in text.split("\n\n")[1].splitlines()]
    assert overall[1] == ["algorithm", "pacs", "vlcs", "officehome", "terraincognita", "domainnet", "average"]
    (ours,) = [cells for cells in overall if cells[0].startswith("GradSurgery")]
    assert ours[-1] == "60.4"  # the mean of the five, as the paper prints it


def test_every_published_average_is_the_one_in_the_file():
    published = read_published()
    wide = pd.read_csv(REPOSITORY / "gsdg" / "analysis" / "published.csv", comment="#").set_index("algorithm")
    means = published.groupby("algorithm")["mean"].mean()
    assert len(published) == 23 * 5
    assert (means - wide["Avg"]).abs().max() <= 0.051  # the paper rounds


def test_unfinished_runs_count_only_when_asked_for(tmp_path, capsys):
    write_evaluated(tmp_path, state="running")
    assert "80.0" not in printed(capsys, tmp_path, "--format", "markdown")
    text = printed(capsys, tmp_path, "--format", "markdown", "--unfinished")
    assert "80.0" in text
    assert "**80.0**" not in text  # a single method is not the best


def test_the_best_draw_is_selected_and_the_number_of_draws_is_given(tmp_path, capsys):
    for draw, accuracy in [(0, 0.7), (3, 0.8)]:
        search = {"name": "s", "hparams_seed": draw, "ranges": {"lr": {"key": "optimizer.lr", "log10": [-5, -3]}}}
        write_evaluated(tmp_path, "photo", 0, accuracy, extra={"optimizer": {"lr": 0.001 * draw}, "search": search})
    text = printed(capsys, tmp_path, "--chosen")
    assert body(text)[1][:2] == ["erm", "80.0"]  # sources are equal: the later draw, as in DomainBed
    assert "the best of 2 hyper-parameter draws, by the same accuracy" in text
    run = text.splitlines()[-3].split()
    assert run == ["erm", "photo", "0", "0", "80.00", "r001", "10", "3", "2", "lr=0.003"]


def test_diff_shows_what_differs_between_two_configs(tmp_path, capsys):
    first = write_evaluated(tmp_path, "photo", 0, 0.8, {"name": "erm", "alpha": 0.3})
    second = write_evaluated(tmp_path, "photo", 1, 0.8)
    lines = [line.split() for line in printed(capsys, "diff", first, second).splitlines()[1:]]
    assert lines == [["algorithm.alpha", "0.3", "unset"], ["split.trial_seed", "0", "1"]]
    assert printed(capsys, "diff", first, first) == "the configs are equal\n"
    assert "is not a run" in refused(capsys, "diff", first, tmp_path)


# ---- comparing with a baseline --------------------------------------------------------------------------------------


def test_differences_to_a_baseline_are_a_table_of_their_own(tmp_path, capsys):
    write_two_methods(tmp_path)
    write_evaluated(tmp_path, "photo", 0, 0.85, "y")
    text = printed(capsys, tmp_path, "--baseline", "erm")
    rows = {cells[0]: cells[1:] for cells in map(cells_of, text.split("against erm")[1].splitlines()) if cells}
    assert rows["x"] == ["+2.0 [+2.0, +2.0] 2/2", "-4.0 [-4.0, -4.0] 0/2", "-1.0 [-1.0, -1.0] 0/2", "0.5"]
    assert rows["y"] == ["+5.0 1/1", "-", "-", "-"]  # no average where the table has none
    assert "[95 % interval, Student's t]" in text
    assert "permutation test" in text
    table = printed_csv(capsys, tmp_path, "--baseline", "erm").set_index(["algorithm", "target"])["difference"]
    assert table["x"].to_dict() == pytest.approx({"photo": 2, "art": -4, "average": -1})


def test_a_comparison_of_fewer_runs_than_the_table_has_says_which(tmp_path, capsys):
    write_two_methods(tmp_path)
    assert "without a partner" not in printed(capsys, tmp_path, "--baseline", "erm")
    write_evaluated(tmp_path, "photo", 2, 0.5)
    text = printed(capsys, tmp_path, "--baseline", "erm")
    assert "without a partner of the same seeds are in the table, not here; compared: erm photo (2 of 3)" in text


def test_a_baseline_without_results_is_no_mistake_and_an_unknown_one_is(tmp_path, capsys):
    write_evaluated(tmp_path, state="running")
    write_evaluated(tmp_path, algorithm="x")
    for options in ((), ("--format", "csv")):
        assert main([str(tmp_path), "--baseline", "erm", *options]) == 0
        assert "no comparison with erm: it has no results yet, or no other method has" in capsys.readouterr().err
    assert "no method is called 'ermm'" in refused(capsys, tmp_path, "--baseline", "ermm")


def test_without_scipy_a_comparison_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    write_two_methods(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "75.0" in printed(capsys, tmp_path, "--ranks")
    message = "a comparison with a baseline needs scipy: pip install 'gsdg[statistics]'"
    assert message in refused(capsys, tmp_path, "--baseline", "erm")


# ---- what a reader should know of a table's runs --------------------------------------------------------------------


def note_start(folder: Path, **metadata) -> None:
    """One more start of the run in environment.jsonl."""
    start = {"code": "aaaa", "packages": {"torch": "2.14.1"}, "device": "cpu", "processor": "EPYC", "commit": None}
    with (folder / "environment.jsonl").open("a") as file:
        file.write(json.dumps(start | metadata) + "\n")


def notes(text: str) -> list[str]:
    return [line for line in text.split("\n\n")[0].splitlines() if line.startswith("note:")]


def test_runs_of_one_code_on_one_device_need_no_note(tmp_path):
    for target in ("photo", "art"):
        note_start(write_evaluated(tmp_path, target), host=target)
    note_start(write_evaluated(tmp_path, dataset="zoo"), code="bbbb")
    text = report(tmp_path)
    assert text.count("training_domain") == 3
    assert "made with different" not in text  # a table has notes of its own runs


def test_different_code_torch_and_devices_are_one_note_below_the_table(tmp_path, capsys):
    changes = [{}, {"code": "bbbb"}, {"packages": {"torch": "2.15.0"}}, {"device": "NVIDIA H100"}]
    for seed, metadata in enumerate(changes):
        note_start(write_evaluated(tmp_path, "photo", seed), **metadata)
    write_evaluated(tmp_path, "art", 0)  # notes nothing
    write_evaluated(tmp_path, "art", 1, state="failed")  # is not in the table
    expected = (
        "note: these results were made with different code (aaaa: 3 runs, bbbb: 1 run, not noted: 1 run); "
        "torch (2.14.1: 3 runs, 2.15.0: 1 run, not noted: 1 run); device (cpu: 3 runs, NVIDIA H100: 1 run, "
        "not noted: 1 run)"
    )
    assert notes(report(tmp_path)) == [expected]
    assert main([str(tmp_path), "--format", "csv"]) == 0
    assert expected in capsys.readouterr().err


def test_a_run_that_went_on_under_other_code_is_noted_by_itself_and_a_strange_environment_is_no_error(tmp_path):
    folder = write_evaluated(tmp_path)
    note_start(folder)
    note_start(folder, code="bbbb\ud800")
    assert notes(report(tmp_path)) == ["note: these results were made with different code (aaaa, then bbbb?: 1 run)"]
    for line in ("7", "{", '{"packages": 3, "device": ["cpu"]}'):
        (folder / "environment.jsonl").write_text(line + "\n")
        assert notes(report(tmp_path)) == [], line


def test_a_source_of_which_nothing_is_held_out_is_named(tmp_path):
    folder = write_evaluated(tmp_path, domains=["photo", "art", "sketch"])
    assert "nothing is held out of sketch" in report(tmp_path)  # no accuracies at all: trainer.evaluate=fast
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for line in lines:
        line["accuracy"]["sketch"] = {"in": 0.5}
    write_lines(folder / "records.jsonl", lines)
    text = report(tmp_path)
    assert body(text)[1][:2] == ["erm", "80.0"]
    assert notes(text) == [
        "note: nothing is held out of sketch: 1 run selected by the other sources' held-out accuracy"
    ]
    assert notes(report(tmp_path, ["last"])) == []


def test_a_leave_one_out_summary_with_many_runs_missing_has_one_line_per_method(tmp_path):
    """Each run of `other` lacks the run beside it for a reason of its own: 12 lines."""
    for seed in range(6):
        for target in ("photo", "art"):
            write_evaluated(tmp_path, target, seed)
            write_evaluated(tmp_path, target, seed, algorithm="other")
        write_evaluated(tmp_path, "photo+art", seed)
        write_evaluated(tmp_path, "photo+art", seed, 0.8, "other", state="failed", reason=f"loss is nan at {seed}")
    write_evaluated(tmp_path, "photo", 6, 0.8, "other", state="stopped")
    lines = report(tmp_path, ["leave_one_domain_out"]).splitlines()
    assert sorted(line for line in lines if line.startswith("missing: ")) == [
        "missing: erm photo, art seed 6: no such run",
        "missing: other: 14 runs: 12 done, but not all runs that also leave out another domain are; 1 stopped; "
        "1 no such run",
    ]


# ---- a stray run ----------------------------------------------------------------------------------------------------


def write_stray(runs: Path) -> None:
    """erm and x on photo, and a run of erm with another setting."""
    for algorithm, accuracy in (("erm", 0.8), ("x", 0.85), ({"name": "erm", "lr": 0.1}, 0.5)):
        write_evaluated(runs, "photo", 0, accuracy, algorithm)


def test_a_stray_run_is_left_out_and_the_baseline_has_its_name_again(tmp_path, capsys):
    write_stray(tmp_path)
    for option in (["--exclude", "lr=0.1"], ["--where", "lr=unset"]):
        text = printed(capsys, tmp_path, "--baseline", "erm", *option)
        assert body(text)[1][:2] == ["erm", "80.0"]
        assert "toy, training_domain: against erm" in text
        assert f"note: left out by {' '.join(option)} (r002)" in text


def test_an_ambiguous_baseline_is_refused_with_options_that_work(tmp_path, capsys):
    write_stray(tmp_path)
    error = refused(capsys, tmp_path, "--baseline", "erm")
    assert "'erm' is the name of 2 methods of toy:\n  erm (lr=0.1)\n  erm (lr=unset)\n" in error
    option = shlex.split(error.partition("Name one of them: ")[2].splitlines()[0])
    assert "toy, training_domain: against erm (lr=0.1)" in printed(capsys, tmp_path, *option)


def test_several_conditions_may_follow_one_option_or_each_have_their_own(tmp_path, capsys):
    write_stray(tmp_path)
    for options in (["--where", "algorithm=erm", "lr=unset"], ["--where", "algorithm=erm", "--where", "lr=unset"]):
        assert [row[0] for row in body(printed(capsys, tmp_path, *options))[1:]] == ["erm"]
    assert "--where lr=3: no run has this value" in refused(capsys, tmp_path, "--where", "lr=3")
