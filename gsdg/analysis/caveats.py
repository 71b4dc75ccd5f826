"""Notes below a table: its runs were not all made, or not all selected, in the same way."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from gsdg.analysis.formats import few
from gsdg.analysis.read.frames import Runs
from gsdg.analysis.read.gsdg_runs import read_environment
from gsdg.analysis.read.run import printable
from gsdg.analysis.selection import as_text, groups
from gsdg.utils.errors import plural

COMPARED = {"code": ("code",), "torch": ("packages", "torch"), "device": ("device",)}  # name: keys in environment.jsonl
MOST_VALUES = 4  # shown in one note


def caveats(runs: Runs, draws: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The notes for each table: columns dataset, selection, note.

    Args:
        draws: {selection: the frame of `selection.every_draw`}, the runs that the tables are made of.
    """
    environments: dict[str, list[dict]] = {}  # {folder: its starts}, read only once for all selections
    rows = []
    for selection, frame in draws.items():
        status = runs.status[runs.status["run_id"].isin(frame["run_id"])]
        for (dataset,), of_dataset in groups(status, "dataset"):
            notes = _different_environments(of_dataset, environments)
            notes += _sources_not_held_out(runs, of_dataset) if selection == "training_domain" else []
            rows += [(dataset, selection, note) for note in notes]
    return pd.DataFrame(rows, columns=["dataset", "selection", "note"])


def _different_environments(status: pd.DataFrame, environments: dict[str, list[dict]]) -> list[str]:
    """One note that lists what differs between the runs' environments, or [] if nothing does.

    DomainBed's runs are not compared, since they record no environment.
    """
    folders = status.loc[status["source"] == "gsdg", "folder"].unique()
    environments |= {folder: read_environment(folder) for folder in folders if folder not in environments}
    counts_of = {
        name: Counter(_recorded(environments[folder], keys) for folder in folders) for name, keys in COMPARED.items()
    }
    differing = {
        name: counts
        for name, counts in counts_of.items()
        if len(counts) > 1 or any(len(values) > 1 for values in counts)  # several values: one run was resumed elsewhere
    }
    listed = "; ".join(f"{name} ({_format_counts(counts)})" for name, counts in differing.items())
    return [f"note: these results were made with different {listed}"] * bool(differing)


def _format_counts(counts: Counter[tuple[str, ...]]) -> str:
    """`2.14.1: 8 runs, 2.15.0: 4 runs, not noted: 1 run`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (not item[0], -item[1]))
    return few([f"{', then '.join(values) or 'not noted'}: {plural(n, 'run')}" for values, n in ordered], MOST_VALUES)


def _recorded(starts: list[dict], keys: tuple[str, ...]) -> tuple[str, ...]:
    """The distinct values that the starts of one run have recorded under nested `keys`, in order; () if none has."""
    values: list = list(starts)
    for key in keys:
        values = [value.get(key) if isinstance(value, dict) else None for value in values]
    return tuple(dict.fromkeys(printable(str(value)) for value in values if value is not None))


def _sources_not_held_out(runs: Runs, status: pd.DataFrame) -> list[str]:
    """A note for each source domain without `out` values: training-domain validation leaves it out of its mean."""
    records = runs.records
    held_out = records.loc[(records["part"] == "out") & ~records["is_target"], ["run_id", "domain"]].drop_duplicates()
    domains = as_text(held_out).groupby("run_id")["domain"].agg(set).to_dict()
    lacking = Counter(
        domain
        for run in status.to_dict("records")
        for domain in run["domains"]
        if domain not in run["targets"] and domain not in domains.get(run["run_id"], ())
    )
    by = f"the other sources' held-out {runs.metric.name}"
    return [
        f"note: nothing is held out of {domain}: {plural(n, 'run')} selected by {by}" for domain, n in lacking.items()
    ]
