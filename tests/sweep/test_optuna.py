"""hydra/sweeper=optuna: the space, the objective, a search on digits, and one that is interrupted and goes on."""

from __future__ import annotations

import json

import pytest
from helpers import SMALL, Launcher
from hydra.core.override_parser.overrides_parser import OverridesParser

from gsdg.plan import prepare
from gsdg.sweep import optuna_search
from gsdg.sweep.folder import all_sweeps
from gsdg.sweep.objective import selection_value
from gsdg.sweep.optuna_search import RUNS, Space, open_study
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_lines, write_json

optuna = pytest.importorskip("optuna")
BASE = [word for word in SMALL if not word.startswith("split.target")]
WORDS = (
    *BASE,
    "trainer.steps=2",
    "trainer.evaluate=fast",
    "algorithm=erm",
    "split.target=60",
    "split.trial_seed=0,1",
    "optimizer.lr=tag(log,interval(1e-4,1e-2))",
    "model.dropout=0.0,0.5",
    "hydra/sweeper=optuna",
)


def space(*words: str) -> Space:
    return Space.of(OverridesParser.create().parse_overrides(list(words)))


def test_intervals_ranges_and_lists_are_searched_and_targets_and_seeds_are_repeated():
    found = space(
        "a=1", "lr=tag(log,interval(1e-5,1e-3))", "n=int(interval(1,10))", "k=range(1,7,2)", "c=x,y",
        "split.target=p,q", "seed=0,1",
    )  # fmt: skip
    assert found.distributions() == {
        "lr": optuna.distributions.FloatDistribution(1e-5, 1e-3, log=True),
        "n": optuna.distributions.IntDistribution(1, 10),
        "k": optuna.distributions.IntDistribution(1, 5, step=2),
        "c": optuna.distributions.CategoricalDistribution(["x", "y"]),
    }
    jobs = found.jobs({"lr": 0.1, "c": "x"})
    assert jobs == [
        ["a=1", f"split.target={target}", f"seed={seed}", "lr=0.1", "c=x"] for target in "pq" for seed in (0, 1)
    ]


def test_a_key_that_is_given_twice_counts_once_and_a_study_belongs_to_its_space():
    assert space("a=1", "a=2", "c=x,y").fixed == ["a=2"]
    names = {
        space("a=1", "c=x,y").name("training_domain"),
        space("a=2", "c=x,y").name("training_domain"),
        space("a=1", "c=x,z").name("training_domain"),
        space("a=1", "c=x,y", "seed=0,1").name("training_domain"),
        space("a=1", "c=x,y").name("oracle"),
    }
    assert len(names) == 5
    assert space("a=1", "b=2", "c=x,y").name("oracle") == space("b=2", "a=1", "c=x,y").name("oracle")


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(UserError, match="searches nothing"):
        space("a=1", "split.target=p,q")
    with pytest.raises(UserError, match="targets and seeds are repeated, so list them: seed=0,1,2"):
        space("seed=interval(0,3)", "c=x,y")
    with pytest.raises(UserError, match=r"k=range\(3,3\) has no values"):
        space("k=range(3,3)").distributions()


def record(**accuracy: float | None) -> dict:
    """A record with these held-out accuracies; None: nothing is held out."""
    return {
        "step": 0,
        "accuracy": {name: {"in": 0.1} | ({} if v is None else {"out": v}) for name, v in accuracy.items()},
    }


def test_the_objective_is_the_sources_best_held_out_mean_or_the_targets_last_one(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "config.json", {"split": {"target": "t"}})
    lines = [record(a=0.5, b=0.7, t=0.1), record(a=0.9, b=0.5, t=0.2), record(a=0.6, b=0.5, t=0.4)]
    (run / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(run / "status.json", {"state": "done"})
    assert selection_value(run, "training_domain") == pytest.approx(0.7)
    assert selection_value(run, "oracle") == pytest.approx(0.4)
    (run / "records.jsonl").write_text(json.dumps(record(a=None, b=None, t=None)) + "\n")
    assert selection_value(run, "training_domain") is None
    assert selection_value(run, "oracle") is None
    write_json(run / "status.json", {"state": "failed"})
    assert selection_value(run, "training_domain") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra.sweeper.objective=target"], "hydra.sweeper.objective: found 'target'; valid: training_domain, oracle"),
        (["hydra.sweeper.sampler=grid"], "hydra.sweeper.sampler: found 'grid'; valid: tpe, random"),
        (["hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials: found 0, expected 1 or more"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_made(launch_here, tmp_path, words, message):
    done = launch_here("-m", *WORDS, *words, f"runs_dir={tmp_path / 'runs'}")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "runs" / ".sweeps" / "optuna").exists()


def study_of(tmp_path):
    (journal,) = (tmp_path / "runs" / ".sweeps" / "optuna").glob("*.log")
    return open_study(journal.parent, journal.stem, sampler="random", seed=0)


def test_a_search_makes_the_runs_of_its_trials_and_the_same_command_goes_on_with_it(launch_here, tmp_path, compose):
    words = ("-m", *WORDS, f"runs_dir={tmp_path / 'runs'}")
    done = launch_here(*words, "hydra.sweeper.n_trials=2")
    assert done.returncode == 0, done.stderr
    trials = study_of(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    for trial in trials:
        values = [f"{key}={value}" for key, value in trial.params.items()]
        fixed = [
            word for word in WORDS if not word.startswith(("hydra", "split.trial", "optimizer.lr", "model.dropout"))
        ]
        plans = [prepare(compose(*fixed, *values, f"split.trial_seed={seed}")) for seed in (0, 1)]
        assert trial.user_attrs[RUNS] == [plan.run_id for plan in plans]
        found = [selection_value(tmp_path / "runs" / plan.run_id, "training_domain") for plan in plans]
        assert trial.value == pytest.approx(sum(found) / 2)
    best = max(trials, key=lambda trial: trial.value)
    assert f"best of 2 draws: {best.value:.4f}" in done.stdout
    again = launch_here(*words, "hydra.sweeper.n_trials=3")
    assert again.returncode == 0, again.stderr
    assert "goes on: it has 2 draws" in again.stdout
    later = study_of(tmp_path).trials
    assert [trial.params for trial in later[:2]] == [trial.params for trial in trials]
    assert len(later) == 3
    assert later[2].params not in [trial.params for trial in trials]


def test_an_interrupted_trial_is_made_again_with_its_values_and_its_finished_runs_are_not(
    launch_here, tmp_path, monkeypatch
):
    words = ("-m", *WORDS, "hydra.sweeper.n_trials=2", f"runs_dir={tmp_path / 'runs'}")
    with monkeypatch.context() as broken:
        broken.setattr(optuna_search.Search, "_tell", interrupted)
        launch_here(*words)
    (begun,) = study_of(tmp_path).trials
    assert begun.state.name == "RUNNING"
    starts = {run: len(read_lines(run / "environment.jsonl")) for run in (tmp_path / "runs").iterdir()}
    done = launch_here(*words)
    assert done.returncode == 0, done.stderr
    failed, repeated, more = study_of(tmp_path).trials
    assert [trial.state.name for trial in (failed, repeated, more)] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert repeated.params == begun.params
    assert {run: len(read_lines(run / "environment.jsonl")) for run in starts} == starts
    assert done.stdout.count("done already") == 2


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_trial_whose_run_fails_has_no_result_and_the_search_goes_on(launch_here, tmp_path, monkeypatch):
    monkeypatch.setattr("gsdg.experiment.train", broken_training)
    done = launch_here("-m", *WORDS, "hydra.sweeper.n_trials=2", f"runs_dir={tmp_path / 'runs'}")
    assert [trial.state.name for trial in study_of(tmp_path).trials] == ["FAIL", "FAIL"]
    assert "no draw of 2 has a result" in done.stdout
    assert "draw 1 has no result" in done.stdout


@pytest.mark.slow
def test_two_draws_at_a_time_through_the_local_launcher_are_sweeps_of_their_own(tmp_path):
    launcher = Launcher(tmp_path / "runs")
    search = ("hydra/launcher=local", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2")
    done = launcher("-m", *WORDS, *search)
    assert done.returncode == 0, done.stderr
    trials = study_of(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    sizes = sorted(len(sweep.runs()) for sweep in all_sweeps(tmp_path / "runs"))
    assert sizes == [2, 4], "two rounds: two draws with two seeds, then one"
    assert done.stdout.count("optimizer.lr=") >= 3, "the table at the end has the runs of all rounds"


def broken_training(*arguments: object) -> None:
    raise RuntimeError("broken by the test")
