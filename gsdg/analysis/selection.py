"""Model selection: chooses a step of each run, then a hyper-parameter draw. Pure functions of `Runs.finished()`.

1. Of each run, choose a step.
2. Of each repetition (dataset, algorithm, target, trial seed, seed), choose the hyper-parameter draw with the best
   validation value at its chosen step; of equal draws the last.

Whatever the selection, the reported value is the one on the target's `in` split at the chosen step, or on its `test`
images if the data set defines such (split=from_list). Validation and report are by the same metric, as in WILDS: by the
accuracy, or another that the records hold. The best value is the highest, or the lowest of a metric of which lower is
better.

Source: DomainBed's model_selection.py; `oracle_best` is the SWAD fork's.
Deviation: if a step was recorded twice, only its last record counts; DomainBed uses both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pandas as pd

from gsdg.metrics import ACCURACY, Metric

REPETITION = ["dataset", "algorithm", "target", "trial_seed", "seed"]
DRAW = [*REPETITION, "hparams_seed"]
CHOSEN = [*DRAW, "run_id", "step", "value", "validation"]


def training_domain(records: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Training-domain validation: the first step with the best mean of the source domains' `out` values.

    A source that has no `out` value at any step is left out of the mean, and a note below the table names it (see
    `caveats`). Steps that lack the value of another source are not considered.
    """
    return choose(every_draw(records, "training_domain", metric), "training_domain", metric)


def leave_one_domain_out(records: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Leave-one-domain-out cross-validation.

    The first step with the best mean over the source domains v of v's `in` value in the run that leaves out both
    the target and v. So it needs the runs with targets {target, v} for every source v, with the same seeds and draw;
    only steps that all of these runs have recorded are considered.
    """
    return choose(every_draw(records, "leave_one_domain_out", metric), "leave_one_domain_out", metric)


def oracle(records: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """DomainBed's oracle: the last step, validated by the target's `out` value. It is seen only once per draw."""
    return choose(every_draw(records, "oracle", metric), "oracle", metric)


def oracle_best(records: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """The SWAD fork's oracle: the first step with the best `out` value of the target."""
    return choose(every_draw(records, "oracle_best", metric), "oracle_best", metric)


def last(records: pd.DataFrame, metric: Metric = ACCURACY) -> pd.DataFrame:
    """No selection: the last step of the lowest draw (0: the default hyper-parameters). `validation` is NaN."""
    return choose(every_draw(records, "last", metric), "last", metric)


def every_draw(records: pd.DataFrame, selection: str, metric: Metric = ACCURACY) -> pd.DataFrame:
    """One row (columns CHOSEN) per run: the step is chosen, the draw is not. `selection`: a key of METHODS."""
    steps = PICKED[selection](records, metric)
    reported = records[is_reported(records)]
    joined = reported.merge(steps[["run_id", "step", "validation"]], on=["run_id", "step"])
    return as_text(joined[CHOSEN]).sort_values(CHOSEN[:7]).reset_index(drop=True)


def is_reported(records: pd.DataFrame) -> pd.Series:
    """[rows] bool: whether tables report this value: that of a target's `test` images, else of its `in` images."""
    is_in, is_test = (records["is_target"] & (records["part"] == part) for part in ("in", "test"))
    if not is_test.any():
        return is_in
    has_test = is_test.groupby([records["run_id"], records["domain"]], observed=True).transform("any")
    return is_test | (is_in & ~has_test)


def as_text(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with categorical columns as text. Categories save memory in `Runs.records`; few rows need none."""
    categories = rows.select_dtypes("category")
    return rows.astype({name: column.cat.categories.dtype for name, column in categories.items()})


def groups(rows: pd.DataFrame, *columns: str) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """(the values of `columns`, the rows that have them), in the order of first appearance."""
    for key, group in rows.groupby(list(columns), sort=False):
        yield cast("tuple[Any, ...]", key), group  # pandas annotates every key as Hashable


def choose(draws: pd.DataFrame, selection: str, metric: Metric = ACCURACY) -> pd.DataFrame:
    """Choose a draw of each repetition: the one with the best validation value, of equal ones the last.

    For the selection `last`, the lowest draw. `draws` is the frame that `every_draw` returns.
    """
    ordered = draws.sort_values("hparams_seed", kind="stable")
    if selection == "last":
        ordered = ordered[::-1]
    else:
        ordered = ordered.sort_values("validation", kind="stable", ascending=not metric.lower_is_better)
    return ordered.drop_duplicates(REPETITION, keep="last").sort_values(CHOSEN[:7]).reset_index(drop=True)


METHODS: dict[str, Callable[..., pd.DataFrame]] = {  # (records, metric=ACCURACY) -> columns CHOSEN
    "training_domain": training_domain,
    "leave_one_domain_out": leave_one_domain_out,
    "oracle": oracle,
    "oracle_best": oracle_best,
    "last": last,
}
EXPLAINED = {  # `explanation` has the name of another metric
    "training_domain": "the step with the best mean held-out accuracy of the source domains",
    "leave_one_domain_out": "the step with the best mean accuracy on each source when it is left out of training too",
    "oracle": "DomainBed's: the last step (the target is looked at only once per draw)",
    "oracle_best": "the SWAD fork's: the step with the best held-out accuracy of the target",
    "last": "the last step, nothing selected",
}


def explanation(selection: str, metric: Metric) -> str:
    """How the selection chooses a step by the metric."""
    return EXPLAINED[selection].replace("accuracy", metric.name)


# ---- choosing a step: records -> columns run_id, step, validation ---------------------------------------------------


def _best_on_sources(records: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    is_held_out = (records["n_targets"] == 1) & ~records["is_target"] & (records["part"] == "out")
    steps = _means(records.loc[is_held_out, ["run_id", "step", "value"]])
    return _first_best(steps[steps["n"] == steps.groupby("run_id", observed=True)["n"].transform("max")], metric)


def _best_on_left_out_sources(records: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    is_source = (records["n_targets"] == 1) & ~records["is_target"]
    domains = as_text(records.loc[is_source, ["run_id", "domain"]].drop_duplicates())
    sources = domains.groupby("run_id")["domain"].nunique()
    steps = _means(pair_validations(records))
    return _first_best(steps[steps["n"] == steps["run_id"].map(sources)], metric)


def pair_validations(records: pd.DataFrame) -> pd.DataFrame:
    """The values that leave-one-domain-out averages: columns run_id, step, domain, value.

    run_id is that of a run with one target, domain is one of its sources, value is the domain's `in` value in the
    run that leaves out both. The rows of one run and step are in the order of the domains.
    """
    # A run with two targets serves both: as the pair of target a it gives the value of b, and the other way round.
    is_in = records["is_target"] & (records["part"] == "in")
    left_out = as_text(records[(records["n_targets"] == 2) & is_in])
    other = left_out[["run_id", "step", "domain"]].rename(columns={"domain": "other_target"})
    pairs = left_out.merge(other, on=["run_id", "step"])
    pairs = pairs[pairs["domain"] != pairs["other_target"]].assign(target=lambda rows: rows["other_target"])

    single = as_text(records[(records["n_targets"] == 1) & is_reported(records)])
    joined = single[["run_id", "step", *DRAW]].merge(
        pairs[["step", *DRAW, "domain", "value"]], on=["step", *DRAW], validate="one_to_many"
    )
    order = {domain: number for number, domain in enumerate(records["domain"].unique())}
    return joined.sort_values(["run_id", "step", "domain"], key=lambda c: c.map(order) if c.name == "domain" else c)


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """The mean value of each run and step: columns run_id, step, validation (the mean), n (number of values).

    Uses numpy's mean over the rows in their order, as DomainBed does. pandas rounds differently, so that steps which
    are equal in DomainBed might differ here.
    """
    groups = rows.groupby(["run_id", "step"], sort=False, observed=True)
    sizes, group = groups["value"].transform("size"), groups.ngroup()
    means = [rows[["run_id", "step"]].iloc[:0].assign(validation=0.0, n=0)]
    for n in sizes.unique():  # groups of the same size are the rows of one matrix [groups, n]
        block = rows[sizes == n].iloc[np.argsort(group[sizes == n].to_numpy(), kind="stable")]
        validation = block["value"].to_numpy().reshape(-1, n).mean(axis=1)
        means.append(block[["run_id", "step"]].iloc[::n].assign(validation=validation, n=n))
    return pd.concat(means, ignore_index=True)


def _on_target(records: pd.DataFrame, part: str) -> pd.DataFrame:
    """Every step, with the target's value on `part` as validation."""
    wanted = (records["n_targets"] == 1) & records["is_target"] & (records["part"] == part)
    return records.loc[wanted, ["run_id", "step", "value"]].rename(columns={"value": "validation"})


def _first_best(steps: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Of each run the step with the best validation value, of equal steps the first."""
    ordered = steps.sort_values("step", kind="stable")
    ordered = ordered.sort_values("validation", ascending=metric.lower_is_better, kind="stable")
    return ordered.drop_duplicates("run_id")


def _last_steps(records: pd.DataFrame) -> pd.DataFrame:
    """The last step of each run with one target: columns run_id, step."""
    last = _last_step(records)
    return last.loc[(last["n_targets"] == 1) & is_reported(last), ["run_id", "step"]]


def _last_step(records: pd.DataFrame) -> pd.DataFrame:
    return records[records["step"] == records.groupby("run_id", observed=True)["step"].transform("max")]


# What chooses the step of each run, by selection.
PICKED: dict[str, Callable[[pd.DataFrame, Metric], pd.DataFrame]] = {
    "training_domain": _best_on_sources,
    "leave_one_domain_out": _best_on_left_out_sources,
    "oracle": lambda records, metric: _on_target(_last_step(records), "out"),
    "oracle_best": lambda records, metric: _first_best(_on_target(records, "out"), metric),
    "last": lambda records, metric: _last_steps(records).assign(validation=float("nan")),
}
