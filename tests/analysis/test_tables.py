"""What is printed, from run folders on disk to text, CSV and the command line."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.tables import read_published, report
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
    assert body(text)[1] == ["erm", "85.0 ± 3.5", "70.0 (1)", "77.5 (1)"]
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
    assert [table.splitlines()[0] for table in tables] == [
        "toy, last",
        "toy, oracle",
        "read: 6 runs: 5 done | 1 failed",
    ]


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
    assert "note: trained with several targets, only for leave_one_domain_out (erm_photo+art_0_0_1)" in text
    assert "note: neither config.json nor results.jsonl: not a run (v, w, x, y and 1 more)" in text
    assert "several targets" not in report(tmp_path, ["leave_one_domain_out"])


def test_an_empty_folder_says_so(tmp_path):
    assert "no runs here yet" in report(tmp_path)


def test_an_unknown_selection_lists_the_valid_ones(tmp_path):
    with pytest.raises(
        UserError, match="best_of_all.*\n.*training_domain, leave_one_domain_out, oracle, oracle_best, last"
    ):
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


# ---- the command line's options -----------------------------------------------------------------------------------


def printed(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def write_two_methods(runs: Path) -> None:
    """erm: photo 80, 90, art 70, 60; x: two points above it on photo, four below on art."""
    for target, trial_seed, accuracy in [("photo", 0, 0.8), ("photo", 1, 0.9), ("art", 0, 0.7), ("art", 1, 0.6)]:
        write_run(runs, target, trial_seed, accuracy)
        write_run(runs, target, trial_seed, accuracy + (0.02 if target == "photo" else -0.04), "x")


def test_the_best_is_bold_and_the_second_underlined_by_what_is_printed(tmp_path, capsys):
    write_two_methods(tmp_path)
    write_run(tmp_path, "photo", 0, 0.8504, "y")
    write_run(tmp_path, "photo", 1, 0.8504, "y")
    table = printed(capsys, tmp_path, "--format", "markdown").splitlines()
    rows = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in table if row.startswith("| ")}
    assert rows["x"] == ["**87.0 ± 3.5**", "<u>61.0 ± 3.5</u>", "<u>74.0 ± 0.0</u>"]
    assert rows["erm"] == ["<u>85.0 ± 3.5</u>", "**65.0 ± 3.5**", "**75.0 ± 0.0**"]
    assert rows["y"] == ["<u>85.0 ± 0.0</u>", "-", "-"]  # 85.04 is printed as 85.0, as erm's 85.00


def test_a_single_method_has_no_best(tmp_path, capsys):
    write_run(tmp_path, "photo", 0, 0.8)
    assert "**80.0**" not in printed(capsys, tmp_path, "--format", "markdown")


def test_the_sample_form_is_said(tmp_path, capsys):
    write_sweep(tmp_path)
    text = printed(capsys, tmp_path, "--error", "sample")
    assert "85.0 ± 5.0" in text  # 7.07 / sqrt(2)
    assert "standard error (sample form)" in text


def test_differences_to_a_baseline_are_a_table_of_their_own(tmp_path, capsys):
    write_two_methods(tmp_path)
    text = printed(capsys, tmp_path, "--baseline", "erm")
    (row,) = [line for line in text.split("against erm")[1].splitlines() if line.startswith("x ")]
    cells = [cell.strip() for cell in row.split("  ") if cell.strip()]
    assert cells == ["x", "+2.0 [+2.0, +2.0] 2/2", "-4.0 [-4.0, -4.0] 0/2", "-1.0 [-1.0, -1.0] 0/2", "0.5"]
    assert "[95 % interval, Student's t]" in text
    assert "permutation test" in text
    assert "without a partner" not in text
    table = pd.read_csv(io.StringIO(printed(capsys, tmp_path, "--baseline", "erm", "--format", "csv")))
    assert table.set_index("target")["difference"].to_dict() == pytest.approx({"photo": 2, "art": -4, "average": -1})


def test_a_comparison_of_fewer_runs_than_the_table_has_says_which(tmp_path, capsys):
    write_two_methods(tmp_path)
    write_run(tmp_path, "photo", 2, 0.5)
    text = printed(capsys, tmp_path, "--baseline", "erm")
    assert "without a partner of the same seeds are in the table, not here; compared: erm photo (2 of 3)" in text


def test_a_comparison_has_no_average_where_the_table_has_none(tmp_path, capsys):
    write_two_methods(tmp_path)
    write_run(tmp_path, "photo", 0, 0.85, "y")
    text = printed(capsys, tmp_path, "--baseline", "erm").split("against erm")[1]
    (row,) = [line.split() for line in text.splitlines() if line.startswith("y ")]
    assert row == ["y", "+5.0", "1/1", "-", "-", "-"]


def test_a_baseline_without_results_is_no_mistake(tmp_path, capsys):
    write_run(tmp_path, "photo", 0, 0.8, state="running")
    write_run(tmp_path, "photo", 0, 0.8, "x")
    for options in ((), ("--format", "csv")):
        assert main([str(tmp_path), "--baseline", "erm", *options]) == 0
        assert "no comparison with erm: it has no results yet, or no other method has" in capsys.readouterr().err


def test_without_scipy_a_comparison_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    write_two_methods(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "75.0" in printed(capsys, tmp_path, "--ranks")
    assert main([str(tmp_path), "--baseline", "erm"]) == 2
    assert "a comparison with a baseline needs scipy: pip install 'gsdg[statistics]'" in capsys.readouterr().err


def test_an_average_without_a_complete_seed_is_in_the_csv_too(tmp_path, capsys):
    write_run(tmp_path, "photo", 0, 0.8)
    write_run(tmp_path, "art", 1, 0.6)
    table = pd.read_csv(io.StringIO(printed(capsys, tmp_path, "--format", "csv"))).set_index("target")
    assert table.loc["average", ["mean", "n"]].tolist() == [70.0, 0]


def test_an_unknown_baseline_is_the_users_mistake(tmp_path, capsys):
    write_two_methods(tmp_path)
    assert main([str(tmp_path), "--baseline", "ermm"]) == 2
    assert "no method is called 'ermm'" in capsys.readouterr().err


def test_ranks_are_over_all_cells(tmp_path, capsys):
    write_two_methods(tmp_path)
    text = printed(capsys, tmp_path, "--ranks").split("average rank, training_domain")[1]
    assert [line.split() for line in text.splitlines()[2:4]] == [["erm", "1.50"], ["x", "1.50"]]
    assert "over the 2 cells" in text


def test_ranks_and_marks_see_what_is_printed(tmp_path, capsys):
    for name, accuracy in [("x", 0.8004), ("y", 0.7996)]:
        write_run(tmp_path, "photo", 0, accuracy, name)
    text = printed(capsys, tmp_path, "--ranks").split("average rank, training_domain")[1]
    assert [line.split() for line in text.splitlines()[2:4]] == [["x", "1.50"], ["y", "1.50"]]


def test_several_folders_are_one_table_and_several_data_sets_have_one_of_all(tmp_path, capsys):
    write_run(tmp_path / "one", "photo", 0, 0.8)
    write_run(tmp_path / "two", "art", 0, 0.7)
    assert "75.0" in printed(capsys, tmp_path / "one", tmp_path / "two")
    config = next((tmp_path / "two").iterdir()) / "config.json"
    config.write_text(config.read_text().replace('"toy"', '"zoo"'))
    tables = printed(capsys, tmp_path / "one", tmp_path / "two").split("\n\n")
    assert [table.splitlines()[0].split(",")[0] for table in tables[:3]] == ["toy", "zoo", "all"]
    assert tables[2].splitlines()[1].split() == ["algorithm", "toy", "zoo", "average"]


def test_the_published_figures_stand_beside_the_runs_and_say_what_they_are(tmp_path, capsys):
    write_run(tmp_path, "photo", 0, 0.8, domains=["photo"])
    assert "published" not in printed(capsys, tmp_path, "--published")  # of no data set that is here
    config = next(tmp_path.iterdir()) / "config.json"
    config.write_text(config.read_text().replace('"toy"', '"pacs"'))
    text = printed(capsys, tmp_path, "--published")
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in text.split("\n\n")[0].splitlines()}
    assert rows["GradSurgery (published)"] == "82.1 ± 0.4"
    assert rows["erm"] == "80.0"
    assert "published: the paper's figures" in text
    overall = text.split("\n\n")[1].splitlines()
    assert overall[1].split() == ["algorithm", "pacs", "vlcs", "officehome", "terraincognita", "domainnet", "average"]
    (ours,) = [line.split("  ") for line in overall if line.startswith("GradSurgery")]
    assert ours[-1].strip() == "60.4"  # the mean of the five, as the paper prints it


def test_every_published_average_is_the_one_in_the_file():
    published = read_published()
    wide = pd.read_csv(ROOT / "analysis" / "published.csv", comment="#").set_index("algorithm")
    means = published.groupby("algorithm")["mean"].mean()
    assert len(published) == 23 * 5
    assert (means - wide["Avg"]).abs().max() <= 0.051  # the paper rounds


def test_unfinished_runs_count_only_when_asked_for(tmp_path, capsys):
    write_run(tmp_path, "photo", 0, 0.8, state="running")
    assert "80.0" not in printed(capsys, tmp_path)
    assert "80.0" in printed(capsys, tmp_path, "--unfinished")


def test_draws_are_selected_over_and_told(tmp_path, capsys):
    for draw, accuracy in [(0, 0.7), (3, 0.8)]:
        folder = write_run(tmp_path, "photo", 0, accuracy)
        config = json.loads((folder / "config.json").read_text())
        ranges = {"lr": {"key": "optimizer.lr", "log10": [-5, -3]}}
        config |= {"optimizer": {"lr": 0.001 * draw}, "search": {"name": "s", "hparams_seed": draw, "ranges": ranges}}
        (folder / "config.json").write_text(json.dumps(config))
    text = printed(capsys, tmp_path, "--chosen")
    assert body(text)[1][:2] == ["erm", "80.0"]  # sources are equal: the later draw, as in DomainBed
    assert "the best of 2 hyper-parameter draws, by the same accuracy" in text
    run = text.splitlines()[-3].split()
    assert run[:5] + run[6:] == ["erm", "photo", "0", "0", "80.00", "10", "3", "2", "lr=0.003"]
    assert (tmp_path / run[5]).is_dir()


def test_diff_shows_what_differs_between_two_configs(tmp_path, capsys):
    one = write_run(tmp_path, "photo", 0, 0.8, algorithm={"name": "erm", "alpha": 0.3})
    two = write_run(tmp_path, "photo", 1, 0.8, algorithm={"name": "erm"})
    lines = [line.split() for line in printed(capsys, "diff", one, two).splitlines()[1:]]
    assert lines == [["algorithm.alpha", "0.3", "unset"], ["split.trial_seed", "0", "1"]]
    assert printed(capsys, "diff", one, one) == "the configs are equal\n"
    assert main(["diff", str(one), str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    write_sweep(tmp_path)
    command = f"{sys.executable} -m analysis {tmp_path} --selection oracle last | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- what a reader should know of a table's runs ------------------------------------------------------------------


def note_start(folder: Path, **facts) -> None:
    """One more start of the run in environment.jsonl."""
    start = {"code": "aaaa", "packages": {"torch": "2.14.1"}, "device": "cpu", "processor": "EPYC", "commit": None}
    with (folder / "environment.jsonl").open("a") as file:
        file.write(json.dumps(start | facts) + "\n")


def notes(text: str) -> list[str]:
    return [line for line in text.split("\n\n")[0].splitlines() if line.startswith("note:")]


def test_runs_of_one_code_on_one_device_need_no_note(tmp_path):
    for target in ("photo", "art"):
        note_start(write_run(tmp_path, target, 0, 0.8), host=target)
    assert notes(report(tmp_path)) == []


def test_different_code_torch_and_devices_are_one_note_below_the_table(tmp_path, capsys):
    changes = [{}, {"code": "bbbb"}, {"packages": {"torch": "2.15.0"}}, {"device": "NVIDIA H100"}]
    for seed, facts in enumerate(changes):
        note_start(write_run(tmp_path, "photo", seed, 0.8), **facts)
    write_run(tmp_path, "art", 0, 0.8)  # notes nothing
    write_run(tmp_path, "art", 1, 0.8, state="failed")  # is not in the table
    expected = (
        "note: these results were made with different code (aaaa: 3 runs, bbbb: 1 run, not noted: 1 run); "
        "torch (2.14.1: 3 runs, 2.15.0: 1 run, not noted: 1 run); device (cpu: 3 runs, NVIDIA H100: 1 run, "
        "not noted: 1 run)"
    )
    assert notes(report(tmp_path)) == [expected]
    assert main([str(tmp_path), "--format", "csv"]) == 0
    assert expected in capsys.readouterr().err


def test_a_run_that_went_on_under_other_code_is_noted_by_itself(tmp_path):
    folder = write_run(tmp_path, "photo", 0, 0.8)
    note_start(folder)
    note_start(folder, code="bbbb")
    assert notes(report(tmp_path)) == ["note: these results were made with different code (aaaa, then bbbb: 1 run)"]


@pytest.mark.parametrize("line", ["7", "{", '{"packages": 3, "device": ["cpu"]}'])
def test_a_strange_environment_is_no_error(tmp_path, line):
    (write_run(tmp_path, "photo", 0, 0.8) / "environment.jsonl").write_text(line + "\n")
    assert notes(report(tmp_path)) == []


def test_the_notes_are_of_the_tables_own_runs(tmp_path):
    for name, code in [("toy", "aaaa"), ("zoo", "bbbb")]:
        folder = write_run(tmp_path, "photo", 0, 0.8)
        note_start(folder, code=code)
        (folder / "config.json").write_text((folder / "config.json").read_text().replace('"toy"', f'"{name}"'))
    assert "made with different" not in report(tmp_path)


def test_a_source_of_which_nothing_is_held_out_is_named(tmp_path):
    folder = write_run(tmp_path, "photo", 0, 0.8, domains=["photo", "art", "sketch"])
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for line in lines:
        line["accuracy"]["sketch"] = {"in": 0.5}
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report(tmp_path)
    assert body(text)[1][:2] == ["erm", "80.0"]
    assert notes(text) == [
        "note: nothing is held out of sketch: 1 run selected by the other sources' held-out accuracy"
    ]
    assert notes(report(tmp_path, ["last"])) == []


def test_a_source_without_any_accuracies_is_named_too(tmp_path):
    write_run(tmp_path, "photo", 0, 0.8, domains=["photo", "art", "sketch"])  # trainer.evaluate=fast
    assert "nothing is held out of sketch" in report(tmp_path)


# ---- a stray run ---------------------------------------------------------------------------------------------------


def write_stray(runs: Path) -> None:
    """erm and x on photo, and a run of erm with another setting."""
    for name, accuracy in [("erm", 0.8), ("x", 0.85)]:
        write_run(runs, "photo", 0, accuracy, name)
    write_run(runs, "photo", 0, 0.5, algorithm={"name": "erm", "lr": 0.1})


def test_a_stray_run_is_left_out_and_the_baseline_has_its_name_again(tmp_path, capsys):
    write_stray(tmp_path)
    for option in (["--exclude", "lr=0.1"], ["--where", "lr=unset"]):
        text = printed(capsys, tmp_path, "--baseline", "erm", *option)
        assert body(text)[1][:2] == ["erm", "80.0"]
        assert "toy, training_domain: against erm" in text
        assert f"note: left out by {' '.join(option)} (erm_photo_0_0_2)" in text


def test_an_ambiguous_baseline_is_refused_with_options_that_work(tmp_path, capsys):
    write_stray(tmp_path)
    assert main([str(tmp_path), "--baseline", "erm"]) == 2
    error = capsys.readouterr().err
    assert "'erm' is the name of 2 methods of toy:\n  erm (lr=0.1)\n  erm (lr=unset)\n" in error
    option = shlex.split(error.partition("Name one of them: ")[2].splitlines()[0])
    assert "toy, training_domain: against erm (lr=0.1)" in printed(capsys, tmp_path, *option)


def test_several_conditions_may_follow_one_option_or_stand_with_their_own(tmp_path, capsys):
    write_stray(tmp_path)
    for options in (["--where", "algorithm=erm", "lr=unset"], ["--where", "algorithm=erm", "--where", "lr=unset"]):
        assert [row[0] for row in body(printed(capsys, tmp_path, *options))[1:]] == ["erm"]
    assert main([str(tmp_path), "--where", "lr=3"]) == 2
    assert "--where lr=3: no run has this value" in capsys.readouterr().err
