"""Start one run, or a sweep: `python launch.py [group=choice] [key=value] ...`, with -m and commas for a sweep.

`--cfg job` shows the config, `--help` the choices. A sweep ends with its leave-one-domain-out table.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from gsdg.config.choices import CONF
from gsdg.config.command_line import check_arguments
from gsdg.config.messages import explain
from gsdg.sweep.callback import SweepCallback, note_run, noted_runs
from gsdg.utils.errors import UserError, first_line, listing
from gsdg.utils.terminal import closed_pipe_is_no_error, erase
from gsdg.utils.text import let_streams_print_any_text

log = logging.getLogger(__name__)
FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own variable: "1" for whole tracebacks
FAILED: list[str] = []  # the runs of this sweep that have failed, as `[3/12]`


class RunFailed(BaseException):
    """Carries the error of a single run past Hydra, which would print a line of its own if it were an Exception."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(config) -> None:
    """Hydra calls this once per config."""
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    try:
        if not sweeping and (launcher := hydra_config.runtime.choices["hydra/launcher"]) != "basic":
            raise UserError(f"hydra/launcher={launcher} needs -m, even for a single run: Hydra would run it here.")
        check_and_run(config, hydra_config if sweeping else None)
    except Exception as error:
        if not sweeping:
            raise RunFailed from error
        log.error("%s failed: %s", number_of(hydra_config), first_line(error))
        FAILED.append(number_of(hydra_config))
        raise


def check_and_run(config, sweep) -> None:
    """Check one config and run it. sweep: Hydra's own config if this is one run of a sweep, else None."""
    from gsdg.experiment import run  # here, because it imports torch, which `--cfg` and `--help` do not need
    from gsdg.plan import prepare

    plan = prepare(config)
    if sweep is not None:
        note_run(Path(sweep.runtime.output_dir), plan.run_id)
        description = f"target {listing(plan.split.targets)}, {plan.config['algorithm']['name']}"
        log.info("%s run %s, %s", number_of(sweep), plan.run_id, description)
    run(plan)


def number_of(sweep) -> str:
    """`[3/12]`: the number of a run in its sweep, or `[3]` if the size of the sweep is not known."""
    return f"[{sweep.job.num + 1}/{SweepCallback.size}]" if SweepCallback.size else f"[{sweep.job.num + 1}]"


@contextmanager
def hydra_raises_errors() -> Generator[None]:
    """Hydra raises errors instead of printing them; the environment is afterwards as it was."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        del os.environ[FULL_ERROR]
        if before is not None:
            os.environ[FULL_ERROR] = before


def main() -> None:
    """The program `python launch.py`, and the command `gsdg`."""
    let_streams_print_any_text()
    with closed_pipe_is_no_error():
        _main()


def _main() -> None:
    show_traceback = os.environ.get(FULL_ERROR) == "1"
    failure = None
    FAILED.clear()

    # Run one config, or all configs of a sweep: a run that fails does not stop the others.
    try:
        sys.argv[1:] = check_arguments(sys.argv[1:])
        try:
            with hydra_raises_errors():
                job()
        finally:
            erase()
    except KeyboardInterrupt:
        if show_traceback:
            raise
        print("interrupted: run the same command again to resume from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        raise
    except RunFailed as failed:
        failure = failed.__cause__
    except Exception as error:
        failure = error

    # The table of a sweep, with or without failed runs; then the error.
    if SweepCallback.folder and SweepCallback.runs_dir and (runs := noted_runs(SweepCallback.folder)):
        from gsdg.analysis.tables import report

        print("\n" + report(SweepCallback.runs_dir, run_ids=runs, draws=SweepCallback.draws))
    others = f"\nfailed: {listing(FAILED)}. This is the error of the first." if len(FAILED) > 1 else ""
    if failure:
        message = None if show_traceback else explain(failure)
        if not message:
            print(others, end="\n" * bool(others), file=sys.stderr)
            raise failure
        sys.exit(message + others)
