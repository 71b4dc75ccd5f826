"""A sweep on disk: its runs with their frozen configs, and what was submitted or cancelled. Standard library only.

<runs_dir>/.sweeps/<name>/
    sweep.json      {name, created, command, overrides, launcher: the preset's parameters, code: {code, commit, dirty}}
    runs.jsonl      one run a line, those that were done before too: {run_id, overrides, config}
    events.jsonl    append-only, in order:
        {event: submitted, time, cluster: slurm | local, array, packs: [[run_id, ...], ...]}   before it is submitted
        {event: accepted, time, array, jobs: ["12_0", ...], host}                              jobs[i] does packs[i]
        {event: cancelled, time, runs: [run_id, ...]}
    jobs/           submitit's pickles and the jobs' logs

An array's name is its job's name in SLURM, so the queue can be joined to the packs even if the launching process died
before it could note the job's number. Where the launcher is Hydra's own there is only runs.txt (callback.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from gsdg.errors import UserError, listing
from gsdg.runs import append_line, read_json, read_lines, write_json


@dataclass(frozen=True)
class Frozen:
    """A run as it was when it was enumerated: `config` is resolved and checked, nothing is composed again."""

    run_id: str
    overrides: list[str]
    config: dict


class SweepFolder:
    """The folder of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self.runs_dir = self.path.parents[1]
        self.jobs = self.path / "jobs"

    def write(self, facts: dict, runs: Iterable[Frozen]) -> None:
        """Freeze the sweep. Whatever fails, no half list of runs is left."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / ".runs.jsonl"
        temporary.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs))
        temporary.replace(self.path / "runs.jsonl")
        write_json(self.path / "sweep.json", {"name": self.name, "created": time.time(), **facts})

    def read(self) -> dict:
        """sweep.json."""
        return read_json(self.path / "sweep.json")

    def runs(self) -> list[Frozen]:
        """Every run, in the order of the sweep."""
        return [Frozen(**line) for line in read_lines(self.path / "runs.jsonl")]

    def events(self) -> list[dict]:
        return read_lines(self.path / "events.jsonl")

    def append(self, event: str, **fields: object) -> None:
        append_line(self.path / "events.jsonl", {"event": event, "time": time.time(), **fields})

    def log_of(self, job: str) -> Path:
        """Where the output of SLURM job `12_3` is."""
        return self.jobs / f"{job}_0_log.out"


def all_sweeps(runs_dir: Path) -> list[SweepFolder]:
    """Every sweep under `runs_dir` that was submitted to a cluster, oldest first (their names begin with the date)."""
    return [SweepFolder(path.parent) for path in sorted(Path(runs_dir).glob(".sweeps/*/runs.jsonl"))]


def owners(runs_dir: Path) -> set[int]:
    """User ids of those who submitted from `runs_dir`: a group may share it, and anybody may look."""
    return {sweep.path.stat().st_uid for sweep in all_sweeps(runs_dir)}


def find(runs_dir: Path, name: str | None = None) -> SweepFolder:
    """The sweep whose name contains `name`; the latest without one. UserError if there is none, or several."""
    sweeps = all_sweeps(runs_dir)
    if not sweeps:
        raise UserError(
            f"no sweep was submitted from {Path(runs_dir).absolute()}.\n"
            "Give its runs_dir (--runs-dir), or submit one: python launch.py -m ... hydra/launcher=slurm"
        )
    fitting = [sweep for sweep in sweeps if name is None or name in sweep.name]
    exact = [sweep for sweep in sweeps if sweep.name == name]
    if name is None or len(fitting) == 1 or exact:
        return (exact or fitting)[-1]
    kind = "several sweeps are" if fitting else "no sweep is"
    raise UserError(f"{kind} called {name}. There are: {listing(sweep.name for sweep in fitting or sweeps)}.")


def matching(runs: list[Frozen], filters: list[str]) -> list[Frozen]:
    """The runs whose config has every `key=value`; a group's value is its name. UserError if that leaves none."""
    kept = [run for run in runs if all(_fits(run.config, text) for text in filters)]
    if not kept:
        raise UserError(
            f"no run of {len(runs)} has {listing(filters)}.\n"
            "A filter is key=value as in a run's config.json, such as split.target=sketch or algorithm=erm."
        )
    return kept


def _fits(config: dict, text: str) -> bool:
    key, equals, wanted = text.partition("=")
    if not equals:
        raise UserError(f"{text}: a filter is key=value, such as split.target=sketch.")
    node: object = config
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    if isinstance(node, dict):
        node = node.get("name")
    return wanted in {str(node), json.dumps(node), *(map(str, node) if isinstance(node, list) else ())}


@contextmanager
def writable(place: Path) -> Iterator[None]:
    """A place that cannot be written is a message, not a traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # of stdout
    except OSError as error:
        raise UserError(
            f"cannot write under {place}: {error.strerror or error} ({error.filename}).\n"
            "Nothing was submitted. Free some space, or choose another place: runs_dir=..."
        ) from error
