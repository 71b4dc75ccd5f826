"""One run of a task, in a process of its own: reads {run_id, config, submission} from stdin, exits with how it ended:

0 done, 1 failed (its status says why), 3 another live process writes it, 4 taken over by another, 75 saved and stopped.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR2

from gsdg.errors import UserError
from gsdg.runs import STALE_AFTER, Busy, LockLost, RunFolder
from gsdg.signals import Signals, Stopped
from gsdg.sweep.job import BUSY, DONE, FAILED, LOST, STOPPED, has_told

PATIENCE = STALE_AFTER + 30.0  # seconds to wait for the heartbeat of a process that was killed elsewhere to go stale


def main(order: dict) -> int:
    from gsdg.experiment import prepare, run  # imports torch

    folder = RunFolder(Path(order["config"]["runs_dir"]) / order["run_id"])
    # SIGTERM comes before SIGKILL when a job is preempted or cancelled: save, and work on until the end.
    signals = Signals(stop=(SIGUSR2, SIGINT), save=(SIGTERM,))
    try:
        plan = prepare(order["config"])
        if plan.run_id != order["run_id"]:
            raise UserError(
                f"run {order['run_id']} was frozen with another code or another weights file: its config is now run "
                f"{plan.run_id}.\n"
                "Submit the sweep again."
            )
        run(plan, signals=signals, submission=order["submission"], patience=PATIENCE)
    except Busy as error:
        print(error, flush=True)
        return BUSY
    except LockLost as error:
        print(error, flush=True)
        return LOST
    except (Stopped, KeyboardInterrupt):
        return STOPPED
    except Exception as error:
        logging.getLogger(__name__).exception("run %s failed", order["run_id"])
        _note(folder, error, order["submission"])
        return FAILED
    return DONE


def _note(folder: RunFolder, error: Exception, submission: str) -> None:
    """What failed before the run had its folder is in its status too."""
    if not has_told(folder.status, submission):
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        with suppress(Busy, LockLost), folder.hold(submission=submission):
            folder.set_status(state="failed", reason=reason)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s")
    sys.exit(main(json.load(sys.stdin)))
