"""Which runs of a sweep are to be submitted, given their states and what earlier starts of them left on disk.

The checks are those that gsdg/runs/reuse.py makes when a single run starts, applied to all runs of a sweep at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gsdg.runs.folder import RunFolder
from gsdg.runs.provenance import described_code
from gsdg.runs.reuse import differences, note_search, other_code, unrecorded_metrics
from gsdg.runs.user_code import own_modules
from gsdg.sweep.folder import FrozenRun
from gsdg.sweep.run_states import TO_SUBMIT, RunState
from gsdg.utils.errors import UserError, listing, plural
from gsdg.utils.json_files import read_json


def runs_to_submit(
    runs: Sequence[FrozenRun], states: Sequence[RunState], resubmit: str, runs_dir: Path, code: dict
) -> list[RunState]:
    """Those of `states` whose runs are to be submitted; prints notes about runs done with other code or fewer metrics.

    Args:
        states: the states of `runs`, in the same order.
        resubmit: the user's choice, a key of TO_SUBMIT.
        code: the result of `code_state` for all the configs.

    Raises:
        UserError: a run is done with other code and has on_code_change=refuse, or was started with other data or
            weights than those on disk now.
    """
    rerun: set[str] = set()
    if resubmit != "all":
        check_inputs(runs, runs_dir)
        done_ids = {state.run_id for state in states if state.state == "done"}
        done = [run for run in runs if run.run_id in done_ids]
        for run in done:
            if "search" in run.config:
                note_search(RunFolder(runs_dir / run.run_id), run.config)
        rerun = _runs_to_rerun(done, runs_dir, code)
        _note_unrecorded_metrics(done, runs_dir)
    return [state for state in states if state.state in TO_SUBMIT[resubmit] or state.run_id in rerun]


def _runs_to_rerun(done: Sequence[FrozenRun], runs_dir: Path, code: dict) -> set[str]:
    """The ids of the runs that are done with other code than `code` and have on_code_change=rerun.

    Prints a note about those with on_code_change=note. UserError if any has on_code_change=refuse.
    """
    run_ids: dict[str, list[str]] = {"note": [], "rerun": [], "refuse": []}  # by on_code_change
    for run in done:
        modules = {name: digest for name, digest in code["modules"].items() if name in own_modules(run.config)}
        if other_code(runs_dir / run.run_id, {**code, "modules": modules}):
            run_ids[run.config.get("on_code_change", "note")].append(run.run_id)
    if refused := run_ids["refuse"]:
        raise UserError(
            f"{plural(len(refused), 'run')} of those that are done had other code than {described_code(code)}, such as "
            f"{refused[0]} (on_code_change=refuse).\nRestore that code, or choose: on_code_change=rerun starts them "
            "from scratch, on_code_change=note keeps their results."
        )
    if noted := run_ids["note"]:
        print(
            f"note: {plural(len(noted), 'run')} of those that are done had other code than {described_code(code)}; "
            "on_code_change=rerun submits them again"
        )
    return set(run_ids["rerun"])


def _note_unrecorded_metrics(done: Sequence[FrozenRun], runs_dir: Path) -> None:
    """Print a note about the runs that are done and whose records lack a metric of trainer.metrics."""
    metrics = {run.run_id: run.config["trainer"].get("metrics", ()) for run in done}
    lacking = [unrecorded_metrics(RunFolder(runs_dir / run_id), names) for run_id, names in metrics.items()]
    if names := list(dict.fromkeys(name for of_run in lacking for name in of_run)):
        print(
            f"note: {plural(sum(map(bool, lacking)), 'run')} of those that are done have not recorded {listing(names)} "
            "(trainer.metrics); resubmit=all starts every run from scratch"
        )


def check_inputs(runs: Sequence[FrozenRun], runs_dir: Path) -> None:
    """UserError if a run was started with other data or weights than those on disk now.

    Data and weights that are not on disk are not compared.
    """
    inputs: dict[str, dict] = {}
    identities = {run.run_id: read_json(runs_dir / run.run_id / "identity.json") for run in runs}
    changes = {
        run.run_id: changed
        for run in runs
        if identities[run.run_id] and (changed := _changed_inputs(run.config, identities[run.run_id], inputs))
    }
    if changes:
        run_id, changed = next(iter(changes.items()))
        raise UserError(
            f"{plural(len(changes), 'run')} of {len(runs)} in {runs_dir} began with other data or weights under the "
            f"same config, such as {run_id}: {'; '.join(changed[:3])}.\n"
            "Restore what they began with, or choose: resubmit=all starts every run from scratch with what is here "
            "now; another runs_dir keeps both."
        )


def _changed_inputs(config: dict, identity: dict, inputs: dict[str, dict]) -> list[str]:
    """How the data and weights on disk differ from those in a run's identity.json.

    Args:
        inputs: a cache, {dataset and model as JSON: digests}: the runs of a sweep share data and weights.
    """
    from gsdg.experiment import inputs_here  # imports torch

    key = json.dumps([config["dataset"], config["data_dir"], config["model"]], sort_keys=True)
    if key not in inputs:
        inputs[key] = inputs_here(config)
    return differences(identity, inputs[key])
