"""The runs in a runs_dir, with what `list`, `show` and `remove` need of them: state, age, size on disk."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gsdg.runs.filters import matching
from gsdg.runs.folder import RunFolder
from gsdg.runs.weights_index import WEIGHTS
from gsdg.utils.errors import UserError, listing
from gsdg.utils.json_files import read_json

RUN_ID = re.compile(r"[0-9a-f]{12}")
KINDS = ("checkpoints", "weights", "records and the rest")
SECONDS_PER_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
SHOWN = 8  # run ids that a message lists


@dataclass(frozen=True)
class FoundRun:
    """A run's folder, and its config and status as they were when the folder was read."""

    path: Path
    config: dict
    status: dict

    @property
    def run_id(self) -> str:
        return self.path.name

    @cached_property
    def state(self) -> str:
        """The state in status.json, or `dead` if that is running but no process is alive, or `unknown` without one."""
        state = str(self.status.get("state", "unknown"))
        return "dead" if state == "running" and not RunFolder(self.path).is_live(self.status) else state

    @cached_property
    def last_seen(self) -> float:
        """The time of the last heartbeat, or else of the last change of the folder, in unix seconds."""
        heartbeat = self.status.get("heartbeat")
        return float(heartbeat) if isinstance(heartbeat, int | float) else self.path.stat().st_mtime

    @cached_property
    def sizes(self) -> dict[str, int]:
        """{kind: bytes} for each of KINDS."""
        weights = sum(size_of(self.path / name) for name in WEIGHTS)
        checkpoints = size_of(self.path / "checkpoints")
        return dict(zip(KINDS, (checkpoints, weights, size_of(self.path) - checkpoints - weights), strict=True))


def read_inventory(runs_dir: Path) -> list[FoundRun]:
    """Every run in `runs_dir`, sorted by `last_seen`, the most recent last. UserError if there is no such folder."""
    try:
        entries = [Path(entry.path) for entry in os.scandir(runs_dir) if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise UserError(
            f"cannot read {runs_dir}: {error.strerror}.\nGive the folder that holds the run folders: --runs-dir FOLDER"
        ) from error
    runs = [run for path in entries if not path.name.startswith(".") and (run := read_run(path))]
    return sorted(runs, key=lambda run: (run.last_seen, run.run_id))


def read_run(path: Path) -> FoundRun | None:
    """The run in the folder `path`; None if the folder is not that of a run (`remove` then never touches it)."""
    config, status = (read_json(path / name) for name in ("config.json", "status.json"))
    has_config = "algorithm" in config and "split" in config
    failed_before_config = RUN_ID.fullmatch(path.name) and "state" in status
    return FoundRun(path, config, status) if has_config or failed_before_config else None


def select_runs(
    runs: Sequence[FoundRun], words: Sequence[str], *, older: float | None = None, failed: bool = False
) -> list[FoundRun]:
    """The runs that meet all of a user's conditions.

    Args:
        words: run ids or beginnings of run ids (none: every run), and filters `key=value`, all of which must be met.
        older: only runs whose last heartbeat is at least this many seconds old.
        failed: only runs that failed.

    Raises:
        UserError: a run id fits no run or several runs, or no run meets the filters.
    """
    names = [word for word in words if "=" not in word]
    selected = [find_run(name, runs) for name in names] if names else list(runs)
    selected = list({run.run_id: run for run in selected}.values())
    if conditions := [word for word in words if "=" in word]:
        selected = [selected[index] for index in matching([run.config for run in selected], conditions)]
    now = time.time()
    selected = [run for run in selected if older is None or now - run.last_seen >= older]
    return [run for run in selected if not failed or run.state == "failed"]


def find_run(name: str, runs: Sequence[FoundRun]) -> FoundRun:
    """The run whose id is `name`, or the only run whose id begins with `name`. The path of its folder will do too.

    Raises:
        UserError: no run or several runs fit.
    """
    word = os.path.basename(os.path.normpath(name))
    fitting = [run for run in runs if run.run_id == word] or [run for run in runs if run.run_id.startswith(word)]
    if len(fitting) == 1:
        return fitting[0]
    choices = [run.run_id for run in fitting or runs]
    listed = listing(choices[:SHOWN]) + f" and {len(choices) - SHOWN} more" * (len(choices) > SHOWN)
    problem = "several run ids begin with" if fitting else "no run id begins with"
    raise UserError(f"{problem} {word}. There are: {listed}.")


def parse_duration(text: str) -> float:
    """`30d` -> seconds. UserError if `text` is not a duration."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not match:
        raise UserError(
            f"{text!r} is not a duration.\n"
            "Valid: a number and s, m, h, d or w (seconds, minutes, hours, days, weeks), such as 30d."
        )
    return float(match[1]) * SECONDS_PER_UNIT[match[2]]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if it does not exist (any more)."""
    try:
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_size
        return sum(size_of(Path(entry.path)) for entry in os.scandir(path))
    except OSError:
        return 0


def total_sizes(sizes: Iterable[dict[str, int]]) -> dict[str, int]:
    """{kind: bytes}, summed over the sizes of several runs."""
    total: Counter = Counter(dict.fromkeys(KINDS, 0))
    for size in sizes:
        total.update(size)
    return dict(total)
