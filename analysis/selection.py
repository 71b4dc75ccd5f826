"""Model selection: the records of runs -> one chosen step a run. Pure functions on `frames.Runs.finished()`.

Source: DomainBed's model_selection.py; `oracle_best` is the SWAD fork's. Whatever picks the step, the accuracy
reported is the target's `in` split at that step. Runs with several targets are left out.
Deviation: no choice among hyper-parameter draws: here every config is a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

CHOSEN = ["dataset", "algorithm", "target", "trial_seed", "seed", "run_id", "step", "accuracy", "validation"]


def training_domain(records: pd.DataFrame) -> pd.DataFrame:
    """The first step with the highest mean `out` accuracy of the sources. Steps that lack a source do not count."""
    single = records[records["n_targets"] == 1]
    held_out = single[(single["part"] == "out") & (single["domain"] != single["target"])]
    steps = held_out.groupby(["run_id", "step"])["accuracy"].agg(validation="mean", sources="size").reset_index()
    whole = steps[steps["sources"] == steps.groupby("run_id")["sources"].transform("max")]
    return _at(_first_maximum(whole), records)


def oracle(records: pd.DataFrame) -> pd.DataFrame:
    """DomainBed's: the last step. validation is the target's `out`, which is seen only once."""
    return _at(_target(_last_step(records), "out"), records)


def oracle_best(records: pd.DataFrame) -> pd.DataFrame:
    """The SWAD fork's: the first step with the highest `out` accuracy of the target."""
    return _at(_first_maximum(_target(records, "out")), records)


def last(records: pd.DataFrame) -> pd.DataFrame:
    """The last step. validation is NaN: nothing was looked at."""
    return _at(_target(_last_step(records), "in").assign(validation=float("nan")), records)


METHODS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "training_domain": training_domain,
    "oracle": oracle,
    "oracle_best": oracle_best,
    "last": last,
}
EXPLAINED = {
    "training_domain": "the step with the best mean held-out accuracy of the source domains",
    "oracle": "DomainBed's: the last step (the target may be looked at once)",
    "oracle_best": "the SWAD fork's: the step with the best held-out accuracy of the target",
    "last": "the last step, nothing selected",
}


def _target(records: pd.DataFrame, part: str) -> pd.DataFrame:
    """run_id, step and the target's accuracy on `part`, as validation."""
    wanted = (records["n_targets"] == 1) & (records["domain"] == records["target"]) & (records["part"] == part)
    return records.loc[wanted, ["run_id", "step", "accuracy"]].rename(columns={"accuracy": "validation"})


def _first_maximum(steps: pd.DataFrame) -> pd.DataFrame:
    ordered = steps.sort_values("step", kind="stable").sort_values("validation", ascending=False, kind="stable")
    return ordered.drop_duplicates("run_id")


def _last_step(records: pd.DataFrame) -> pd.DataFrame:
    return records[records["step"] == records.groupby("run_id")["step"].transform("max")]


def _at(picked: pd.DataFrame, records: pd.DataFrame) -> pd.DataFrame:
    """The rows (CHOSEN) that report the target's `in` accuracy at the picked (run_id, step)."""
    reported = records[(records["domain"] == records["target"]) & (records["part"] == "in")]
    joined = reported.merge(picked[["run_id", "step", "validation"]], on=["run_id", "step"])
    return joined[CHOSEN].sort_values(CHOSEN[:6]).reset_index(drop=True)
