"""More steps for a finished run: `python -m gsdg.extend RUN trainer.steps=N` makes the run with N steps out of it.

It equals a run that had N steps from the start, bit for bit, and has that run's id. The finished run stays as it is. It
must have kept its state (`trainer.keep_state=true`): weights alone lack the optimizer's moments and the random states.
A run whose course depends on the number of its steps, such as one with a cosine schedule, is refused by name.

An evaluation that the finished run made only because it was its last step (`trainer.evaluate_last`) is left out, as the
longer run would not make it there; the state is therefore saved before it.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gsdg.averaging import Averaging
from gsdg.config.identity import NOT_SCIENTIFIC
from gsdg.experiment import run
from gsdg.plan import Plan, prepare
from gsdg.runs.folder import EVALUATION_FILES
from gsdg.runs.weights_index import FOLDER, STATE
from gsdg.schedules import Schedule
from gsdg.utils.errors import UserError, listing
from gsdg.utils.json_files import append_line, read_json, read_lines, write_json

NOT_HERE = ("force", "resubmit", "on_code_change")  # they are about a run that is there already
MAY_CHANGE = ("trainer.steps", *(key for key in NOT_SCIENTIFIC if key not in NOT_HERE))
EXTENDS = "extends.json"  # in the longer run's folder: the finished run and its number of steps


def extend(finished: Path, changes: Sequence[str]) -> Path:
    """Make the longer run, or resume it. Returns its folder.

    Args:
        finished: folder of the finished run.
        changes: words `key=value`: trainer.steps, and keys that change no result, such as device.

    Raises:
        UserError: the run cannot be extended.
        Stopped, Busy, LockLost: see `experiment.run`.
    """
    config, before = longer_config(finished, changes)
    plan = prepare(config)
    if depends := [*dependences(plan, before)]:
        raise UserError(
            f"{finished}: {listing(depends)} would take another course in a longer run, from its first step on.\n"
            f"Make that run from the start: python launch.py with trainer.steps={plan.trainer.steps}."
        )
    folder = Path(config["runs_dir"]) / plan.run_id
    if not folder.exists():
        fill(folder, finished, plan, before)
    run(plan)
    return folder


def longer_config(finished: Path, changes: Sequence[str]) -> tuple[dict, int]:
    """The config of the longer run, and the number of steps of the finished one."""
    if read_json(finished / "status.json").get("state") != "done":
        raise UserError(f"{finished} is not the folder of a finished run; python -m gsdg.runs list shows them.")
    if not (finished / STATE).is_file():
        raise UserError(
            f"{finished} has kept no state to train on from. Runs with trainer.keep_state=true keep it.\n"
            "Make the longer run from the start: python launch.py with the same choices and a larger trainer.steps."
        )
    config: dict[str, Any] = read_json(finished / "config.json") | {"runs_dir": str(finished.absolute().parent)}
    before = config["trainer"]["steps"]
    config = changed(config, changes)
    after = config["trainer"]["steps"]
    if not isinstance(after, int) or after <= before:
        raise UserError(f"trainer.steps={after}: the run has made {before} steps; give a larger number.")
    for node in (config["algorithm"], config["algorithm"].get("surgery") or {}):
        if node.get("total_steps") == before:  # ${trainer.steps} in conf/algorithm
            node["total_steps"] = after
    return config, before


def changed(config: dict, changes: Sequence[str]) -> dict:
    """The config with the changes. UserError for a key that may not change."""
    keys = [word.partition("=")[0] for word in changes]
    if wrong := [key for key in keys if key not in MAY_CHANGE] or [word for word in changes if "=" not in word]:
        raise UserError(
            f"{listing(wrong)}: only trainer.steps and keys that change no result can change: {listing(MAY_CHANGE)}."
        )
    if "trainer.steps" not in keys:
        raise UserError("give the number of steps that the run shall have: trainer.steps=N.")
    merged = OmegaConf.merge(OmegaConf.create(config), OmegaConf.from_dotlist(list(changes)))
    plain: Any = OmegaConf.to_container(merged)
    return plain


def dependences(plan: Plan, before: int) -> Iterator[str]:
    """The parts of the config whose effect on the first `before` steps depends on the number of steps."""
    trainer, algorithm = plan.trainer, plan.config["algorithm"]
    schedule, averaging = trainer.scheduler, trainer.averaging
    if isinstance(schedule, Schedule) and schedule.depends_on_steps:
        yield f"trainer.scheduler ({type(schedule).__name__})"
    if isinstance(averaging, Averaging) and averaging.depends_on_steps:
        yield f"trainer.averaging ({type(averaging).__name__})"
    for key, node in {"algorithm": algorithm, "algorithm.surgery": algorithm.get("surgery") or {}}.items():
        if node.get("alpha_schedule", "constant") != "constant":
            yield f"{key}.alpha_schedule={node['alpha_schedule']}"
    # A user's class or a scheduler of torch may have been given the number of steps: ${trainer.steps}.
    for key, value in leaves(plan.config):
        if type(value) is int and value == before and foreign(plan.config, key):
            yield f"{key}={value}"


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of everything in nested dicts that is not a dict."""
    if not isinstance(node, dict):
        yield key, node
        return
    for name, value in node.items():
        yield from leaves(value, f"{key}.{name}" if key else name)


def foreign(config: dict, key: str) -> bool:
    """Whether the closest node around the key with a `_target_` is of a class that is not in gsdg."""
    target, node = "gsdg.", config
    for name in key.split(".")[:-1]:
        node = node[name]
        target = node.get("_target_", target)
    return not target.startswith("gsdg.")


def fill(folder: Path, finished: Path, plan: Plan, before: int) -> None:
    """Make the longer run's folder: the finished run's state as its last checkpoint, its records and its weights.

    It is made beside its place and renamed, so that a folder that is there is complete.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "checkpoints").mkdir(parents=True)
    shutil.copy(finished / STATE, part / "checkpoints" / f"step_{before:08d}.pt")
    for name in EVALUATION_FILES:
        for record in read_lines(finished / name):
            if plan.trainer.evaluates(record["step"]):
                append_line(part / name, record)
    for name in ("diagnostics.jsonl", "environment.jsonl"):
        if (finished / name).is_file():
            shutil.copy(finished / name, part / name)
    if (finished / FOLDER).is_dir():
        shutil.copytree(finished / FOLDER, part / FOLDER)
    digests = {key: read_json(finished / "identity.json").get(key, {}) for key in ("data", "weights")}
    write_json(part / "identity.json", digests)
    write_json(part / EXTENDS, {"run": finished.name, "folder": str(finished.absolute()), "steps": before})
    part.rename(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Extend a run, print where the longer one is, and return the exit status."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(extend(options.run, options.changes))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gsdg.extend", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run with trainer.keep_state=true")
    parser.add_argument(
        "changes", nargs="+", help="trainer.steps=N, and further keys that change no result (device=cpu)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
