"""Which runs of a sweep are to be submitted, seen what earlier starts left: gsdg/reuse.py's questions, asked of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gsdg.environment import described_code
from gsdg.errors import UserError, plural
from gsdg.own_code import own_modules
from gsdg.reuse import differences, note_search, other_code
from gsdg.runs import RunFolder, read_json
from gsdg.sweep.folder import Frozen
from gsdg.sweep.states import TO_SUBMIT, Standing


def due(runs: Sequence[Frozen], found: Sequence[Standing], resubmit: str, runs_dir: Path, code: dict) -> list[Standing]:
    """Those of `found`, the states of `runs`, that are to be submitted. code: `code_state` of all their configs.

    Runs that are done with other code are among them under on_code_change=rerun, else a note about them is printed.
    UserError under on_code_change=refuse, and where runs were begun with other data or weights.
    """
    again: set[str] = set()
    if resubmit != "all":
        check_inputs(runs, runs_dir)
        done = {one.run_id for one in found if one.state == "done"}
        for run in runs:
            if run.run_id in done and "search" in run.config:
                note_search(RunFolder(runs_dir / run.run_id), run.config)
        again = _with_other_code([run for run in runs if run.run_id in done], runs_dir, code)
    return [one for one in found if one.state in TO_SUBMIT[resubmit] or one.run_id in again]


def _with_other_code(done: Sequence[Frozen], runs_dir: Path, code: dict) -> set[str]:
    """The ids of the runs that are to be made afresh; prints a note about those that stay. UserError if refused."""
    stale: dict[str, list[str]] = {"note": [], "rerun": [], "refuse": []}
    for run in done:
        own = {name: digest for name, digest in code["modules"].items() if name in own_modules(run.config)}
        if other_code(runs_dir / run.run_id, {**code, "modules": own}):
            stale[run.config.get("on_code_change", "note")].append(run.run_id)
    if refused := stale["refuse"]:
        raise UserError(
            f"{plural(len(refused), 'run')} of those that are done had other code than {described_code(code)}, such as "
            f"{refused[0]} (on_code_change=refuse).\nRestore that code, or choose: on_code_change=rerun makes them "
            "afresh, on_code_change=note keeps their results."
        )
    if noted := stale["note"]:
        print(
            f"note: {plural(len(noted), 'run')} of those that are done had other code than {described_code(code)}; "
            "on_code_change=rerun submits them again"
        )
    return set(stale["rerun"])


def check_inputs(runs: Sequence[Frozen], runs_dir: Path) -> None:
    """UserError if a run was begun with other data or weights than are here now. What is not here is not compared."""
    seen: dict[str, dict] = {}
    begun = [(run, before) for run in runs if (before := read_json(runs_dir / run.run_id / "identity.json"))]
    changed = {run.run_id: found for run, before in begun if (found := _changed(run.config, before, seen))}
    if changed:
        run_id, found = next(iter(changed.items()))
        raise UserError(
            f"{plural(len(changed), 'run')} of {len(runs)} in {runs_dir} began with other data or weights under the "
            f"same config, such as {run_id}: {'; '.join(found[:3])}.\n"
            "Restore what they began with, or choose: resubmit=all makes every run afresh with what is here now; "
            "another runs_dir keeps both."
        )


def _changed(config: dict, before: dict, seen: dict[str, dict]) -> list[str]:
    from gsdg.experiment import inputs_here  # imports torch

    key = json.dumps([config["dataset"], config["data_dir"], config["model"]], sort_keys=True)
    if key not in seen:
        seen[key] = inputs_here(config)
    return differences(before, seen[key])
