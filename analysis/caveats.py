"""What a reader of a table should know of its runs: where they were not all made, or selected, in the same way."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from analysis.formats import few
from analysis.frames import Runs
from analysis.ours import read_environment
from gsdg.errors import plural

COMPARED = {"code": ("code",), "torch": ("packages", "torch"), "device": ("device",)}  # name: where a start notes it
NAMED = 4  # values in one note


def caveats(runs: Runs, draws: pd.DataFrame, selection: str) -> pd.DataFrame:
    """Columns dataset, note. draws: `selection.every_draw`, the runs that the numbers were selected from."""
    status = runs.status[runs.status["run_id"].isin(draws["run_id"])]
    rows = [
        (dataset, note)
        for dataset, of_dataset in status.groupby("dataset", sort=False)
        for note in [*_made_differently(of_dataset), *_not_held_out(runs, of_dataset, selection)]
    ]
    return pd.DataFrame(rows, columns=["dataset", "note"])


def _made_differently(status: pd.DataFrame) -> list[str]:
    """One note of all that differs between the runs' starts; none where nothing does. DomainBed's runs note nothing."""
    folders = status.loc[status["source"] == "gsdg", "folder"].unique()
    starts = [read_environment(folder) for folder in folders]
    counted = {name: Counter(_noted(of_run, path) for of_run in starts) for name, path in COMPARED.items()}
    differing = {
        name: counts
        for name, counts in counted.items()
        if len(counts) > 1 or any(len(values) > 1 for values in counts)  # of one run: it was resumed elsewhere
    }
    said = "; ".join(f"{name} ({_counts(counts)})" for name, counts in differing.items())
    return [f"note: these results were made with different {said}"] * bool(differing)


def _counts(counts: Counter[tuple[str, ...]]) -> str:
    """`2.14.1: 8 runs, 2.15.0: 4 runs, not noted: 1 run`."""
    ordered = sorted(counts.items(), key=lambda item: (not item[0], -item[1]))
    return few([f"{', then '.join(values) or 'not noted'}: {plural(n, 'run')}" for values, n in ordered], NAMED)


def _noted(starts: list[dict], path: tuple[str, ...]) -> tuple[str, ...]:
    """What the starts of a run note at `path`, one after the other, repetitions left out; () where none does."""
    values: list = list(starts)
    for key in path:
        values = [value.get(key) if isinstance(value, dict) else None for value in values]
    return tuple(dict.fromkeys(str(value) for value in values if value is not None))


def _not_held_out(runs: Runs, status: pd.DataFrame, selection: str) -> list[str]:
    """Sources without `out` accuracies: training-domain validation takes the mean of the others."""
    if selection != "training_domain":
        return []
    rows = runs.records[runs.records["run_id"].isin(status["run_id"])]
    held_out = set(rows[rows["part"] == "out"].groupby(["run_id", "domain"]).groups)
    sources = [
        (run.run_id, domain)
        for run in status.itertuples()
        for domain in run.domains or rows.loc[rows["run_id"] == run.run_id, "domain"].unique()
        if domain not in run.targets
    ]
    lacking = Counter(domain for run_id, domain in sources if (run_id, domain) not in held_out)
    return [
        f"note: nothing is held out of {domain}: {plural(n, 'run')} selected by the other sources' held-out accuracy"
        for domain, n in lacking.items()
    ]
