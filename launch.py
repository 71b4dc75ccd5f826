"""One run, or a sweep: `python launch.py [group=choice] [key=value] ...`, with -m and commas to sweep.

`--cfg job` shows the config, `--help` the choices. A sweep ends with its leave-one-domain-out table.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig

from gsdg.errors import UserError, explain
from gsdg.sweep.callback import SweepCallback, note_run, noted_runs

BESIDE = Path(__file__).parent / "conf"
CONF = str(BESIDE) if BESIDE.is_dir() else "pkg://gsdg.conf"  # of a checkout, or installed


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def job(config) -> None:
    from gsdg.experiment import prepare, run  # imports torch: not while composing

    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode.name == "MULTIRUN"
    if not sweeping and (launcher := hydra_config.runtime.choices["hydra/launcher"]) != "basic":
        raise UserError(f"hydra/launcher={launcher} without -m: Hydra would run it here. Add -m, for a single run too.")
    plan = prepare(config)
    if sweeping:
        note_run(Path(hydra_config.runtime.output_dir), plan.run_id)
    run(plan)


def main() -> None:
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us instead of printing them
    failure = None
    try:
        job()
    except KeyboardInterrupt:
        if traceback_wanted:
            raise
        print("interrupted: the same command again goes on from what was saved", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        failure = error
    if SweepCallback.folder and (runs := noted_runs(SweepCallback.folder)):
        from analysis.tables import report

        print("\n" + report(SweepCallback.runs_dir, run_ids=runs))
    if failure and (traceback_wanted or not explain(failure)):
        raise failure
    if failure:
        sys.exit(explain(failure))


if __name__ == "__main__":
    main()
