"""Pruning: which runs of a search end early, what they leave behind, and what the study is told."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers import SMALL, only_run, records_without_time, status

from gsdg.analysis.__main__ import main
from gsdg.callbacks import Callback, WatchedRun
from gsdg.experiment import run
from gsdg.plan import prepare
from gsdg.sweep import pruning
from gsdg.sweep.objective import value_until
from gsdg.sweep.optuna_search import open_study
from gsdg.sweep.pruning import MedianPruner
from gsdg.utils.json_files import read_json, write_json
from gsdg.utils.stop_signals import StopRun

MINE = {"split": {"target": ["t"], "trial_seed": 0}, "seed": 0}


def made(folder: Path, values: list[float], config: dict = MINE) -> Path:
    """A run whose held-out accuracy had these values at the steps 0, 10, 20, ..."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    lines = [{"step": 10 * i, "accuracy": {"a": {"out": value}, "t": {"out": 0.9}}} for i, value in enumerate(values)]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def pruner(tmp_path: Path, others: list[list[float]], *, after: int = 0, config: dict = MINE) -> MedianPruner:
    names = [made(tmp_path / f"other{i}", values, config).name for i, values in enumerate(others)]
    write_json(tmp_path / "ended.json", {"runs": names})
    return MedianPruner(ended=str(tmp_path / "ended.json"), objective="training_domain", after=after)


def verdicts(watching: MedianPruner, tmp_path: Path, values: list[float]) -> list[int]:
    """The steps at which it would stop a run with these values."""
    mine, stopped = WatchedRun(made(tmp_path / "mine", values), MINE), []
    for i in range(len(values)):
        try:
            watching.evaluation(mine, {"step": 10 * i})
        except StopRun as reason:
            stopped.append(int(str(reason).removeprefix("pruned at step ").split(":")[0]))
    return stopped


OTHERS = [[0.1, 0.5, 0.9], [0.2, 0.5, 0.9], [0.3, 0.4, 0.9], [0.4, 0.6, 0.9], [0.5, 0.2, 0.9]]  # best: .5 .5 .4 .6 .5


def test_a_run_is_compared_with_the_median_of_the_best_values_up_to_the_same_step(tmp_path):
    """At step 10 the best values of the others are 0.4, 0.5, 0.5, 0.5, 0.6; later ones do not count."""
    assert verdicts(pruner(tmp_path, OTHERS), tmp_path, [0.3, 0.49, 0.95]) == [10]


def test_the_best_value_of_the_run_counts_and_an_equal_one_goes_on(tmp_path):
    assert verdicts(pruner(tmp_path, OTHERS), tmp_path, [0.5, 0.1, 0.1]) == [20]


def test_runs_before_the_step_are_not_stopped(tmp_path):
    assert verdicts(pruner(tmp_path, OTHERS, after=20), tmp_path, [0.0, 0.0, 0.0]) == [20]


def test_four_runs_are_too_few_and_runs_of_other_seeds_or_targets_are_no_comparison(tmp_path):
    assert verdicts(pruner(tmp_path / "few", OTHERS[:4]), tmp_path / "few", [0.0]) == []
    for name, other in {
        "seed": MINE | {"seed": 1},
        "target": MINE | {"split": {"target": ["a"], "trial_seed": 0}},
    }.items():
        assert verdicts(pruner(tmp_path / name, OTHERS, config=other), tmp_path / name, [0.0]) == []


# ---- runs -----------------------------------------------------------------------------------------------------------


class EndsAt(Callback):
    """Ends the run at this step."""

    def __init__(self, *, at: int) -> None:
        self.at = at

    def evaluation(self, run, record):
        if record["step"] == self.at:
            raise StopRun("enough of it")


RUN = (*SMALL, "trainer.steps=30", "trainer.checkpoint_every=4", "algorithm=erm")


def test_a_callback_ends_a_run_which_can_go_on_without_it(compose, tmp_path, users_class, caplog):
    caplog.set_level("INFO")
    target = users_class(EndsAt)["_target_"]
    ending = [f"+callbacks.mine._target_={target}", "+callbacks.mine.at=16"]
    run(prepare(compose(*RUN, *ending)))
    folder = only_run(tmp_path / "runs")
    assert (status(folder)["state"], status(folder)["reason"]) == ("stopped", "enough of it")
    assert "stopped: enough of it" in (folder / "log.txt").read_text()
    assert [record["step"] for record in records_without_time(folder)] == [0, 8, 16]
    run(prepare(compose(*RUN)))
    run(prepare(compose(*RUN, f"runs_dir={tmp_path / 'whole'}")))
    assert status(folder)["state"] == "done"
    assert records_without_time(folder) == records_without_time(only_run(tmp_path / "whole"))


WORDS = (
    *SMALL,
    "trainer.steps=17",
    "algorithm=erm",
    "optimizer.lr=1e-9,1e-2",
    "hydra/sweeper=optuna",
    "hydra.sweeper.sampler=random",
    "hydra.sweeper.n_trials=6",
    "hydra.sweeper.prune_after=8",
)


def test_a_search_stops_runs_that_learn_nothing_and_tells_the_study(launch_here, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    monkeypatch.setattr(pruning, "FEWEST", 1)
    runs_dir = tmp_path / "runs"
    done = launch_here("-m", *WORDS, f"runs_dir={runs_dir}")
    assert done.returncode == 0, done.stderr
    (journal,) = (runs_dir / ".sweeps" / "optuna").glob("*.log")
    trials = open_study(journal.parent, journal.stem, sampler="random", seed=0).trials
    assert trials[0].params["optimizer.lr"] == "0.01", "the first draw has nothing to be compared with"
    assert {trial.state.name for trial in trials if trial.params["optimizer.lr"] == "0.01"} == {"COMPLETE"}
    pruned = [trial for trial in trials if trial.params["optimizer.lr"] == "1e-09"]
    assert pruned
    for trial in pruned:
        assert trial.state == optuna.trial.TrialState.PRUNED
        folder = runs_dir / trial.user_attrs["runs"][0]
        assert status(folder)["state"] == "stopped"
        assert status(folder)["reason"].startswith("pruned at step 8: its selection value ")
        assert trial.intermediate_values == {9: pytest.approx(value_until(folder, "training_domain"))}
        assert read_json(folder / "config.json")["callbacks"]["pruner"]["after"] == 8
    assert f"({len(pruned)} more were pruned)" in done.stdout


def test_the_table_at_the_end_has_one_row_and_the_recommended_command_prints_it(launch, capsys):
    """algorithm.n_parts is a short name of the command line; the runs have algorithm.partition.n_parts."""
    pytest.importorskip("optuna")
    words = [word for word in WORDS if not word.startswith(("algorithm=", "hydra.sweeper.n_trials"))]
    done = launch("-m", *words, "algorithm.n_parts=1,2", "hydra.sweeper.n_trials=2", "trainer.steps=1")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("grad_surgery ")]
    assert len(rows) == 1
    (command,) = [line for line in done.stdout.splitlines() if line.startswith("table: python -m analysis ")]
    assert main(shlex.split(command)[4:]) == 0
    assert rows[0] in capsys.readouterr().out
    more = launch("-m", *words, "algorithm.n_parts=1,2", "hydra.sweeper.n_trials=3", "trainer.steps=1")
    assert "read: 3 runs" in more.stdout, "the table shows the runs of the first start too, each once"
