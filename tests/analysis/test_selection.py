"""Each selection method against its definition, on runs written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from analysis.frames import RECORDS
from analysis.selection import (
    CHOSEN,
    EXPLAINED,
    METHODS,
    PICKED,
    choose,
    every_draw,
    last,
    leave_one_domain_out,
    oracle,
    oracle_best,
    training_domain,
)

# step: (a out, b out, target in, target out); a and b are the sources, c the target
CURVE = {
    0: (0.2, 0.4, 0.10, 0.50),
    5: (0.9, 0.5, 0.20, 0.80),  # sources 0.7
    9: (0.6, 0.8, 0.30, 0.80),  # sources 0.7 again
    10: (0.1, 0.9, 0.40, 0.60),
}
PLACES = [("a", "out"), ("b", "out"), ("c", "in"), ("c", "out")]


def frame(curve: dict, *, run_id="r", target="c", trial_seed=0, seed=0, draw=0, places=PLACES, without=()):
    """Records of one run; target: names joined by "+"; curve: {step: a value for each of `places`}."""
    targets = target.split("+")
    run = [run_id, "gsdg", "toy", "erm", "convnet", target, len(targets), trial_seed, seed, draw]
    rows = [
        [*run, step, domain, domain in targets, part, value]
        for step, values in curve.items()
        for (domain, part), value in zip(places, values, strict=True)
        if (step, domain, part) not in without
    ]
    columns = {column: [row[number] for row in rows] for number, column in enumerate(RECORDS)}
    return pd.DataFrame(columns).astype({"is_target": bool, "accuracy": float, "step": int, "n_targets": int})


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
    several = frame(CURVE, target="c+a")
    assert len(METHODS[name](several)) == 0
    empty = METHODS[name](frame({}))
    assert (len(empty), list(empty.columns)) == (0, CHOSEN)


@pytest.mark.parametrize("method", [oracle, last])
def test_the_last_step_is_the_runs_not_the_last_that_has_what_is_needed(method):
    assert len(method(frame(CURVE, without=[(10, "c", "in"), (10, "c", "out")]))) == 0


def test_equal_means_are_told_apart_as_numpy_does_and_not_as_pandas():
    """DomainBed takes numpy's mean in the domains' order: 0.1 + 0.2 + 0.3 is more there than 0.3 + 0.2 + 0.1."""
    assert np.mean([0.1, 0.2, 0.3]) > np.mean([0.3, 0.2, 0.1])
    places = [("a", "out"), ("b", "out"), ("c", "out"), ("d", "in")]
    curve = {0: (0.3, 0.2, 0.1, 0.5), 5: (0.1, 0.2, 0.3, 0.5)}
    assert training_domain(frame(curve, target="d", places=places))["step"].tolist() == [5]


# ---- hyper-parameter draws ------------------------------------------------------------------------------------------


def flat_curve(source: float, target_in: float, target_out: float) -> dict:
    return {0: (source, source, target_in, target_out)}


def test_of_several_draws_the_one_with_the_best_validation_is_reported():
    draws = pd.concat(
        [
            frame(flat_curve(0.5, 0.11, 0.9), run_id="d0", draw=0),
            frame(flat_curve(0.8, 0.22, 0.7), run_id="d1", draw=1),
            frame(flat_curve(0.6, 0.33, 0.8), run_id="d2", draw=2),
        ]
    )
    assert training_domain(draws)[["hparams_seed", "accuracy"]].values.tolist() == [[1, 0.22]]
    assert oracle(draws)[["hparams_seed", "accuracy"]].values.tolist() == [[0, 0.11]]
    assert len(every_draw(draws, "training_domain")) == 3


@pytest.mark.parametrize("name", ["training_domain", "oracle", "oracle_best"])
@pytest.mark.parametrize("order", [(2, 0, 10), (10, 2, 0), (0, 10, 2)])
def test_of_equal_draws_the_one_with_the_highest_number_is_reported(name, order):
    """DomainBed sorts by validation, ascending and stable, reverses, and takes the first: 10 comes after 2."""
    runs = [frame(flat_curve(0.5, draw / 100, 0.5), run_id=f"run{draw}", draw=draw) for draw in order]
    assert METHODS[name](pd.concat(runs))["hparams_seed"].tolist() == [10]


def test_the_draws_may_come_in_any_order():
    draws = every_draw(pd.concat([frame(CURVE, run_id=f"run{draw}", draw=draw) for draw in (0, 2, 10)]), "oracle")
    assert choose(draws.iloc[::-1], "oracle")["hparams_seed"].tolist() == [10]


def test_each_trial_chooses_its_own_draw():
    runs = [
        frame(flat_curve(value, value / 2, value), run_id=f"{trial}{draw}", trial_seed=trial, draw=draw)
        for trial, draw, value in [(0, 0, 0.9), (0, 1, 0.2), (1, 0, 0.3), (1, 1, 0.4)]
    ]
    chosen = training_domain(pd.concat(runs))
    assert chosen[["trial_seed", "hparams_seed", "accuracy"]].values.tolist() == [[0, 0, 0.45], [1, 1, 0.2]]


def test_without_selection_the_lowest_draw_is_reported():
    runs = [frame(flat_curve(0.9, draw / 10, 0.9), run_id=f"run{draw}", draw=draw) for draw in (3, 1, 2)]
    assert last(pd.concat(runs))[["hparams_seed", "accuracy"]].values.tolist() == [[1, 0.1]]


# ---- leave one domain out -------------------------------------------------------------------------------------------

IN = [("a", "in"), ("b", "in"), ("c", "in")]


def sweep(**curves) -> pd.DataFrame:
    """Runs by their targets, `c`, `c_a` (c and a): {step: `in` of a, b, c}."""
    every = {"target": "c", "places": IN}
    runs = [
        frame(curve, **(every | {"target": name.replace("_", "+"), "run_id": name})) for name, curve in curves.items()
    ]
    return pd.concat(runs, ignore_index=True)


def test_leave_one_domain_out_takes_the_left_out_sources_accuracy_in_the_pair_runs():
    records = sweep(
        c={0: (1.0, 1.0, 0.10), 5: (1.0, 1.0, 0.20), 9: (1.0, 1.0, 0.30)},
        a_c={0: (0.2, 0, 0.9), 5: (0.8, 0, 0.9), 9: (0.3, 0, 0.9)},  # a is what counts for the target c
        b_c={0: (0, 0.4, 0.9), 5: (0, 0.3, 0.9), 9: (0, 0.6, 0.9)},
    )
    chosen = leave_one_domain_out(records)
    assert chosen[["target", "run_id", "step", "accuracy"]].values.tolist() == [["c", "c", 5, 0.20]]
    assert chosen["validation"].tolist() == pytest.approx([(0.8 + 0.3) / 2])


def test_a_pair_run_serves_both_of_its_targets():
    curve = {0: (0.1, 0.2, 0.3)}
    records = sweep(a=curve, b=curve, c=curve, a_b={0: (0.5, 0.6, 0)}, a_c={0: (0.7, 0, 0.8)}, b_c={0: (0, 0.9, 1.0)})
    chosen = leave_one_domain_out(records).set_index("target")
    assert chosen["validation"].to_dict() == pytest.approx(
        {"a": (0.6 + 0.8) / 2, "b": (0.5 + 1.0) / 2, "c": (0.7 + 0.9) / 2}
    )
    assert chosen["accuracy"].to_dict() == {"a": 0.1, "b": 0.2, "c": 0.3}


def test_without_one_of_its_pairs_a_target_has_no_cell():
    curve = {0: (0.1, 0.2, 0.3)}
    assert len(leave_one_domain_out(sweep(c=curve, a_c=curve))) == 0
    assert leave_one_domain_out(sweep(c=curve, a_c=curve, b_c=curve))["target"].tolist() == ["c"]


def test_only_steps_that_all_the_runs_recorded_count():
    records = sweep(
        c={0: (0, 0, 0.1), 5: (0, 0, 0.2), 9: (0, 0, 0.3)},
        a_c={0: (0.5, 0, 0), 5: (0.6, 0, 0), 9: (0.9, 0, 0)},
        b_c={0: (0, 0.5, 0), 5: (0, 0.6, 0)},  # stopped early
    )
    assert leave_one_domain_out(records)[["step", "accuracy"]].values.tolist() == [[5, 0.2]]


def test_of_equal_steps_leave_one_domain_out_takes_the_first():
    records = sweep(
        c={0: (0, 0, 0.1), 5: (0, 0, 0.2)},
        a_c={0: (0.25, 0, 0), 5: (0.75, 0, 0)},
        b_c={0: (0, 0.75, 0), 5: (0, 0.25, 0)},
    )
    assert leave_one_domain_out(records)["step"].tolist() == [0]


@pytest.mark.parametrize("other", [{"draw": 1}, {"trial_seed": 1}, {"seed": 1}])
def test_pairs_of_another_draw_or_repetition_are_not_this_ones(other):
    curve = {0: (0.1, 0.2, 0.3)}
    pairs = [frame(curve, target=f"{v}+c", run_id=v, places=IN, **other) for v in "ab"]
    assert len(leave_one_domain_out(pd.concat([frame(curve, places=IN), *pairs]))) == 0
    pairs = [frame(curve, target=f"{v}+c", run_id=v, places=IN) for v in "ab"]
    assert len(leave_one_domain_out(pd.concat([frame(curve, places=IN), *pairs]))) == 1


def test_every_method_picks_and_is_explained():
    assert set(METHODS) == set(PICKED) == set(EXPLAINED)
