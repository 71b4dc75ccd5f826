"""Each selection method against its definition, on runs written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from gsdg.analysis.read.frames import RECORDS
from gsdg.analysis.selection import (
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
from gsdg.metrics import METRICS

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
    return pd.DataFrame(columns).astype({"is_target": bool, "value": float, "step": int, "n_targets": int})


def values(chosen: pd.DataFrame, *columns: str) -> list[list]:
    return chosen[list(columns)].values.tolist()


@pytest.mark.parametrize(
    ("method", "step", "accuracy", "validation"),
    [(training_domain, 5, 0.2, 0.7), (oracle, 10, 0.4, 0.6), (oracle_best, 5, 0.2, 0.8), (last, 10, 0.4, math.nan)],
)
def test_a_method_picks_its_step_the_first_of_equal_ones_and_reports_the_targets_in_accuracy(
    method, step, accuracy, validation
):
    for order in (CURVE, reversed(CURVE)):
        chosen = method(frame({recorded: CURVE[recorded] for recorded in order}))
        assert list(chosen.columns) == CHOSEN
        assert values(chosen, "run_id", "step", "value") == [["r", step, accuracy]]
        assert chosen["validation"].tolist() == pytest.approx([validation], nan_ok=True)


def test_neither_the_targets_accuracy_nor_a_sources_in_accuracy_steers_training_domain_selection():
    records = frame({0: (0.5, 0.5, 0.1, 0.1), 5: (0.4, 0.4, 0.9, 1.0)})
    assert training_domain(records)["step"].tolist() == [0]
    inside = records[records["domain"] == "a"].assign(part="in", value=[0.0, 1.0])
    assert training_domain(pd.concat([records, inside]))["step"].tolist() == [0]


def test_the_test_images_of_a_target_are_reported_and_select_nothing():
    """Those of an official split. Of a target without such images its `in` images are reported, as of any target."""
    tested = [*PLACES, ("c", "test"), ("a", "test")]
    curve = {step: (*values_, step / 10, 1 - step / 10) for step, values_ in CURVE.items()}
    records = pd.concat([frame(curve, places=tested), frame(CURVE, run_id="s", seed=1)])
    for method, step in ((training_domain, 5), (oracle, 10), (oracle_best, 5), (last, 10)):
        assert values(method(records), "run_id", "value") == [["r", step / 10], ["s", CURVE[step][2]]]
    only_test = frame(curve, places=tested, without=[(step, "c", "in") for step in curve])
    assert values(training_domain(only_test), "step", "value") == [[5, 0.5]]


def test_leave_one_domain_out_validates_on_in_images_and_reports_test_images():
    places = [("b", "out"), ("c", "in"), ("c", "test")]
    single = frame({0: (0.0, 0.1, 0.6), 5: (0.0, 0.9, 0.7)}, places=places)
    pair = [("b", "in"), ("b", "test"), ("c", "in")]
    pairs = frame({0: (0.8, 0.0, 0.0), 5: (0.7, 1.0, 0.0)}, run_id="p", target="b+c", places=pair)
    assert values(leave_one_domain_out(pd.concat([single, pairs])), "run_id", "step", "value") == [["r", 0, 0.6]]


def test_a_step_that_lacks_a_source_is_not_compared_with_complete_ones():
    assert training_domain(frame(CURVE, without=[(5, "b", "out")]))["step"].tolist() == [9]


def test_each_run_has_its_own_choice_and_every_seed_is_a_run():
    other = {0: (0.9, 0.9, 0.7, 0.7), 3: (0.1, 0.1, 0.8, 0.8)}
    records = pd.concat([frame(CURVE), frame(other, run_id="s", seed=1), frame(other, run_id="t", trial_seed=1)])
    chosen = values(training_domain(records), "trial_seed", "seed", "run_id", "step", "value")
    assert chosen == [[0, 0, "r", 5, 0.2], [0, 1, "s", 0, 0.7], [1, 0, "t", 0, 0.7]]
    assert last(records)["step"].tolist() == [10, 3, 3]


def test_every_method_picks_is_explained_and_chooses_nothing_of_several_targets_and_empty_records():
    assert set(METHODS) == set(PICKED) == set(EXPLAINED)
    for name, method in METHODS.items():
        assert len(method(frame(CURVE, target="c+a"))) == 0, name
        empty = method(frame({}))
        assert (len(empty), list(empty.columns)) == (0, CHOSEN), name


def test_the_last_step_is_the_runs_not_the_last_that_has_what_is_needed():
    for method in (oracle, last):
        assert len(method(frame(CURVE, without=[(10, "c", "in"), (10, "c", "out")]))) == 0


def test_means_are_computed_with_numpys_rounding_and_not_with_pandas():
    """DomainBed takes numpy's mean in the domains' order: 0.1 + 0.2 + 0.3 is more there than 0.3 + 0.2 + 0.1."""
    assert np.mean([0.1, 0.2, 0.3]) > np.mean([0.3, 0.2, 0.1])
    places = [("a", "out"), ("b", "out"), ("c", "out"), ("d", "in")]
    curve = {0: (0.3, 0.2, 0.1, 0.5), 5: (0.1, 0.2, 0.3, 0.5)}
    assert training_domain(frame(curve, target="d", places=places))["step"].tolist() == [5]


# ---- hyper-parameter draws ------------------------------------------------------------------------------------------


def drawn(draw: int, source: float, target_in: float, target_out: float, trial_seed: int = 0) -> pd.DataFrame:
    """A run of one evaluation."""
    curve = {0: (source, source, target_in, target_out)}
    return frame(curve, run_id=f"{trial_seed}-{draw}", draw=draw, trial_seed=trial_seed)


def test_of_several_draws_the_one_with_the_best_validation_is_reported_and_without_selection_the_lowest():
    draws = pd.concat([drawn(3, 0.6, 0.33, 0.8), drawn(1, 0.5, 0.11, 0.9), drawn(2, 0.8, 0.22, 0.7)])
    for method, draw, accuracy in ((training_domain, 2, 0.22), (oracle, 1, 0.11), (last, 1, 0.11)):
        assert values(method(draws), "hparams_seed", "value") == [[draw, accuracy]]
    assert len(every_draw(draws, "training_domain")) == 3
    equal = pd.concat([drawn(draw, 0.9, draw / 10, 0.9) for draw in (3, 1, 2)])
    assert values(last(equal), "hparams_seed", "value") == [[1, 0.1]]


def test_of_equal_draws_the_one_with_the_highest_number_is_reported_in_whatever_order_they_come():
    """DomainBed sorts by validation, ascending and stable, reverses, and takes the first: 10 comes after 2."""
    for order in ((2, 0, 10), (10, 2, 0), (0, 10, 2)):
        records = pd.concat([drawn(draw, 0.5, draw / 100, 0.5) for draw in order])
        for name in ("training_domain", "oracle", "oracle_best"):
            assert METHODS[name](records)["hparams_seed"].tolist() == [10], (order, name)
            assert choose(every_draw(records, name).iloc[::-1], name)["hparams_seed"].tolist() == [10], (order, name)


def test_each_trial_chooses_its_own_draw():
    runs = [(0, 0, 0.9), (0, 1, 0.2), (1, 0, 0.3), (1, 1, 0.4)]
    chosen = training_domain(pd.concat([drawn(draw, value, value / 2, value, trial) for trial, draw, value in runs]))
    assert values(chosen, "trial_seed", "hparams_seed", "value") == [[0, 0, 0.45], [1, 1, 0.2]]


# ---- leave one domain out -------------------------------------------------------------------------------------------

IN = [("a", "in"), ("b", "in"), ("c", "in")]


def sweep(**curves) -> pd.DataFrame:
    """Runs by their targets, `c`, `c_a` (c and a): {step: `in` of a, b, c}."""
    runs = [frame(curve, target=name.replace("_", "+"), run_id=name, places=IN) for name, curve in curves.items()]
    return pd.concat(runs, ignore_index=True)


def test_leave_one_domain_out_takes_the_left_out_sources_accuracy_in_the_pair_runs():
    records = sweep(
        c={0: (1.0, 1.0, 0.10), 5: (1.0, 1.0, 0.20), 9: (1.0, 1.0, 0.30)},
        a_c={0: (0.2, 0, 0.9), 5: (0.8, 0, 0.9), 9: (0.3, 0, 0.9)},  # a is what counts for the target c
        b_c={0: (0, 0.4, 0.9), 5: (0, 0.3, 0.9), 9: (0, 0.6, 0.9)},
    )
    chosen = leave_one_domain_out(records)
    assert values(chosen, "target", "run_id", "step", "value") == [["c", "c", 5, 0.20]]
    assert chosen["validation"].tolist() == pytest.approx([(0.8 + 0.3) / 2])


def test_a_pair_run_serves_both_of_its_targets():
    curve = {0: (0.1, 0.2, 0.3)}
    records = sweep(a=curve, b=curve, c=curve, a_b={0: (0.5, 0.6, 0)}, a_c={0: (0.7, 0, 0.8)}, b_c={0: (0, 0.9, 1.0)})
    chosen = leave_one_domain_out(records).set_index("target")
    validation = {"a": (0.6 + 0.8) / 2, "b": (0.5 + 1.0) / 2, "c": (0.7 + 0.9) / 2}
    assert chosen["validation"].to_dict() == pytest.approx(validation)
    assert chosen["value"].to_dict() == {"a": 0.1, "b": 0.2, "c": 0.3}


def test_without_one_of_its_pairs_a_target_has_no_cell():
    curve = {0: (0.1, 0.2, 0.3)}
    assert len(leave_one_domain_out(sweep(c=curve, a_c=curve))) == 0
    assert leave_one_domain_out(sweep(c=curve, a_c=curve, b_c=curve))["target"].tolist() == ["c"]


def test_only_steps_that_all_the_runs_recorded_count_and_of_equal_ones_the_first():
    stopped_early = sweep(
        c={0: (0, 0, 0.1), 5: (0, 0, 0.2), 9: (0, 0, 0.3)},
        a_c={0: (0.5, 0, 0), 5: (0.6, 0, 0), 9: (0.9, 0, 0)},
        b_c={0: (0, 0.5, 0), 5: (0, 0.6, 0)},
    )
    assert values(leave_one_domain_out(stopped_early), "step", "value") == [[5, 0.2]]
    equal = sweep(
        c={0: (0, 0, 0.1), 5: (0, 0, 0.2)},
        a_c={0: (0.25, 0, 0), 5: (0.75, 0, 0)},
        b_c={0: (0, 0.75, 0), 5: (0, 0.25, 0)},
    )
    assert leave_one_domain_out(equal)["step"].tolist() == [0]


def test_pairs_of_another_draw_or_repetition_are_not_this_ones():
    curve = {0: (0.1, 0.2, 0.3)}
    for changes, cells in (({"draw": 1}, 0), ({"trial_seed": 1}, 0), ({"seed": 1}, 0), ({}, 1)):
        pairs = [frame(curve, target=f"{source}+c", run_id=source, places=IN, **changes) for source in "ab"]
        assert len(leave_one_domain_out(pd.concat([frame(curve, places=IN), *pairs]))) == cells, changes


# ---- metrics of which lower is better --------------------------------------------------------------------------------

NLL = METRICS["nll"]


def test_by_a_metric_of_which_lower_is_better_the_first_of_the_lowest_is_chosen():
    """CURVE's sources have the means 0.3, 0.7, 0.7, 0.5, its target's out 0.5, 0.8, 0.8, 0.6."""
    curve = CURVE | {3: (0.4, 0.2, 0.25, 0.5)}  # as low as step 0
    for order in (curve, reversed(curve)):
        records = frame({step: curve[step] for step in order})
        assert values(training_domain(records, NLL), "step", "value", "validation") == [[0, 0.1, pytest.approx(0.3)]]
        assert values(oracle_best(records, NLL), "step", "value", "validation") == [[0, 0.1, 0.5]]
        assert values(oracle(records, NLL), "step", "validation") == [[10, 0.6]]
        assert values(last(records, NLL), "step") == [[10]]
    assert training_domain(frame(CURVE), METRICS["balanced_accuracy"])["step"].tolist() == [5]


def test_by_such_a_metric_the_draw_with_the_lowest_validation_is_reported_the_last_of_equal_ones():
    draws = pd.concat([drawn(3, 0.6, 0.33, 0.8), drawn(1, 0.5, 0.11, 0.9), drawn(2, 0.8, 0.22, 0.7)])
    for method, draw in ((training_domain, 1), (oracle, 2), (last, 1)):
        assert values(method(draws, NLL), "hparams_seed") == [[draw]]
    for order in ((2, 0, 10), (10, 2, 0), (0, 10, 2)):
        equal = pd.concat([drawn(draw, 0.5, draw / 100, 0.5) for draw in order])
        assert training_domain(equal, NLL)["hparams_seed"].tolist() == [10]


def test_leave_one_domain_out_takes_the_step_with_the_lowest_mean_loss_on_the_left_out_sources():
    curves = {"c_a": {0: (0.1, 0, 0), 5: (0.9, 0, 0)}, "c_b": {0: (0, 0.2, 0), 5: (0, 0.8, 0)}}
    records = sweep(c={0: (0, 0, 0.3), 5: (0, 0, 0.4)}, **curves)
    assert values(leave_one_domain_out(records), "step") == [[5]]
    assert values(leave_one_domain_out(records, NLL), "step", "validation") == [[0, pytest.approx(0.15)]]
