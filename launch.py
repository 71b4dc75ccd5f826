"""One run, or a sweep: `python launch.py [group=choice] [key=value] ...`, with -m and commas to sweep.

`--cfg job` shows the config, `--help` the choices. A sweep ends with its leave-one-domain-out table.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra

from gsdg.errors import explain
from gsdg.sweeps import SweepCallback, noted_runs

CONF = "conf" if (Path(__file__).parent / "conf").is_dir() else "pkg://gsdg.conf"  # beside this file, or installed


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def job(config) -> None:
    from gsdg.experiment import run  # imports torch: not while composing

    run(config)


def main() -> None:
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors to us instead of printing them
    failure = None
    try:
        job()
    except Exception as error:
        failure = error
    if SweepCallback.folder and (runs := noted_runs(SweepCallback.folder)):
        from analysis.__main__ import report

        print("\n" + report(SweepCallback.runs_dir, run_ids=runs))
    if failure and (traceback_wanted or not explain(failure)):
        raise failure
    if failure:
        sys.exit(explain(failure))


if __name__ == "__main__":
    main()
