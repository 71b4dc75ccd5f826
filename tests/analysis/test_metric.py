"""Tables, comparisons and figures of another metric than the accuracy, from run folders on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from analysis_folders import config, domainbed, write_lines, write_run
from table_command import printed

from gsdg.analysis.__main__ import main
from gsdg.analysis.read.frames import read_runs
from gsdg.analysis.tables import summary
from gsdg.metrics import METRICS
from gsdg.utils.errors import UserError

RESULTS = {"erm": (0.5, 0.9), "vrex": (0.7, 1.3)}  # {algorithm: nll of the target's `in` at steps 0 and 10}


def write_scored(
    runs: Path, target: str, algorithm: str, trial_seed: int = 0, shift: float = 0.0, draw: int = 0, **status
) -> Path:
    """A run whose accuracy is best at step 10 and whose nll at step 0: that of the target as in RESULTS, plus `shift`.

    The held-out nll of every domain is 0.2 at step 0 and 0.4 at step 10, plus `shift`.
    """
    content = config(algorithm, target, trial_seed, dataset={"domains": ["photo", "art"]})
    content |= {"search": {"hparams_seed": draw}} if draw else {}
    folder = write_run(runs, f"r{len(list(runs.glob('*'))):03d}", content, **status)
    lines = []
    for step, accuracy, held_out, nll in zip((0, 10), (0.6, 0.8), (0.2, 0.4), RESULTS[algorithm], strict=True):
        losses = {domain: {"in": 0.1, "out": held_out + shift} for domain in ("photo", "art")}
        losses[target]["in"] = nll + shift
        accuracies = {domain: {"in": accuracy, "out": accuracy} for domain in ("photo", "art")}
        scores = {"nll": losses, "balanced_accuracy": {name: {"in": 0.25, "out": 0.5} for name in losses}}
        lines.append({"step": step, "accuracy": accuracies, "scores": scores})
    write_lines(folder / "records.jsonl", lines)
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    """erm: photo and art with two seeds, 0.1 apart; vrex: the same, 0.2 higher."""
    for algorithm in RESULTS:
        for target in ("photo", "art"):
            for seed in (0, 1):
                write_scored(tmp_path / "runs", target, algorithm, seed, seed / 10)
    return tmp_path / "runs"


def test_the_table_has_plain_numbers_of_the_step_with_the_lowest_loss_and_the_lowest_is_best(runs, capsys):
    text = printed(capsys, runs, "--metric", "nll", "--format", "markdown")
    assert "| erm | **0.550 ± 0.035** | **0.550 ± 0.035** | **0.550 ± 0.035** |" in text
    assert "| vrex | <u>0.750 ± 0.035</u> |" in text
    assert "selection: the step with the best mean held-out nll of the source domains" in text
    assert "nll on the target's in split; mean ± standard error (population form); seeds: 2" in text
    assert "nll: mean negative log-likelihood of the true class, in nats; lower is better, and selections" in text
    assert "accuracy" not in text


def test_a_share_is_in_percent_and_higher_is_better(runs, capsys):
    text = printed(capsys, runs, "--metric", "balanced_accuracy")
    assert "25.0 ± 0.0" in text
    assert "balanced_accuracy on the target's in split, %" in text
    assert "higher is better" in text


def test_the_accuracys_table_does_not_change_with_what_else_is_recorded(runs, capsys):
    text = printed(capsys, runs)
    for path in runs.glob("*/records.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [{key: line[key] for key in ("step", "accuracy")} for line in lines])
    assert printed(capsys, runs) == text == printed(capsys, runs, "--metric", "accuracy")
    assert "80.0 ± 0.0" in text


def test_of_several_draws_the_one_with_the_lowest_loss_is_reported(tmp_path, capsys):
    for draw, shift in enumerate((0.3, 0.1, 0.2)):
        write_scored(tmp_path, "photo", "erm", shift=shift, draw=draw)
    text = printed(capsys, tmp_path, "--metric", "nll", "--chosen")
    assert "then the best of 3 hyper-parameter draws, by the same nll" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("erm") and "r00" in line]
    assert row[4:] == ["0.6000", "r001", "0", "1", "3"]


def test_differences_count_lower_losses_as_better(runs, capsys):
    pytest.importorskip("scipy")
    text = printed(capsys, runs, "--metric", "nll", "--baseline", "vrex", "--ranks")
    assert "nll, lower is better, mean of the n pairs" in text
    (row,) = [line for line in text.splitlines() if line.startswith("erm") and "2/2" in line]
    assert row.split()[1:4] == ["-0.200", "[-0.200,", "-0.200]"]
    ranks = [line.split() for line in text.split("average rank")[1].splitlines()]
    assert ["erm", "1.00"] in ranks
    assert ["vrex", "2.00"] in ranks


def test_runs_that_have_not_recorded_the_metric_are_missing_with_the_setting_that_records_it(runs, capsys):
    text = printed(capsys, runs, "--metric", "ece")
    assert "missing: erm photo, art seeds 0, 1: done, but without ece in its records: " in text
    assert "trainer.metrics=[accuracy,ece] force=true runs it again with it (r000, " in text
    assert [line.split() for line in text.splitlines()][2] == ["erm", "-", "-", "-"]


def test_domainbeds_runs_have_accuracies_only_and_the_note_says_so(tmp_path, capsys):
    domainbed(tmp_path, [0], {0: [0.5] * 8, 300: [0.6] * 8})
    text = printed(capsys, tmp_path, "--metric", "nll")
    assert "done, but without nll in its records: DomainBed and the SWAD fork record the accuracy only" in text
    assert "force=true" not in text


def test_a_run_that_recorded_the_metric_at_some_steps_only_is_selected_among_them(tmp_path):
    folder = write_scored(tmp_path, "photo", "erm")
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    del lines[0]["scores"]
    write_lines(folder / "records.jsonl", lines)
    frame = read_runs(tmp_path, metric="nll")
    assert frame.records["step"].unique().tolist() == [10]
    assert summary(frame, ["training_domain"]).chosen["value"].tolist() == [0.9]


def test_values_that_no_loss_has_are_left_out_and_reported(tmp_path):
    folder = write_scored(tmp_path, "photo", "erm")
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    lines[1]["scores"]["nll"]["photo"]["in"] = float("nan")
    write_lines(folder / "records.jsonl", lines)
    frame = read_runs(tmp_path, metric="nll")
    assert frame.records.query("domain == 'photo' and part == 'in'")["step"].tolist() == [0]
    assert ("r000", "nll of photo in at step 10 is nan, not a number of 0 or more: left out") in frame.problems


def test_averaged_weights_have_their_own_scores(tmp_path):
    folder = write_scored(tmp_path, "photo", "erm")
    content = json.loads((folder / "config.json").read_text())
    content["trainer"]["averaging"] = {"name": "ema"}
    (folder / "config.json").write_text(json.dumps(content))
    scores = {"nll": {"photo": {"in": 0.05}}}
    write_lines(folder / "averaged.jsonl", [{"step": 10, "accuracy": {"photo": {"in": 1.0}}, "scores": scores}])
    records = read_runs(tmp_path, metric="nll").records
    assert records.loc[records["algorithm"] == "erm+ema", "value"].tolist() == [0.05]


def test_the_default_frame_holds_accuracies_and_no_larger_than_without_scores(runs):
    records = read_runs(runs).records
    assert set(records["value"]) == {0.6, 0.8}
    for path in runs.glob("*/records.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write_lines(path, [{key: line[key] for key in ("step", "accuracy")} for line in lines])
    pd.testing.assert_frame_equal(read_runs(runs).records, records)
    assert list(records) == list(read_runs(runs, metric="nll").records)


def test_an_unknown_metric_and_the_papers_results_of_another_one_are_refused(runs, capsys):
    with pytest.raises(UserError, match="--metric: 'loss' is no metric. Valid: accuracy, balanced_accuracy"):
        read_runs(runs, metric="loss")
    assert main([str(runs), "--metric", "nll", "--published"]) == 2
    assert "--published: the paper has accuracies only, not nll" in capsys.readouterr().err


def test_csv_is_not_scaled(runs, capsys):
    text = printed(capsys, runs, "--metric", "nll", "--format", "csv")
    assert "toy,erm,training_domain,photo,0.550000,0.035355,2" in text


def test_the_page_and_the_figures_show_the_metric(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from gsdg.analysis.figures import best_methods, curves, pairs

    results = summary(frame := read_runs(runs, metric="nll"), ["training_domain"])
    assert best_methods(results, "toy")[0] == ["erm", "vrex"]  # the lowest first
    axes = curves(frame, results, "toy", "erm").figure().axes[0]
    assert axes.get_ylabel() == "nll"
    target = next(line for line in axes.lines if "target" in str(line.get_label()))
    assert target.get_ydata().tolist() == pytest.approx([0.55, 0.95])
    scatter = pairs(results, "vrex").figure().axes[0]
    assert scatter.get_xlabel() == "nll of vrex"
    assert "erm better in 4 of 4" in scatter.get_title().replace("\n", " ")
    main(["report", str(runs), "-o", str(tmp_path / "page"), "--metric", "nll"])
    page = (tmp_path / "page" / "index.html").read_text()
    assert "0.550 ± 0.035" in page
    assert "average 0.550 by training_domain" in page
    assert METRICS["nll"].explained in page
