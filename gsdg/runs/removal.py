"""Removing runs, or their checkpoints and weights, and copies of the code that no task needs any more.

Nothing is removed that a live process writes or that a submitted task may still need. A run's folder is renamed before
it is emptied: an interrupted removal leaves no partial run under the run's id, and the next removal empties the renamed
folder.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gsdg.runs.folder import RunFolder
from gsdg.runs.in_use import Submissions
from gsdg.runs.inventory import FoundRun
from gsdg.runs.lock import Busy, LockLost
from gsdg.runs.process_identity import describe_process
from gsdg.runs.weights_index import FOLDER, WEIGHTS
from gsdg.utils.errors import UserError
from gsdg.utils.file_locks import file_lock
from gsdg.utils.json_files import read_json

BEING_REMOVED = ".removed."  # prefix of the names of folders that are to be emptied


def reason_to_keep(run: FoundRun, submissions: Submissions) -> str:
    """Why the run must not be removed; "" if it may be."""
    if RunFolder(run.path).is_live(run.status):
        return f"it is being written by {_owner(run, run.status)}"
    return submissions.reason_needed(run.run_id, run.status)


def unneeded_code(runs_dir: Path, submissions: Submissions) -> list[Path]:
    """The copies of the code from which no task will start any more.

    They are in <runs_dir>/.code, and in a shared runs_dir in one .code-<user id> per further user.
    """
    copies = sorted(path for path in Path(runs_dir).glob(".code*/*") if path.is_dir() and not path.is_symlink())
    return [path for path in copies if not submissions.needs_code(path.name)]


@contextmanager
def no_launch(runs_dir: Path) -> Generator[None]:
    """While inside, no sweep is launched from `runs_dir`: it could count a run as done that is about to be removed."""
    folder = Path(runs_dir) / ".sweeps"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write in {runs_dir}: {error.strerror}. Nothing was removed.\n"
            "Give a folder of runs that is yours: --runs-dir FOLDER"
        ) from error
    with file_lock(folder / ".lock"):  # gsdg.sweep.submit locks the same file
        yield


def remove_runs(runs: Sequence[FoundRun], *, keep_records: bool) -> list[tuple[FoundRun, str]]:
    """Remove the runs, or with `keep_records` only their checkpoints and weights.

    Returns:
        (run, reason) for each run that could not be removed.
    """
    remaining = []
    for run in runs:
        try:
            (_remove_weights if keep_records else _remove_run)(run)
        except (Busy, LockLost) as error:
            remaining.append((run, str(error).splitlines()[0]))
        except OSError as error:
            remaining.append((run, f"{error.strerror or error}: {error.filename or run.path}"))
    return remaining


def remove_folder(path: Path) -> None:
    """Rename the folder, then empty it: nobody finds a partial folder under its name. Raises OSError."""
    renamed = path.with_name(f"{BEING_REMOVED}{path.name}.{uuid.uuid4().hex[:8]}")
    os.rename(path, renamed)
    shutil.rmtree(renamed)


def finish_removals(runs_dir: Path) -> None:
    """Empty the folders that an interrupted removal has renamed."""
    for parent in (Path(runs_dir), *Path(runs_dir).glob(".code*")):
        for path in parent.glob(f"{BEING_REMOVED}*"):
            shutil.rmtree(path, ignore_errors=True)


def _remove_run(run: FoundRun) -> None:
    with _locked(run):
        remove_folder(run.path)


def _remove_weights(run: FoundRun) -> None:
    with _locked(run):
        for folder in (run.path / "checkpoints", run.path / FOLDER):
            if folder.is_dir():
                shutil.rmtree(folder)
        for name in set(WEIGHTS) - {FOLDER}:
            (run.path / name).unlink(missing_ok=True)


@contextmanager
def _locked(run: FoundRun) -> Generator[None]:
    """While inside, hold the run's lock; its status.json is then restored. Busy if a live process writes the run."""
    folder = RunFolder(run.path)
    status = folder.status
    if folder.is_live(status):
        raise Busy(f"run {run.run_id} is being written by {_owner(run, status)}.")
    with folder.acquire():
        try:
            yield
        finally:
            with suppress(LockLost, OSError):
                _restore_status(folder, status)


def _restore_status(folder: RunFolder, status: dict) -> None:
    """Make status.json what it was before `acquire`, its heartbeat included."""
    folder.set_status(**status)  # so that a heartbeat that comes later writes the same fields
    if status:
        folder.write("status.json", status)
    else:
        (folder.path / "status.json").unlink()


def _owner(run: FoundRun, status: dict) -> str:
    return describe_process(read_json(run.path / "lock") or status)
