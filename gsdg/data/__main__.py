"""`python -m gsdg.data prepare | verify | show <dataset> data_dir=...`: a data set on disk, before any training.

The overrides are launch.py's (data_dir, dataset.root, dataset.domains, ...). Exit status 0: all is well; 1: a fault.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

import gsdg
from gsdg.data.prepare import prepare
from gsdg.data.show import show
from gsdg.data.verify import verify
from gsdg.errors import explain, listing
from gsdg.schema import build, check

CONF = Path(gsdg.__file__).parents[1] / "conf"  # beside the package in a checkout; inside it when installed


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status. A mistake of the user's is printed to stderr, without a traceback."""
    chosen = options(arguments)
    try:
        return chosen.command(chosen)
    except Exception as error:
        if not (message := explain(error)):
            raise
        print(message, file=sys.stderr)
        return 1


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, read; argparse stops collecting overrides at the first option, here they may follow."""
    chosen, more = parser().parse_known_args(arguments)
    if dashed := [word for word in more if word.startswith("-")]:
        parser().error(f"unrecognized: {listing(dashed)}")
    chosen.overrides += more
    return chosen


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m gsdg.data", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="prepare | verify | show")
    one = _command(commands, "prepare", _prepare, "download, build and check a data set")
    one.add_argument("--from", dest="given", type=Path, metavar="PATH", help="an archive or folder you already have")
    one.add_argument("--source", help="download from this source only (default: each in turn)")
    one.add_argument("--accept-counts", action="store_true", help="build it although its counts are not the published")
    _command(commands, "verify", _verify, "count, decode and compare every image")
    one = _command(commands, "show", _show, "write a contact sheet of domains x classes")
    one.add_argument("--out", type=Path, metavar="PNG", help="default: <dataset>.png in the working directory")
    return top


def _command(commands, name: str, function, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("dataset", help="a file in conf/dataset: pacs, vlcs, officehome, image_folder, ...")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="as launch.py's: data_dir=/data")
    command.set_defaults(command=function)
    return command


def _prepare(chosen: argparse.Namespace) -> int:
    config = composed(chosen)
    print(prepare(config, given=chosen.given, source=chosen.source, accept_counts=chosen.accept_counts))
    return 0


def _verify(chosen: argparse.Namespace) -> int:
    report = verify(_source(chosen))
    print(report)
    return 1 if report.faults else 0


def _show(chosen: argparse.Namespace) -> int:
    print(show(_source(chosen), chosen.out or Path(f"{chosen.dataset}.png")))
    return 0


def _source(chosen: argparse.Namespace) -> object:
    """The data set's object, as a run would build it: cheap, nothing is read yet."""
    config = composed(chosen)
    supplied = {"data_dir": "taken from data_dir, a key of its own beside dataset"}
    node = check(OmegaConf.to_container(config.dataset, resolve=True), "dataset", supplied)
    return build(node, data_dir=config.data_dir)


def composed(chosen: argparse.Namespace) -> DictConfig:
    overrides = [f"dataset={chosen.dataset}", *chosen.overrides]
    if CONF.is_dir():
        where = hydra.initialize_config_dir(str(CONF), version_base="1.3")
    else:
        where = hydra.initialize_config_module("gsdg.conf", version_base="1.3")
    with where:
        return hydra.compose("config", overrides)


if __name__ == "__main__":
    sys.exit(main())
