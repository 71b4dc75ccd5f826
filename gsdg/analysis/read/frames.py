"""Run folders -> tidy frames: ours, DomainBed's and those in the SWAD fork's dialect, in one table.

Nothing on disk is fatal here but a folder that is not there: half-written, foreign and broken files are left out and
reported in `Runs.problems`, because a table is wanted most while a sweep is running or after one has gone wrong.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.filters import filtered
from analysis.labels import as_draws, label
from analysis.ours import read_run
from analysis.peers import mark_draws, number_seeds, read_results
from analysis.run import Evaluations, NotARun, Run, printable, read_json_lines
from gsdg.errors import UserError

RUN = [
    "run_id", "source", "dataset", "algorithm", "model", "target", "n_targets", "trial_seed", "seed", "hparams_seed",
]  # fmt: skip
STATUS = [*RUN, "state", "step", "steps", "reason", "domains", "targets", "drawn", "folder"]
RECORDS = [*RUN, "step", "domain", "is_target", "part", "accuracy"]
DEPTH = 3  # folders below the one that is given: train_output/PACS/<run> of the SWAD fork needs two
MARKS = {"config.json": "ours", "results.jsonl": "peers"}


@dataclass(frozen=True)
class Runs:
    """What is on disk.

    `status`: a row a run (columns STATUS). source is gsdg, domainbed or swad. state is running, done, failed, stopped
    (by a signal: it saved itself), dead (running, but without a heartbeat), unfinished (a peer's, without its mark) or
    unknown; reason is "" where none is noted; domains is the tuple of the dataset's domains in order, () where its
    config does not name them; drawn is what a hyper-parameter search has drawn, as text.
    `records`: a row per run, step, domain and part (columns RECORDS); accuracy is a fraction.
    `problems`: (folder, what was left out and why).
    `configs`: run_id -> {dotted key: value as JSON}; `methods`: that part of it which the runs of one method share.
    `options`: the arguments of `read_runs` that were given beside the folders.
    A run with several targets has them joined by "+" in `target`; names may hold a "+": ask `targets`.
    """

    records: pd.DataFrame
    status: pd.DataFrame
    problems: tuple[tuple[str, str], ...]
    configs: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    methods: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    options: dict[str, list[str]] = field(default_factory=dict)

    def finished(self, *, unfinished: bool = False) -> pd.DataFrame:
        """The records of the runs that are done: what selection looks at. `unfinished`: of the others too."""
        done = self.status.loc[self.status["state"] == "done", "run_id"]
        return self.records if unfinished else self.records[self.records["run_id"].isin(done)]

    def settings(self, **keys: str) -> pd.DataFrame:
        """A row a run: run_id and, for each name=dotted_key, the value in its config (None where it has none)."""
        found = {name: [_value(config.get(key)) for config in self.configs.values()] for name, key in keys.items()}
        return pd.DataFrame({"run_id": list(self.configs), **found})


def read_runs(
    folders: str | Path | Sequence[str | Path],
    run_ids: Iterable[str] | None = None,
    draws: Sequence[str] = (),
    where: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Runs:
    """Read every run in and below `folders` (one or several), or only `run_ids`. UserError if one is not there.

    draws: config keys in whose values the runs of a method may differ, as hyper-parameter draws to select from.
    where, exclude: conditions `key=value` on the runs' configs, see `filters.filtered`. The methods' labels are made
    from the runs that are left.
    """
    roots = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    problems: list[tuple[str, str]] = []
    places = Places()
    runs = list(_every_run(roots, None if run_ids is None else set(run_ids), places, problems))
    mark_draws(runs)
    runs = filtered(runs, where, exclude, problems)
    if draws and runs:
        as_draws(runs, draws)
    label(runs)
    number_seeds(runs)
    runs = _named(_without_copies(runs, places, problems), problems)
    problems += [(run.facts["run_id"], what) for run in runs for what in run.problems]
    status = pd.DataFrame([run.facts for run in runs], columns=STATUS)
    configs = {run.facts["run_id"]: run.config for run in runs}
    methods = {run.facts["run_id"]: run.method for run in runs}
    given = {"draws": list(draws), "where": list(where), "exclude": list(exclude)}
    options = {name: values for name, values in given.items() if values}
    return Runs(_records(status, runs, places), status, tuple(problems), configs, methods, options)


def read_config(folder: str | Path) -> dict[str, str]:
    """The config of a run's folder, flat, {dotted key: value as JSON}. UserError if it is no run's."""
    path = Path(folder)
    kind = _kind(path)
    try:
        if not kind:
            raise NotARun("neither config.json nor results.jsonl in it")
        return _read(path, kind)[-1].config
    except NotARun as reason:
        raise UserError(f"{folder} is not a run: {reason}.\nGive a run's folder, for example: runs/<run_id>") from None


def read_diagnostics(folder: str | Path, levels: Sequence[str] | None = None) -> pd.DataFrame:
    """diagnostics.jsonl of one run: a row per step, granularity (`level`) and module, a column per statistic.

    `frame[frame.level == "chunk"].pivot(index="module", columns="step", values="conflict_rate")` is a heat map. Empty
    where the run wrote none (algorithm.diagnostics=false); a line that cannot be read is left out.
    """
    rows: list[dict] = []

    def take(line: dict) -> None:
        for level, modules in line["levels"].items():
            for module, values in modules.items() if levels is None or level in levels else []:
                named = dict(zip(line["statistics"], values, strict=True))
                rows.append({"step": line["step"], "level": level, "module": module, **named})

    read_json_lines(Path(folder) / "diagnostics.jsonl", take)
    return pd.DataFrame(rows, columns=None if rows else ["step", "level", "module"])


def diagnostics(runs: Runs, levels: Sequence[str] = ("chunk",)) -> pd.DataFrame:
    """`read_diagnostics` of all runs, with the columns RUN and steps before them."""
    found = []
    for row in runs.status[runs.status["source"] == "gsdg"].to_dict("records"):
        if Path(row["folder"]).name != Path(row["run_id"]).name:
            continue  # averaged weights: their gradients are the run's
        frame = read_diagnostics(row["folder"], levels)
        if len(frame):
            found.append(frame.assign(**{key: row[key] for key in [*RUN, "steps"]}))
    order = [*RUN, "steps", "step", "level", "module"]
    both = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=order)
    return both[[*order, *(column for column in both.columns if column not in order)]]


def _every_run(roots: Sequence[Path], run_ids: set[str] | None, places: Places, problems: list) -> Iterator[Run]:
    """The runs in order of their folders; `problems` is told why folders are left out, and which ids are nowhere."""
    for root in roots:
        if not root.is_dir():
            raise UserError(f"no folder of runs at {root}.\nGive the runs_dir of a training, for example: runs")
    missing = set(run_ids or ())
    for folder, kind in (one for root in roots for one in _folders(root, run_ids, problems)):
        missing.discard(folder.name)
        try:
            found = _read(folder, kind)
        except NotARun as reason:
            problems.append((folder.name, str(reason)))
            continue
        for run in found:
            run.columns, run.evaluations = places.columns(run.evaluations), {}
            yield run
    problems += [(name, "no such run") for name in sorted(missing)]


def _folders(root: Path, run_ids: Iterable[str] | None, problems: list) -> Iterator[tuple[Path, str]]:
    """The run folders and their kind; `problems` is told of those in which nothing is found."""
    if run_ids is not None:
        for name in sorted(run_ids):
            if kind := _kind(root / name):
                yield root / name, kind
    elif kind := _kind(root):
        yield root, kind
    else:
        for folder in _below(root):
            yield from _search(folder, DEPTH - 1, problems)


def _search(folder: Path, depth: int, problems: list) -> Iterator[tuple[Path, str]]:
    if kind := _kind(folder):
        yield folder, kind
        return
    found = [run for inner in _below(folder) for run in _search(inner, depth - 1, [])] if depth else []
    if not found:
        problems.append((folder.name, "neither config.json nor results.jsonl: not a run"))
    yield from found


def _kind(folder: Path) -> str | None:
    return next((kind for mark, kind in MARKS.items() if os.path.exists(folder / mark)), None)


def _below(folder: Path) -> list[Path]:
    try:
        entries = os.listdir(folder)
    except OSError:  # gone by now, or not ours to read
        return []
    return [folder / name for name in sorted(entries) if not name.startswith(".") and os.path.isdir(folder / name)]


def _read(folder: Path, kind: str) -> list[Run]:
    """The runs of one folder, the folder's name as their id; of several with the target, or the averaging, after it."""
    runs = read_run(folder) if kind == "ours" else read_results(folder)
    for run in runs:
        if kind == "peers":
            run.facts["run_id"] = folder.name if len(runs) == 1 else f"{folder.name}:{run.facts['target']}"
        run.facts["folder"] = str(folder)
        run.facts |= {key: printable(value) for key, value in run.facts.items() if isinstance(value, str)}
    return runs


def _without_copies(runs: list[Run], places: Places, problems: list[tuple[str, str]]) -> list[Run]:
    """Without runs that repeat another (a folder copied by hand): twice, they would make a standard error too small.

    One that repeats it with other results is named with both folders, once for all runs of the same two folders.
    """
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(run.facts[column] for column in RUN[1:])].append(run)
    copies = set()
    examples: dict[tuple[Path, Path], str] = {}
    for members in groups.values():
        first, *others = sorted(members, key=_poorer) if len(members) > 1 else members
        for run in others:
            copies.add(id(run))
            example = places.contradiction(first, run)
            if example:
                pair = Path(first.facts["folder"]).parent, Path(run.facts["folder"]).parent
                example = examples.setdefault(pair, example)
            problems.append((run.facts["run_id"], _repeats(run, first, example)))
    return [run for run in runs if id(run) not in copies]


def _poorer(run: Run) -> tuple[bool, bool]:
    """Of copies the one that is done stays, then the one that has diagnostics."""
    return run.facts["state"] != "done", not (Path(run.facts["folder"]) / "diagnostics.jsonl").exists()


def _repeats(run: Run, first: Run, example: str) -> str:
    """Why `run` is left out beside `first`. example: where their results differ."""
    draw, values = run.facts["hparams_seed"], run.facts["drawn"]
    if values != first.facts["drawn"]:
        return f"draw {draw} with other values ({values}) than in {first.facts['run_id']}: left out"
    same = run.facts.get("averaging") == first.facts.get("averaging")
    equal = f"same {'config' if same else 'training'} as another run"
    return f"{equal}, but other results: {example}" if example else f"{equal}: counted once"


def _named(runs: list[Run], problems: list[tuple[str, str]]) -> list[Run]:
    """Runs of different configs that have the same id, in different folders, get the folder into their id."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.facts["run_id"]].append(run)
    for name, members in groups.items():
        for run in members if len(members) > 1 else []:
            run.facts["run_id"] = f"{Path(run.facts['folder']).parent}/{name}"
        if len(members) > 1:
            problems.append((name, f"{len(members)} different configs have this id: read as runs of their own"))
    return runs


class Places:
    """Numbers the (domain, part)s seen, so that a run's evaluations are three columns of numbers and no longer dicts.

    A quarter of a million nested dicts, kept until the frame is made, would keep the garbage collector busy.
    """

    def __init__(self) -> None:
        self.codes: dict[tuple[str, str], int] = {}

    def columns(self, evaluations: Evaluations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(steps, codes, accuracies) in order of steps."""
        steps, codes, values = [], [], []
        for step, accuracy in sorted(evaluations.items()):
            for domain, parts in accuracy.items():
                for part, value in parts.items():
                    steps.append(step)
                    codes.append(self.codes.setdefault((domain, part), len(self.codes)))
                    values.append(value)
        return np.array(steps, dtype=int), np.array(codes, dtype=int), np.array(values, dtype=float)

    def contradiction(self, first: Run, other: Run) -> str:
        """The last accuracy that two runs have recorded differently, the target's `in` before others; "" if none.

        `photo in at step 300 is 81.2 % in runs/1fd86c56df2d (counted), 80.9 % in old/1fd86c56df2d`
        """
        recorded, by_other = (
            {(step, code): value for step, code, value in zip(*run.columns, strict=True)} for run in (first, other)
        )
        different = [place for place in recorded.keys() & by_other.keys() if recorded[place] != by_other[place]]
        if not different:
            return ""
        reported = {self.codes.get((target, "in")) for target in first.facts["targets"]}
        step, code = place = max(different, key=lambda place: (place[1] in reported, *place))
        what = f"{' '.join(list(self.codes)[code])} at step {step}"
        counted = f"{100 * recorded[place]:.6g} % in {first.facts['folder']} (counted)"
        return f"{what} is {counted}, {100 * by_other[place]:.6g} % in {other.facts['folder']}"


def _records(status: pd.DataFrame, runs: Sequence[Run], places: Places) -> pd.DataFrame:
    """One frame at the end: a frame a run would take most of the time."""
    nothing = (np.array([], dtype=int), np.array([], dtype=int), np.array([], dtype=float))
    every = [nothing, *(run.columns for run in runs)]
    steps, codes, values = (np.concatenate(columns) for columns in zip(*every, strict=True))
    rows = np.repeat(np.arange(len(runs)), [len(run.columns[0]) for run in runs])
    is_target = np.array([[domain in run.facts["targets"] for domain, _ in places.codes] for run in runs], dtype=bool)
    domains, parts = (pd.Series([place[i] for place in places.codes], dtype="str") for i in (0, 1))
    records = status[RUN].iloc[rows].reset_index(drop=True)
    records["step"], records["domain"] = steps, domains.take(codes).array
    records["is_target"] = is_target[rows, codes] if len(codes) else np.array([], dtype=bool)
    records["part"], records["accuracy"] = parts.take(codes).array, values
    return records


def _value(text: str | None) -> object:
    return None if text is None else json.loads(text)
