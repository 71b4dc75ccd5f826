"""A sweep on disk: its runs with their frozen configs, and its submissions and cancellations. Standard library only.

<runs_dir>/.sweeps/<name>/
    sweep.json      {name, created, command, overrides, launcher: the preset's parameters, code: {code, commit, dirty}}
    runs.jsonl      one line per run, including runs that were done before the launch: {run_id, overrides, config}
    events.jsonl    append-only, in order:
        {event: submitted, time, order, cluster: slurm | local, array, packs: [[run_id, ...], ...], done_before: [...]}
        {event: accepted, time, array, jobs: ["12_0", ...], host}                   jobs[i] executes packs[i]
        {event: cancelled, time, runs: [run_id, ...]}
        {event: failed, time, runs: [run_id], array, reason}   where the run's own folder could not be written
    jobs/           submitit's pickles and batch scripts, and the jobs' logs

`submitted` is noted before the submission itself. `order` numbers the submissions from a runs_dir, over all its sweeps;
`done_before` are the runs that were done before the submission, and that are run again from scratch. A job is
recognised by its number. If the launching process died before it noted the number, the job's batch script names the
array (gsdg/runs/batch_script.py). A folder whose name is used again keeps its earlier runs and events; sweep.json
describes the last launch. A sweep that uses one of Hydra's own launchers has only runs.txt (callback.py).
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from gsdg.runs import filters as filters_of_runs
from gsdg.utils.errors import DISK_FULL, UserError, listing
from gsdg.utils.json_files import append_line, read_json, read_lines, replace_file, write_json

LAUNCH_FILES = ("sweep.json", "runs.jsonl")


@dataclass(frozen=True)
class FrozenRun:
    """A run as it was enumerated: `config` is resolved and checked, so a job composes nothing again.

    Args:
        run_id: the run's id.
        overrides: the Hydra overrides that the config was composed from.
        config: the whole resolved config.
    """

    run_id: str
    overrides: list[str]
    config: dict


class SweepFolder:
    """The folder of one sweep, `<runs_dir>/.sweeps/<name>`."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self.runs_dir = self.path.parents[1]
        self.jobs = self.path / "jobs"

    def write(self, metadata: dict, runs: Iterable[FrozenRun]) -> None:
        """Freeze the sweep: write `metadata` to sweep.json, and add `runs` to those of earlier launches of this name.

        Each file is replaced in one step, so a failure leaves no truncated list of runs.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        all_runs = {run.run_id: run for run in [*self.runs(), *runs]}
        lines = "".join(json.dumps(asdict(run)) + "\n" for run in all_runs.values())
        replace_file(self.path / "runs.jsonl", lines.encode())
        write_json(self.path / "sweep.json", {"name": self.name, "created": time.time(), **metadata})

    def launch_files(self) -> dict[str, bytes]:
        """{name: content} of the files that the last launch wrote, for `restore`; {} for a new sweep."""
        paths = [self.path / name for name in LAUNCH_FILES]
        return {path.name: path.read_bytes() for path in paths if path.exists()}

    def restore(self, files: dict[str, bytes]) -> None:
        """Undo a refused launch: write back the `launch_files` from before it."""
        for name, content in files.items():
            replace_file(self.path / name, content)

    def read(self) -> dict:
        """The content of sweep.json."""
        return read_json(self.path / "sweep.json")

    def runs(self) -> list[FrozenRun]:
        """All runs, in the order of the sweep."""
        return [FrozenRun(**line) for line in read_lines(self.path / "runs.jsonl")]

    def events(self) -> list[dict]:
        """All events, in the order in which they were noted."""
        return read_lines(self.path / "events.jsonl")

    def append(self, event: str, **fields: object) -> None:
        """Note an event, and flush it to the disk, so that no submission is forgotten. OSError if that fails."""
        append_line(self.path / "events.jsonl", {"event": event, "time": time.time(), **fields}, flush=True)

    def log_of(self, job: str) -> Path:
        """The file with the output of a SLURM job, such as `12_3`."""
        return self.jobs / f"{job}_0_log.out"

    def new_arrays(self, count: int) -> list[str]:
        """`count` names for the arrays of the next submission, none of which was ever used in this sweep."""
        used = [int(event["array"].rpartition("-")[2]) for event in self.events() if "array" in event]
        first = max(used, default=-1) + 1
        return [f"gsdg-{self.name}-{first + number}" for number in range(count)]

    @property
    def created(self) -> float:
        """Unix seconds of the last launch; 0.0 where none is noted."""
        return float(self.read().get("created") or 0.0)

    @property
    def owner(self) -> int:
        """The user id of the user who submitted the sweep."""
        return self.path.stat().st_uid

    @property
    def owner_name(self) -> str:
        try:
            return pwd.getpwuid(self.owner).pw_name
        except KeyError:
            return f"user {self.owner}"

    def is_mine(self) -> bool:
        return self.owner == os.geteuid()


def all_sweeps(runs_dir: Path) -> list[SweepFolder]:
    """All sweeps under `runs_dir` that were submitted to a cluster, sorted by name (by default the date)."""
    return [SweepFolder(path.parent) for path in sorted(Path(runs_dir).glob(".sweeps/*/runs.jsonl"))]


def owners(runs_dir: Path) -> set[int]:
    """The ids of all users who submitted sweeps from `runs_dir`, which a group may share."""
    return {sweep.owner for sweep in all_sweeps(runs_dir)}


def find_sweep(runs_dir: Path, name: str | None = None) -> SweepFolder:
    """The sweep whose name contains `name`; None: the `latest`. UserError if no sweep matches, or several do."""
    sweeps = all_sweeps(runs_dir)
    if not sweeps:
        raise UserError(
            f"no sweep was submitted from {Path(runs_dir).absolute()}.\n"
            "Give its runs_dir (--runs-dir), or submit one: python launch.py -m ... hydra/launcher=slurm"
        )
    if name is None:
        return latest(sweeps)
    matches = [sweep for sweep in sweeps if name in sweep.name]
    exact = [sweep for sweep in sweeps if sweep.name == name]
    if len(matches) == 1 or exact:
        return (exact or matches)[0]
    problem = "several sweeps are" if matches else "no sweep is"
    raise UserError(f"{problem} called {name}. There are: {listing(sweep.name for sweep in matches or sweeps)}.")


def latest(sweeps: list[SweepFolder]) -> SweepFolder:
    """The sweep that the current user launched last; the last of all users, where the current user launched none."""
    return max([sweep for sweep in sweeps if sweep.is_mine()] or sweeps, key=lambda sweep: (sweep.created, sweep.name))


def filter_runs(runs: list[FrozenRun], filters: list[str]) -> list[FrozenRun]:
    """The runs whose configs match all `key=value` filters (see `gsdg.runs.filters`). UserError if no run does."""
    return [runs[position] for position in filters_of_runs.matching([run.config for run in runs], filters)]


@contextmanager
def explain_write_errors(place: Path) -> Generator[None]:
    """An OSError inside becomes a UserError that names `place`, or the other file that could not be used."""
    try:
        yield
    except BrokenPipeError:
        raise  # stdout was closed, as by `| head`
    except OSError as error:
        below = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(place)
        if not below and error.errno not in (*DISK_FULL, errno.EROFS):
            if error.filename is None:
                raise  # not about a file, such as "Cannot allocate memory"
            raise UserError(f"{error.filename}: {error.strerror}.\nNothing was submitted.") from error
        raise UserError(
            f"cannot write under {place}: {error.strerror or error} ({error.filename}).\n"
            "Nothing was submitted. Free some space, or choose another place: runs_dir=..."
        ) from error
