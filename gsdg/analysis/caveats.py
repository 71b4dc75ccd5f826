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


def caveats(runs: Runs, draws: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Columns dataset, selection, note. draws: `selection.every_draw` of each selection, what its numbers are of."""
    environments: dict[str, list[dict]] = {}  # each is read once, for all selections
    rows = []
    for selection, frame in draws.items():
        status = runs.status[runs.status["run_id"].isin(frame["run_id"])]
        for dataset, of_dataset in status.groupby("dataset", sort=False):
            notes = _made_differently(of_dataset, environments)
            notes += _not_held_out(runs.records, of_dataset) if selection == "training_domain" else []
            rows += [(dataset, selection, note) for note in notes]
    return pd.DataFrame(rows, columns=["dataset", "selection", "note"])


def _made_differently(status: pd.DataFrame, environments: dict[str, list[dict]]) -> list[str]:
    """One note of all that differs between the runs' starts; none where nothing does. DomainBed's runs note nothing."""
    folders = status.loc[status["source"] == "gsdg", "folder"].unique()
    environments |= {folder: read_environment(folder) for folder in folders if folder not in environments}
    counted = {
        name: Counter(_noted(environments[folder], path) for folder in folders) for name, path in COMPARED.items()
    }
    differing = {
        name: counts
        for name, counts in counted.items()
        if len(counts) > 1 or any(len(values) > 1 for values in counts)  # of one run: it was resumed elsewhere
    }
    listed = "; ".join(f"{name} ({_counts(counts)})" for name, counts in differing.items())
    return [f"note: these results were made with different {listed}"] * bool(differing)


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


def _not_held_out(records: pd.DataFrame, status: pd.DataFrame) -> list[str]:
    """Sources without `out` accuracies, which training-domain validation leaves out of its mean."""
    held_out = records.loc[(records["part"] == "out") & ~records["is_target"], ["run_id", "domain"]].drop_duplicates()
    domains = held_out.groupby("run_id")["domain"].agg(set).to_dict()
    lacking = Counter(
        domain
        for run in status.itertuples()
        for domain in run.domains
        if domain not in run.targets and domain not in domains.get(run.run_id, ())
    )
    return [
        f"note: nothing is held out of {domain}: {plural(n, 'run')} selected by the other sources' held-out accuracy"
        for domain, n in lacking.items()
    ]
