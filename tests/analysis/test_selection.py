"""Each selection method against its definition, on runs written out by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from analysis.frames import RECORDS
from analysis.selection import CHOSEN, EXPLAINED, METHODS, last, oracle, oracle_best, training_domain

# step: (a out, b out, target in, target out); a and b are the sources, c the target
CURVE = {
    0: (0.2, 0.4, 0.10, 0.50),
    5: (0.9, 0.5, 0.20, 0.80),  # sources 0.7
    9: (0.6, 0.8, 0.30, 0.80),  # sources 0.7 again
    10: (0.1, 0.9, 0.40, 0.60),
}


def frame(curve: dict, *, run_id="r", target="c", n_targets=1, trial_seed=0, seed=0, without=()) -> pd.DataFrame:
    run = [run_id, "toy", "erm", "convnet", target, n_targets, trial_seed, seed]
    rows = [
        [*run, step, domain, part, value]
        for step, values in curve.items()
        for (domain, part), value in zip([("a", "out"), ("b", "out"), ("c", "in"), ("c", "out")], values, strict=True)
        if (step, domain, part) not in without
    ]
    return pd.DataFrame(rows, columns=RECORDS)


@pytest.mark.parametrize(
    ("method", "step", "accuracy", "validation"),
    [(training_domain, 5, 0.2, 0.7), (oracle, 10, 0.4, 0.6), (oracle_best, 5, 0.2, 0.8), (last, 10, 0.4, math.nan)],
)
def test_a_method_picks_its_step_and_reports_the_targets_in_accuracy(method, step, accuracy, validation):
    chosen = method(frame(CURVE))
    assert list(chosen.columns) == CHOSEN
    assert chosen[["run_id", "step", "accuracy"]].values.tolist() == [["r", step, accuracy]]
    assert chosen["validation"].tolist() == pytest.approx([validation], nan_ok=True)


@pytest.mark.parametrize("method", [training_domain, oracle_best])
def test_of_equal_steps_the_first_is_chosen_in_whatever_order_they_come(method):
    for order in ([5, 9], [9, 5]):
        assert method(frame({step: CURVE[step] for step in order}))["step"].tolist() == [5]


def test_the_targets_own_accuracy_does_not_steer_training_domain_selection():
    curve = {0: (0.5, 0.5, 0.1, 0.1), 5: (0.4, 0.4, 0.9, 1.0)}
    assert training_domain(frame(curve))["step"].tolist() == [0]


def test_a_sources_in_accuracy_does_not_steer_training_domain_selection():
    records = frame({0: (0.5, 0.5, 0.1, 0.1), 5: (0.4, 0.4, 0.9, 0.9)})
    more = records[records["domain"] == "a"].assign(part="in", accuracy=[0.0, 1.0])
    assert training_domain(pd.concat([records, more]))["step"].tolist() == [0]


def test_a_step_that_lacks_a_source_is_not_compared_with_whole_ones():
    assert training_domain(frame(CURVE, without=[(5, "b", "out")]))["step"].tolist() == [9]


def test_each_run_has_its_own_choice_and_every_seed_is_a_run():
    other = {0: (0.9, 0.9, 0.7, 0.7), 3: (0.1, 0.1, 0.8, 0.8)}
    records = pd.concat([frame(CURVE), frame(other, run_id="s", seed=1), frame(other, run_id="t", trial_seed=1)])
    found = training_domain(records)[["trial_seed", "seed", "run_id", "step", "accuracy"]].values.tolist()
    assert found == [[0, 0, "r", 5, 0.2], [0, 1, "s", 0, 0.7], [1, 0, "t", 0, 0.7]]
    assert last(records)["step"].tolist() == [10, 3, 3]


@pytest.mark.parametrize("name", METHODS)
def test_runs_with_several_targets_and_empty_records_choose_nothing(name):
    several = frame(CURVE, target="c", n_targets=2)
    assert len(METHODS[name](several)) == 0
    empty = METHODS[name](frame({}))
    assert (len(empty), list(empty.columns)) == (0, CHOSEN)


@pytest.mark.parametrize("method", [oracle, last])
def test_the_last_step_is_the_runs_not_the_last_that_has_what_is_needed(method):
    assert len(method(frame(CURVE, without=[(10, "c", "in"), (10, "c", "out")]))) == 0


def test_every_method_is_explained():
    assert set(EXPLAINED) == set(METHODS)
