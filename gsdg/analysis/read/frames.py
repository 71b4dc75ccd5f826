"""Run folders -> pandas frames, of GSDG's, DomainBed's and the SWAD fork's runs together.

The only fatal error is a folder that does not exist. Half-written, foreign and damaged files are left out and reported
in `Runs.problems`, because a table is needed most while a sweep is running, or after it has failed.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gsdg.analysis.read.domainbed_runs import mark_draws, number_seeds, read_results
from gsdg.analysis.read.filters import filter_runs
from gsdg.analysis.read.gsdg_runs import read_run
from gsdg.analysis.read.labels import as_draws, label
from gsdg.analysis.read.run import NotARun, Reader, Run, printable, read_json_lines
from gsdg.metrics import ACCURACY, METRICS, Metric, check_metrics
from gsdg.utils.errors import UserError, listing
from gsdg.utils.progress import tracked

RUN = [
    "run_id", "source", "dataset", "algorithm", "model", "target", "n_targets", "trial_seed", "seed", "hparams_seed",
]  # fmt: skip
STATUS = [*RUN, "state", "step", "steps", "reason", "domains", "targets", "drawn", "folder"]
RECORDS = [*RUN, "step", "domain", "is_target", "part", "value"]
MAX_DEPTH = 3  # levels searched below a given folder; the SWAD fork's train_output/PACS/<run> needs two
READERS: dict[str, Reader] = {"config.json": read_run, "results.jsonl": read_results}  # by the file that marks a folder


@dataclass(frozen=True)
class Runs:
    """All runs that were read.

    Args:
        records: one row per run, step, domain and part (columns RECORDS); `part` is in, out or uda, `value` is that of
            the metric: an accuracy is in [0, 1]. A run that has not recorded the metric has no rows. Columns of text
            are categorical and integers are int32 if they fit: 38 bytes per row, not 170.
        status: one row per run (columns STATUS).
            source: gsdg, domainbed or swad.
            algorithm: the label of the run's method, see `labels.Method`.
            target: the target domain; of several, their names joined by "+". Names may contain a "+": `targets` is the
                tuple of names.
            state: running, done, failed, stopped (by a signal, after saving a checkpoint), dead (running, but without
                a recent heartbeat), unfinished (DomainBed or SWAD, no mark of its end) or unknown.
            reason: why it is in this state; "" if no reason was recorded.
            domains: the dataset's domains in order; () if the config does not name them.
            drawn: the values that a hyper-parameter search has drawn, as text.
        problems: (folder or run id, message) for everything that was left out or could not be read.
        configs: {run_id: {dotted key: value as JSON}}.
        method_settings: {run_id: the part of its config that all runs of its method share}.
        options: the arguments `draws`, `where`, `exclude` and `metric` of `read_runs`, if given.
        metric: the metric in `records`.
    """

    records: pd.DataFrame
    status: pd.DataFrame
    problems: tuple[tuple[str, str], ...]
    configs: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    method_settings: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    options: dict[str, object] = field(default_factory=dict)
    metric: Metric = ACCURACY

    def finished(self, *, unfinished: bool = False) -> pd.DataFrame:
        """The records of the runs that are done, the input of model selection. `unfinished`: of all runs."""
        done = self.status.loc[self.status["state"] == "done", "run_id"]
        return self.records if unfinished else self.records[self.records["run_id"].isin(done)]

    def settings(self, **keys: str) -> pd.DataFrame:
        """Values of the configs, one row per run: run_id, and for each `name=dotted_key` a column (None if unset)."""
        columns = {name: [_parse(config.get(key)) for config in self.configs.values()] for name, key in keys.items()}
        return pd.DataFrame({"run_id": list(self.configs), **columns})


def read_runs(
    folders: str | Path | Sequence[str | Path],
    run_ids: Iterable[str] | None = None,
    draws: Sequence[str] = (),
    where: Sequence[str] = (),
    exclude: Sequence[str] = (),
    metric: str = "accuracy",
) -> Runs:
    """Read all runs in and below one or several folders.

    Args:
        folders: folders of runs, or run folders.
        run_ids: read only these.
        draws: config keys. Runs that differ only in their values are hyper-parameter draws of one method.
        where: conditions `key=value` that the runs' configs must meet, see `filters.filter_runs`.
        exclude: conditions `key=value` that the runs' configs must not meet.
        metric: what to read, a key of `gsdg.metrics.METRICS`. Runs record the accuracy, and others if trainer.metrics
            lists them; DomainBed's runs have accuracies only.

    Labels distinguish the methods of the runs that are kept.

    Raises:
        UserError: none of the folders exists, a key or condition matches nothing, or there is no such metric.
    """
    check_metrics([metric], "--metric")
    roots = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    problems: list[tuple[str, str]] = []
    encoder = EvaluationEncoder(METRICS[metric])
    runs = list(_read_all(roots, None if run_ids is None else set(run_ids), encoder, problems))

    # Methods and their draws. DomainBed's draws are marked before runs are filtered, because a search is recognized by
    # its other draws; labels are made afterwards, because they distinguish only the methods that are left.
    mark_draws(runs)
    runs = filter_runs(runs, where, exclude, problems)
    if draws and runs:
        as_draws(runs, draws)
    label(runs)
    number_seeds(runs)

    runs = _make_ids_unique(_drop_copies(runs, encoder, problems), problems)
    problems += [(run.metadata["run_id"], message) for run in runs for message in run.problems]
    status = pd.DataFrame([run.metadata for run in runs], columns=STATUS)
    configs = {run.metadata["run_id"]: run.config for run in runs}
    method_settings = {run.metadata["run_id"]: run.settings for run in runs}
    arguments = {"draws": list(draws), "where": list(where), "exclude": list(exclude)}
    options: dict[str, object] = {name: values for name, values in arguments.items() if values}
    options |= {"metric": metric} if metric != "accuracy" else {}
    records = _records_frame(status, runs, encoder)
    return Runs(records, status, tuple(problems), configs, method_settings, options, METRICS[metric])


def read_config(folder: str | Path) -> dict[str, str]:
    """The config of one run folder, {dotted key: value as JSON}. UserError if the folder is not a run."""
    path = Path(folder)
    reader = _reader_of(path)
    try:
        if not reader:
            raise NotARun(f"neither {' nor '.join(READERS)} in it")
        return _read_folder(path, reader)[-1].config
    except NotARun as reason:
        raise UserError(f"{folder} is not a run: {reason}.\nGive a run's folder, for example: runs/<run_id>") from None


def read_diagnostics(folder: str | Path, levels: Sequence[str] | None = None) -> pd.DataFrame:
    """The diagnostics.jsonl of one run: one row per step, granularity (`level`) and module, one column per statistic.

    A heat map: `frame[frame.level == "chunk"].pivot(index="module", columns="step", values="conflict_rate")`. The frame
    is empty if the run wrote no diagnostics (algorithm.diagnostics=false). Lines that cannot be read are left out.

    Args:
        levels: read only these granularities, for example ["chunk"].
    """
    rows: list[dict] = []

    def handle(line: dict) -> None:
        for level, modules in line["levels"].items():
            for module, values in modules.items() if levels is None or level in levels else []:
                statistics = dict(zip(line["statistics"], values, strict=True))
                rows.append({"step": line["step"], "level": level, "module": module, **statistics})

    read_json_lines(Path(folder) / "diagnostics.jsonl", handle)
    return pd.DataFrame(rows, columns=None if rows else ["step", "level", "module"])


def diagnostics(runs: Runs, levels: Sequence[str] = ("chunk",)) -> pd.DataFrame:
    """`read_diagnostics` of all runs in one frame, after the columns RUN and steps."""
    order = [*RUN, "steps", "step", "level", "module"]
    return _of_all_runs(runs, lambda folder: read_diagnostics(folder, levels), order)


def _of_all_runs(runs: Runs, read: Callable[[str], pd.DataFrame], order: list[str]) -> pd.DataFrame:
    """What `read` finds in the folder of each run, in one frame: the columns `order`, then all others."""
    frames = []
    for row in runs.status[runs.status["source"] == "gsdg"].to_dict("records"):
        if Path(row["folder"]).name != Path(row["run_id"]).name:
            continue  # the row of averaged weights: gradients are those of the run itself
        frame = read(row["folder"])
        if len(frame):
            frames.append(frame.assign(**{key: row[key] for key in [*RUN, "steps"]}))
    joined = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=order)
    return joined[[*order, *(column for column in joined.columns if column not in order)]]


def read_domain_cosines(folder: str | Path) -> pd.DataFrame:
    """The cosines between domains in the diagnostics.jsonl of one run: one row per step and pair of domains.

    Columns: step, domain_a, domain_b, cosine (of the whole model's gradients, in [-1, 1]). A step has the pairs of the
    domains of its batch, without those that have a zero gradient. Empty if the run wrote no cosines.
    """
    columns = ["step", "domain_a", "domain_b", "cosine"]
    rows: list[tuple] = []

    def handle(line: dict) -> None:
        domains, cosines = line["domains"], line["cosine"]
        pairs = [(i, j) for i in range(len(domains)) for j in range(i + 1, len(domains))]
        found = [(line["step"], domains[i], domains[j], cosines[i][j]) for i, j in pairs]
        rows.extend(row for row in found if row[-1] is not None)

    read_json_lines(Path(folder) / "diagnostics.jsonl", handle)
    return pd.DataFrame(rows, columns=columns)


def domain_cosines(runs: Runs) -> pd.DataFrame:
    """`read_domain_cosines` of all runs in one frame, after the columns RUN and steps."""
    order = [*RUN, "steps", "step", "domain_a", "domain_b", "cosine"]
    return _of_all_runs(runs, read_domain_cosines, order)


# ---- finding and reading run folders --------------------------------------------------------------------------------


def _read_all(
    roots: Sequence[Path], run_ids: set[str] | None, encoder: EvaluationEncoder, problems: list
) -> Iterator[Run]:
    """All runs in the order of their folders. Folders that are left out and ids that do not exist go to `problems`."""
    absent = [root for root in roots if not root.is_dir()]
    if len(absent) == len(roots):
        raise UserError(f"no folder of runs at {listing(absent)}.\nGive the runs_dir of a training, for example: runs")
    problems += [(str(root), "no such folder or run: left out") for root in absent]
    missing = set(run_ids or ())
    folders = (pair for root in roots if root not in absent for pair in _run_folders(root, run_ids, problems))
    for folder, reader in tracked(folders, "reading", None, "runs"):
        missing.discard(folder.name)
        try:
            runs = _read_folder(folder, reader)
        except NotARun as reason:
            problems.append((folder.name, str(reason)))
            continue
        for run in runs:
            run.columns = encoder.encode(run)
            run.evaluations, run.scores = {}, {}
            yield run
    problems += [(name, "no such run") for name in sorted(missing)]


def _run_folders(root: Path, run_ids: Iterable[str] | None, problems: list) -> Iterator[tuple[Path, Reader]]:
    """(run folder, reader) of the runs in `root`, which may be a run itself. Folders without a run go to `problems`."""
    if run_ids is not None:
        for name in sorted(run_ids):
            if reader := _reader_of(root / name):
                yield root / name, reader
    elif reader := _reader_of(root):
        yield root, reader
    else:
        for folder in _subfolders(root):
            yield from _search(folder, MAX_DEPTH - 1, problems)


def _search(folder: Path, depth: int, problems: list) -> Iterator[tuple[Path, Reader]]:
    """(run folder, reader) of `folder` itself or of the runs up to `depth` levels below it."""
    if reader := _reader_of(folder):
        yield folder, reader
        return
    inner = [run for subfolder in _subfolders(folder) for run in _search(subfolder, depth - 1, [])] if depth else []
    if not inner:
        problems.append((folder.name, f"neither {' nor '.join(READERS)}: not a run"))
    yield from inner


def _reader_of(folder: Path) -> Reader | None:
    return next((reader for name, reader in READERS.items() if os.path.exists(folder / name)), None)


def _subfolders(folder: Path) -> list[Path]:
    try:
        entries = os.listdir(folder)
    except OSError:  # removed in the meantime, or not readable
        return []
    return [folder / name for name in sorted(entries) if not name.startswith(".") and os.path.isdir(folder / name)]


def _read_folder(folder: Path, reader: Reader) -> list[Run]:
    """The runs of one folder, with the folder in their metadata."""
    runs = reader(folder)
    for run in runs:
        run.metadata["folder"] = str(folder)
        run.metadata |= {key: printable(value) for key, value in run.metadata.items() if isinstance(value, str)}
    return runs


# ---- copies and ids -------------------------------------------------------------------------------------------------


def _drop_copies(runs: list[Run], encoder: EvaluationEncoder, problems: list[tuple[str, str]]) -> list[Run]:
    """Leave out runs that repeat another one (a folder copied by hand): they would make standard errors too small.

    If the results differ, the message names both folders and one example; the same two parent folders have one example.
    """
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(run.metadata[column] for column in RUN[1:])].append(run)
    copies = set()
    examples: dict[tuple[Path, Path], str] = {}
    for members in groups.values():
        kept, *others = sorted(members, key=_preference) if len(members) > 1 else members
        for run in others:
            copies.add(id(run))
            example = encoder.contradiction(kept, run)
            if example:
                parents = Path(kept.metadata["folder"]).parent, Path(run.metadata["folder"]).parent
                example = examples.setdefault(parents, example)
            problems.append((run.metadata["run_id"], _copy_message(run, kept, example)))
    return [run for run in runs if id(run) not in copies]


def _preference(run: Run) -> tuple[bool, bool]:
    """Sorting key for copies: runs that are done first, then runs that have diagnostics."""
    return run.metadata["state"] != "done", not (Path(run.metadata["folder"]) / "diagnostics.jsonl").exists()


def _copy_message(run: Run, kept: Run, example: str) -> str:
    """Why `run` is left out and `kept` is not. `example`: where their results differ, or ""."""
    draw, values = run.metadata["hparams_seed"], run.metadata["drawn"]
    if values != kept.metadata["drawn"]:
        return f"draw {draw} with other values ({values}) than in {kept.metadata['run_id']}: left out"
    same_averaging = run.metadata.get("averaging") == kept.metadata.get("averaging")
    equal = f"same {'config' if same_averaging else 'training'} as another run"
    return f"{equal}, but other results: {example}" if example else f"{equal}: counted once"


def _make_ids_unique(runs: list[Run], problems: list[tuple[str, str]]) -> list[Run]:
    """Put the parent folder into the ids of runs that have the same id but different configs."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.metadata["run_id"]].append(run)
    for run_id, members in groups.items():
        if len(members) > 1:
            for run in members:
                run.metadata["run_id"] = f"{Path(run.metadata['folder']).parent}/{run_id}"
            problems.append((run_id, f"{len(members)} different configs have this id: read as separate runs"))
    return runs


# ---- the frame of records -------------------------------------------------------------------------------------------


class EvaluationEncoder:
    """Turns a run's evaluations into three arrays (steps, codes, values); a code numbers a (domain, part) pair.

    Kept as nested dicts until the frame is made, the evaluations of a large sweep would be a quarter of a million
    objects, which slows down the garbage collector.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.codes: dict[tuple[str, str], int] = {}  # {(domain, part): code}, in the order seen

    def encode(self, run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(steps [n], codes [n], values [n] of the metric), ordered by step."""
        evaluations = run.evaluations if self.metric is ACCURACY else run.scores.get(self.metric.name, {})
        steps, codes, values = [], [], []
        for step, domains in sorted(evaluations.items()):
            for domain, parts in domains.items():
                for part, value in parts.items():
                    steps.append(step)
                    codes.append(self.codes.setdefault((domain, part), len(self.codes)))
                    values.append(value)
        return _compact_integers(steps), _compact_integers(codes), np.array(values, dtype=float)

    def contradiction(self, kept: Run, other: Run) -> str:
        """A value that two runs have recorded differently, as text; "" if there is none.

        The last such step is shown, and the target's `in` part is preferred, because it is the reported one:
        `photo in at step 300 is 81.2 % in runs/1fd86c56df2d (counted), 80.9 % in old/1fd86c56df2d`
        """
        recorded, by_other = (
            {(step, code): value for step, code, value in zip(*run.columns, strict=True)} for run in (kept, other)
        )
        different = [key for key in recorded.keys() & by_other.keys() if recorded[key] != by_other[key]]
        if not different:
            return ""
        reported = {self.codes.get((target, "in")) for target in kept.metadata["targets"]}
        step, code = shown = max(different, key=lambda key: (key[1] in reported, *key))
        what = f"{' '.join(list(self.codes)[code])} at step {step}"
        unit = " %" if self.metric.percent else ""
        values = [f"{self.metric.scale * run[shown]:.6g}{unit}" for run in (recorded, by_other)]
        return (
            f"{what} is {values[0]} in {kept.metadata['folder']} (counted), {values[1]} in {other.metadata['folder']}"
        )


def _records_frame(status: pd.DataFrame, runs: Sequence[Run], encoder: EvaluationEncoder) -> pd.DataFrame:
    """The frame of records (columns RECORDS), built in one step: a frame per run would take most of the time."""
    empty = (np.array([], dtype=np.int32), np.array([], dtype=np.int32), np.array([], dtype=float))
    per_run = [empty, *(run.columns for run in runs)]
    steps, codes, values = (np.concatenate(columns) for columns in zip(*per_run, strict=True))
    rows = np.repeat(np.arange(len(runs)), [len(run.columns[0]) for run in runs])  # row of `status` of each record
    is_target = [[domain in run.metadata["targets"] for domain, _ in encoder.codes] for run in runs]
    domains, parts = ([pair[i] for pair in encoder.codes] for i in (0, 1))
    columns = {name: _repeated(status[name].tolist(), rows) for name in RUN}
    columns |= {"step": steps, "domain": _repeated(domains, codes)}
    columns["is_target"] = np.array(is_target, dtype=bool)[rows, codes] if len(codes) else np.array([], dtype=bool)
    columns |= {"part": _repeated(parts, codes), "value": values}
    return pd.DataFrame(columns)


def _repeated(values: list[Any], rows: np.ndarray) -> pd.Categorical | np.ndarray:
    """The column `values[row]` for all `rows`: text as categories in alphabetical order, integers in few bytes."""
    if values and not isinstance(values[0], str):
        return _compact_integers(values)[rows]
    names = sorted(set(values))
    numbers = {name: number for number, name in enumerate(names)}
    codes = np.array([numbers[value] for value in values], dtype=np.min_scalar_type(-max(1, len(names))))
    return pd.Categorical.from_codes(codes[rows], categories=pd.Index(names, dtype="str"))


def _compact_integers(values: Sequence[int]) -> np.ndarray:
    """int32 if all values fit, else int64."""
    integers = np.array(values, dtype=np.int64)
    limits = np.iinfo(np.int32)
    fits = not len(integers) or (integers.min() >= limits.min and integers.max() <= limits.max)
    return integers.astype(np.int32) if fits else integers


def _parse(text: str | None) -> object:
    """A value of a flat config, which is JSON; None if the config does not have the key."""
    return None if text is None else json.loads(text)
