"""Send the records of finished runs to a logger. `python -m gsdg.log RUNS... --to tensorboard|wandb|mlflow|csv`

    python -m gsdg.log runs/* --to mlflow --set experiment=pacs

The same numbers arrive as with `logger=NAME` during the run, and running it again adds nothing twice. --set changes a
setting of conf/logger/NAME.yaml. A run that a process is working on is refused.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from gsdg.callbacks import WatchedRun
from gsdg.config.choices import choices, shipped_node
from gsdg.config.schema import as_dict, build, check
from gsdg.loggers import Logger
from gsdg.runs.folder import RunFolder
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import read_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Send each run and print a line about it. Returns the exit status: 2 if one could not be sent."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    status = 0
    for folder in options.runs:
        try:
            send(folder, build_logger(options.to, options.set))
            print(f"{folder}: sent to {options.to}")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    return status


def build_logger(name: str, settings: Sequence[str] = ()) -> Logger:
    """The logger of conf/logger/<name>.yaml. settings: `key=value`. UserError for an unknown key or a wrong value."""
    node = shipped_node("logger", name)[name] | as_dict(OmegaConf.from_dotlist([*settings]), resolve=False)
    return build(check(node, f"logger.{name}"))


def send(path: Path, logger: Logger) -> None:
    """Send every line of a run. UserError: no run, a run in progress, or a failure of the logger."""
    folder, config = RunFolder(path.absolute()), read_json(path / "config.json")
    if not config:
        raise UserError(f"{path} is no run: it has no config.json.\nName run folders, such as runs/4f2d99ea7668.")
    status = folder.status
    if folder.is_live(status):
        raise UserError(f"{path}: a process is working on this run. Send it when the run has ended.")
    run = WatchedRun(folder.path, config)
    logger.start(run, status.get("step", 0))
    logger.end(run, status["state"] if status.get("state") in ("done", "stopped") else "failed")
    if logger.off:
        raise UserError(f"{path} was not sent, or not all of it: the warning above says why.")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gsdg.log", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--to", required=True, choices=sorted(choices("logger")), help="the logger")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the logger")
    return parser


if __name__ == "__main__":
    sys.exit(main())
