"""Records why a run of a task failed: in the run's folder or, where it cannot be written, in the sweep's events.

Imports no torch.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path

from gsdg.runs.folder import Busy, LockLost, RunFolder
from gsdg.sweep.folder import SweepFolder

log = logging.getLogger(__name__)


def is_final(status: dict, submission: str) -> bool:
    """Whether a run's status is the final status of this submission, and not that of an earlier one."""
    return status.get("state") == "done" or (status.get("state"), status.get("submission")) == ("failed", submission)


def is_recorded(folder: RunFolder, sweep: Path, submission: str) -> bool:
    """Whether the final status of this submission is on disk, in the run's folder or in the sweep's events."""
    events = []
    with suppress(OSError):  # a network file system may fail for a moment
        events = SweepFolder(sweep).events()
    return is_final(folder.status, submission) or (folder.path.name, submission) in failures(events)


def failures(events: list[dict]) -> dict[tuple[str, str], str]:
    """{(run id, array): reason} of the failures that could not be written into the runs' own folders."""
    failed = [event for event in events if event["event"] == "failed"]
    return {(run_id, event["array"]): event["reason"] for event in failed for run_id in event["runs"]}


def record(folder: RunFolder, sweep: Path, submission: str, reason: str, details: str = "") -> None:
    """Set the run's state to failed. Where its folder cannot be written, note an event of the sweep instead.

    Args:
        sweep: the sweep's folder.
        submission: name of the submission, which is the name of its array.
        reason: one line.
        details: appended to the run's log.txt, such as a traceback.
    """
    try:
        with folder.acquire(submission=submission):
            folder.set_status(state="failed", reason=reason)
            with (folder.path / "log.txt").open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} failed: {reason}\n{details}")
    except (Busy, LockLost) as error:
        # The process that owns the folder records how the run ends.
        log.info("run %s: %s", folder.path.name, str(error).splitlines()[0])
    except OSError as error:
        log.error("run %s: its folder cannot be written: %s", folder.path.name, error)
        with suppress(OSError):
            SweepFolder(sweep).append("failed", runs=[folder.path.name], array=submission, reason=reason)
