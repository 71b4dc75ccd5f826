"""`python -m gsdg.data prepare | verify | show <dataset> data_dir=...`: get and check a data set before training.

`python -m gsdg.data cache list | remove`: the decoded images that runs have left on disk.

The overrides are the same as for launch.py (data_dir, dataset.root, dataset.domains, ...). Exit status: 0 without
faults, 1 with a fault or an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import hydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig

from gsdg.config.choices import most_similar
from gsdg.config.command_line import check_words, refuse_flags
from gsdg.config.config_dirs import initialized
from gsdg.config.messages import explain
from gsdg.config.schema import as_dict, build, check
from gsdg.data import DataSource
from gsdg.data.cache import contents
from gsdg.data.contact_sheet import show
from gsdg.data.download import prepare
from gsdg.data.verify import TRIALS, verify
from gsdg.utils.errors import UserError, listing
from gsdg.utils.terminal import closed_pipe_is_no_error
from gsdg.utils.text import let_streams_print_any_text

NO_CACHE = (
    "no decoded images in ./data or in the home directory. Name a data_dir or a cache: "
    "python -m gsdg.data cache list PLACE"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status. A UserError is printed to stderr without a traceback."""
    let_streams_print_any_text()
    try:
        options = parse(arguments)
        return options.command(options)
    except Exception as error:
        if not (message := explain(error)):
            raise
        print(message, file=sys.stderr)
        return 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. argparse does not accept positional words after an option; here overrides may follow."""
    words = sys.argv[1:] if arguments is None else arguments
    options, rest = parser().parse_known_args(words)
    flags = [word for word in rest if word.startswith("-")]
    refuse_flags(words[1:], flags, f"python -m gsdg.data {words[0]}")
    options.overrides += rest
    return options


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="python -m gsdg.data", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="prepare | verify | show | cache")
    command = _add_command(commands, "prepare", _prepare, "download, build and check a data set")
    command.add_argument(
        "--from", dest="given", type=Path, metavar="PATH", help="an archive or folder you already have"
    )
    command.add_argument("--source", help="download from this source only (default: each in turn)")
    command.add_argument(
        "--accept-counts", action="store_true", help="build it even if its numbers of images are not the published ones"
    )
    _add_command(commands, "verify", _verify, "count, decode and compare every image")
    command = _add_command(commands, "show", _show, "write a contact sheet of domains x classes")
    command.add_argument("--out", type=Path, metavar="PNG", help="default: <dataset>.png in the working directory")
    _add_cache_commands(
        commands.add_parser("cache", help="list or remove the decoded images that runs have left on disk")
    )
    return top


def _add_cache_commands(cache: argparse.ArgumentParser) -> None:
    """The commands `cache list` and `cache remove`.

    Words after an option, which argparse does not place, reach these commands as `overrides`, see `parse`.
    """
    commands = cache.add_subparsers(required=True, metavar="list | remove")
    command = commands.add_parser("list", help="sizes, ages and sources, the largest first")
    command.add_argument(
        "words", nargs="*", metavar="PLACE", help="a data_dir or a cache (default: ./data and the home directory's)"
    )
    command.set_defaults(command=_cache_list, overrides=[])
    command = commands.add_parser("remove", help="remove some of them; without --yes, only show which")
    command.add_argument("words", nargs="*", metavar="NAME", help="the names of folders, as `list` shows them")
    command.add_argument("--in", dest="places", action="append", default=[], metavar="PLACE", help="as for `list`")
    command.add_argument(
        "--gone", action="store_true", help="only folders whose images are gone, and unfinished builds"
    )
    command.add_argument("--older", type=float, metavar="DAYS", help="only what was decoded longer ago")
    command.add_argument("--all", action="store_true", help="everything")
    command.add_argument("--yes", action="store_true", help="really remove it")
    command.set_defaults(command=_cache_remove, overrides=[])


def _add_command(commands, name: str, function, text: str) -> argparse.ArgumentParser:
    """A command with the arguments that prepare, verify and show share."""
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("dataset", help="a file in conf/dataset: pacs, vlcs, officehome, image_folder, list, ...")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="as for launch.py: data_dir=/data")
    command.add_argument("-cd", "--config-dir", type=Path, metavar="FOLDER", help="with YAML files of your own")
    command.set_defaults(command=function, verb=name)
    return command


# ---- the commands -------------------------------------------------------------------------------------------------


def _prepare(options: argparse.Namespace) -> int:
    config = compose_config(options)
    print(prepare(config, given=options.given, source=options.source, accept_counts=options.accept_counts))
    return 0


def _verify(options: argparse.Namespace) -> int:
    report = verify(_source(options), **_splits_to_verify(options))
    print(report)
    return 1 if report.faults else 0


def _splits_to_verify(options: argparse.Namespace) -> dict:
    """Arguments of `verify`: the splits of DomainBed's three trials and the one of the command line.

    With split=from_list no random splits: a list's own split is always checked.
    """
    split = compose_config(options).split
    if split.holdout_fraction is None:
        return {"trial_seeds": []}
    return {"trial_seeds": [*TRIALS, split.trial_seed], "holdout_fraction": split.holdout_fraction}


def _show(options: argparse.Namespace) -> int:
    print(show(_source(options), options.out or Path(f"{options.dataset}.png")))
    return 0


def _cache_list(options: argparse.Namespace) -> int:
    folders = contents.cache_folders([*options.words, *options.overrides])
    tables = [f"{folder}\n{contents.table(contents.entries(folder))}" for folder in folders]
    print("\n\n".join(tables) or NO_CACHE)
    return 0


def _cache_remove(options: argparse.Namespace) -> int:
    folders = contents.cache_folders(options.places)
    entries = [entry for folder in folders for entry in contents.entries(folder)]
    names = [*options.words, *options.overrides]
    selected = contents.select(entries, names=names, gone=options.gone, older=options.older, every=options.all)
    print(contents.table(selected))
    if not options.yes:
        print("Nothing is removed yet: the same command with --yes removes these. Stop the runs that use them first.")
        return 0
    busy = [entry.folder.name for entry in selected if not contents.remove(entry)]
    print(f"removed, except for {listing(busy)}: being built now" if busy else "removed")
    return 1 if busy else 0


def _source(options: argparse.Namespace) -> DataSource:
    """The dataset object, as a run would build it; no file is read yet."""
    config = compose_config(options)
    supplied = {"data_dir": "taken from data_dir, a key of its own beside dataset"}
    node = check(as_dict(config.dataset, resolve=True), "dataset", supplied)
    return build(node, data_dir=config.data_dir)


def compose_config(options: argparse.Namespace) -> DictConfig:
    """Compose the config with Hydra. UserError: no such dataset."""
    name = options.dataset.removeprefix("dataset=")
    command = f"python -m gsdg.data {options.verb}"
    check_words(options.overrides, f"{command} {name}")
    try:
        with initialized(options.config_dir):
            return hydra.compose("config", [f"dataset={name}", *options.overrides])
    except MissingConfigException as error:
        if error.missing_cfg_file != f"dataset/{name}":
            raise
        valid = error.options or ()
        meant = "".join(f" Did you mean: {command} {other}" for other in most_similar(name, valid))
        raise UserError(f"there is no data set {name}.{meant}\nValid: {listing(valid)}.") from error


if __name__ == "__main__":
    with closed_pipe_is_no_error():
        sys.exit(main())
