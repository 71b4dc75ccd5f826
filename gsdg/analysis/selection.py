"""Model selection: the records of runs -> one chosen (draw, step) a repetition. Pure, on `frames.Runs.finished()`.

Source: DomainBed's model_selection.py; `oracle_best` is the SWAD fork's. Two choices are made one after the other: of
each run its step, then, among the hyper-parameter draws of one repetition (dataset, algorithm, target, trial seed,
seed), the draw with the best validation accuracy, of equal ones the last. Whatever picks them, the accuracy reported
is the target's `in` split at that step.
Deviation: a record that was written twice counts once, as its last version; DomainBed looks at both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

REPETITION = ["dataset", "algorithm", "target", "trial_seed", "seed"]
DRAW = [*REPETITION, "hparams_seed"]
CHOSEN = [*DRAW, "run_id", "step", "accuracy", "validation"]


def training_domain(records: pd.DataFrame) -> pd.DataFrame:
    """The first step with the highest mean `out` accuracy of the sources. Steps that lack a source do not count.

    A source without `out` accuracies at any step is left out of the mean; the tables name it (`caveats`).
    """
    return choose(every_draw(records, "training_domain"), "training_domain")


def leave_one_domain_out(records: pd.DataFrame) -> pd.DataFrame:
    """The first step with the highest mean, over the sources v, of v's `in` accuracy in the run that leaves out v too.

    Needs, beside the run with the one target, the runs with it and each source as targets, at the same draw and step.
    """
    return choose(every_draw(records, "leave_one_domain_out"), "leave_one_domain_out")


def oracle(records: pd.DataFrame) -> pd.DataFrame:
    """DomainBed's: the last step. validation is the target's `out`, which is seen only once a draw."""
    return choose(every_draw(records, "oracle"), "oracle")


def oracle_best(records: pd.DataFrame) -> pd.DataFrame:
    """The SWAD fork's: the first step with the highest `out` accuracy of the target."""
    return choose(every_draw(records, "oracle_best"), "oracle_best")


def last(records: pd.DataFrame) -> pd.DataFrame:
    """The last step of the lowest draw (0: the defaults). validation is NaN: nothing was looked at."""
    return choose(every_draw(records, "last"), "last")


def every_draw(records: pd.DataFrame, selection: str) -> pd.DataFrame:
    """A row (CHOSEN) a run, the step chosen but no draw yet. `selection`: one of METHODS."""
    picked = PICKED[selection](records)
    reported = records[records["is_target"] & (records["part"] == "in")]
    joined = reported.merge(picked[["run_id", "step", "validation"]], on=["run_id", "step"])
    return joined[CHOSEN].sort_values(CHOSEN[:7]).reset_index(drop=True)


def choose(draws: pd.DataFrame, selection: str) -> pd.DataFrame:
    """Of each repetition's draws the one with the best validation accuracy; of equal ones the last, as in DomainBed.

    `last` looks at nothing: the lowest draw.
    """
    ordered = draws.sort_values("hparams_seed", kind="stable")
    ordered = ordered[::-1] if selection == "last" else ordered.sort_values("validation", kind="stable")
    return ordered.drop_duplicates(REPETITION, keep="last").sort_values(CHOSEN[:7]).reset_index(drop=True)


METHODS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "training_domain": training_domain,
    "leave_one_domain_out": leave_one_domain_out,
    "oracle": oracle,
    "oracle_best": oracle_best,
    "last": last,
}
EXPLAINED = {
    "training_domain": "the step with the best mean held-out accuracy of the source domains",
    "leave_one_domain_out": "the step with the best mean accuracy on each source when it is left out of training too",
    "oracle": "DomainBed's: the last step (the target may be looked at once)",
    "oracle_best": "the SWAD fork's: the step with the best held-out accuracy of the target",
    "last": "the last step, nothing selected",
}


def _sources(records: pd.DataFrame) -> pd.DataFrame:
    held_out = records[(records["n_targets"] == 1) & ~records["is_target"] & (records["part"] == "out")]
    steps = _means(held_out)
    return _first_maximum(steps[steps["n"] == steps.groupby("run_id")["n"].transform("max")])


def _pairs(records: pd.DataFrame) -> pd.DataFrame:
    single = records[records["n_targets"] == 1]
    sources = single[~single["is_target"]].groupby("run_id")["domain"].nunique()
    steps = _means(pair_validations(records))
    return _first_maximum(steps[steps["n"] == steps["run_id"].map(sources)])


def pair_validations(records: pd.DataFrame) -> pd.DataFrame:
    """run_id, step (of a run with one target), domain (a source), accuracy (its `in` in the run that lacks it too)."""
    left_out = records[(records["n_targets"] == 2) & records["is_target"] & (records["part"] == "in")]
    other = left_out[["run_id", "step", "domain"]].rename(columns={"domain": "its_target"})
    pairs = left_out.merge(other, on=["run_id", "step"])
    pairs = pairs[pairs["domain"] != pairs["its_target"]].assign(target=lambda rows: rows["its_target"])
    single = records[(records["n_targets"] == 1) & records["is_target"] & (records["part"] == "in")]
    joined = single[["run_id", "step", *DRAW]].merge(
        pairs[["step", *DRAW, "domain", "accuracy"]], on=["step", *DRAW], validate="one_to_many"
    )
    order = {domain: number for number, domain in enumerate(records["domain"].unique())}
    return joined.sort_values(["run_id", "step", "domain"], key=lambda c: c.map(order) if c.name == "domain" else c)


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """run_id, step, validation (the mean of the accuracies, in the order of their rows), n (their number).

    numpy's mean, as DomainBed takes it: pandas' rounds otherwise, and may tell steps apart that are equal there.
    """
    groups = rows.groupby(["run_id", "step"], sort=False)
    sizes, group = groups["accuracy"].transform("size"), groups.ngroup()
    found = [rows[["run_id", "step"]].iloc[:0].assign(validation=0.0, n=0)]
    for n in sizes.unique():
        block = rows[sizes == n].iloc[np.argsort(group[sizes == n].to_numpy(), kind="stable")]
        means = block["accuracy"].to_numpy().reshape(-1, n).mean(axis=1)
        found.append(block[["run_id", "step"]].iloc[::n].assign(validation=means, n=n))
    return pd.concat(found, ignore_index=True)


def _target(records: pd.DataFrame, part: str) -> pd.DataFrame:
    """run_id, step and the target's accuracy on `part`, as validation."""
    wanted = (records["n_targets"] == 1) & records["is_target"] & (records["part"] == part)
    return records.loc[wanted, ["run_id", "step", "accuracy"]].rename(columns={"accuracy": "validation"})


def _first_maximum(steps: pd.DataFrame) -> pd.DataFrame:
    ordered = steps.sort_values("step", kind="stable").sort_values("validation", ascending=False, kind="stable")
    return ordered.drop_duplicates("run_id")


def _last_step(records: pd.DataFrame) -> pd.DataFrame:
    return records[records["step"] == records.groupby("run_id")["step"].transform("max")]


# What picks a run's step: records -> run_id, step, validation.
PICKED: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "training_domain": _sources,
    "leave_one_domain_out": _pairs,
    "oracle": lambda records: _target(_last_step(records), "out"),
    "oracle_best": lambda records: _first_maximum(_target(records, "out")),
    "last": lambda records: _target(_last_step(records), "in").assign(validation=float("nan")),
}
