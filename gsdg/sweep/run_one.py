"""One run of a task, in its own process: reads {run_id, config, sweep, submission} from stdin.

Exit codes: 0 done; 1 failed (status.json says why); 3 another live process writes the run; 4 another process has taken
the run over; 75 saved and stopped.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR2

from gsdg.runs.folder import STALE_AFTER, Busy, LockLost, RunFolder
from gsdg.runs.run_log import reason_of
from gsdg.sweep import failure
from gsdg.sweep.task_process import BUSY, DONE, FAILED, STOPPED, TAKEN_OVER
from gsdg.utils.errors import UserError
from gsdg.utils.stop_signals import Signals, Stopped
from gsdg.utils.text import let_streams_print_any_text

PATIENCE = STALE_AFTER + 30.0  # seconds: after this the heartbeat of a process that was killed on another host is stale


def main(request: dict) -> int:
    """Execute the run that the task asks for; the exit code."""
    from gsdg.experiment import run  # imports torch
    from gsdg.plan import prepare  # imports torch

    folder = RunFolder(Path(request["config"]["runs_dir"]) / request["run_id"])
    # SLURM sends SIGTERM before SIGKILL when a job is preempted or cancelled: save, and keep training until the end.
    signals = Signals(stop=(SIGUSR2, SIGINT), save=(SIGTERM,))
    try:
        plan = prepare(request["config"])
        if plan.run_id != request["run_id"]:
            raise UserError(
                f"run {request['run_id']} was frozen with another code or another weights file: its config is now run "
                f"{plan.run_id}.\n"
                "Submit the sweep again."
            )
        run(plan, signals=signals, submission=request["submission"], patience=PATIENCE)
    except Busy as error:
        print(
            str(error).splitlines()[0], flush=True
        )  # the other lines advise a user; here the task waits (task_process.py)
        return BUSY
    except LockLost as error:
        print(error, flush=True)
        return TAKEN_OVER
    except (Stopped, KeyboardInterrupt):
        return STOPPED
    except Exception as error:
        logging.getLogger(__name__).exception("run %s failed", request["run_id"])
        if not failure.is_final(folder.status, request["submission"]):  # it failed before `run` could record it
            reason, details = reason_of(error), traceback.format_exc()
            failure.record(folder, Path(request["sweep"]), request["submission"], reason, details)
        return FAILED
    return DONE


if __name__ == "__main__":
    let_streams_print_any_text()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s")
    sys.exit(main(json.load(sys.stdin)))
