"""An enumerated sweep -> queued tasks: freeze, leave out what is done or on its way, pack, split into arrays, submit.

Everything that can be refused is refused before the first task is submitted; if SLURM refuses a later array, those
before it are withdrawn. What is queued is noted on disk before it is submitted, so nothing is ever submitted twice.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from gsdg.environment import code_state, described_code, visible_gpus
from gsdg.errors import UserError, listing, plural
from gsdg.sweep import code, earlier, slurm
from gsdg.sweep.folder import Frozen, SweepFolder, owners, writable
from gsdg.sweep.job import Pack
from gsdg.sweep.prepare import missing
from gsdg.sweep.states import TO_SUBMIT, stand
from gsdg.sweep.table import counts
from gsdg.sweep.task import Task, script

log = logging.getLogger(__name__)


def launch(
    sweep: SweepFolder,
    runs: list[Frozen],
    task: Task,
    *,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    resubmit: str,
) -> list:
    """Freeze the sweep in its folder and submit what is due; returns submitit's jobs.

    `overrides` are the command's, `environment` what the runs find in theirs, `resubmit` one of TO_SUBMIT.
    """
    task.check()
    if resubmit not in TO_SUBMIT:
        raise UserError(f"resubmit={resubmit}. Valid: {listing(TO_SUBMIT)}.")
    if sweep.path.parent.name != ".sweeps":
        raise UserError(
            f"hydra.sweep.dir={sweep.path}: sweeps lie in <runs_dir>/.sweeps. Leave it, and choose runs_dir."
        )
    if task.cluster == "slurm":
        slurm.refuse_here()
    with writable(sweep.runs_dir), one_at_a_time(sweep.runs_dir):
        facts = {
            "command": sys.argv,
            "overrides": list(overrides),
            "directory": os.getcwd(),
            "environment": dict(environment),
        }
        facts["code"] = code_state([run.config for run in runs])
        runs = [on_gpu(run) for run in runs] if task.wants_gpu else runs
        sweep.write({**facts, "launcher": {"cluster": task.cluster, **task.parameters}}, runs)
        for line in missing([run.config for run in runs]) if task.cluster == "slurm" else ():
            print(f"warning: {line.splitlines()[0]}\n    before the jobs start: {prepare_command(overrides)}")
        try:
            return submit(sweep, runs, task, resubmit)
        except UserError:
            if not sweep.events():  # refused: not a sweep that `status` should show
                shutil.rmtree(sweep.path)
            raise


def on_gpu(run: Frozen) -> Frozen:
    """device=auto of a task that has asked for a GPU: it must not train a night on the CPU, unnoticed."""
    device = "cuda" if run.config["device"] == "auto" else run.config["device"]
    return replace(run, config={**run.config, "device": device})


def prepare_command(overrides: Sequence[str]) -> str:
    """What brings to the login node all that the jobs will look for."""
    return shlex.join(["python", "-m", "gsdg.sweep", "prepare", *overrides])


def resubmit(sweep: SweepFolder, runs: list[Frozen], resubmit: str) -> list:
    """Submit again what is due of `runs`, with the sweep's frozen configs and launcher, and today's code."""
    parameters = dict(sweep.read()["launcher"])
    task = Task(parameters.pop("cluster"), parameters)
    if task.cluster == "slurm":
        slurm.refuse_here()
    with writable(sweep.runs_dir), one_at_a_time(sweep.runs_dir):
        return submit(sweep, runs, task, resubmit)


def submit(sweep: SweepFolder, runs: list[Frozen], task: Task, resubmit: str) -> list:
    """Submit those of `runs` that `resubmit` asks for. UserError, with nothing left in the queue, if SLURM refuses."""
    queue = slurm.queue(owners=owners(sweep.runs_dir)) if task.cluster == "slurm" else None
    found = stand(runs, sweep.runs_dir, queue)
    now = code_state([run.config for run in runs])
    due = {one.run_id for one in earlier.due(runs, found, resubmit, sweep.runs_dir, now)}
    runs_now = f"{plural(len(found), 'run')}: {counts(found)}"
    print(f"sweep {sweep.name}: {runs_now}; {len(due)} to submit (resubmit={resubmit})")
    if not due:
        return []
    _say_code(sweep, now)
    start = code.snapshot(sweep.runs_dir / ".code", now, [run.config for run in runs]) / "gsdg" / "sweep" / "start.py"
    arrays = split(packed([run for run in runs if run.run_id in due], task.parameters), task)
    jobs = _submit_arrays(sweep, task, arrays, start, now, afresh=resubmit == "all")
    _say_next(sweep, task, arrays, jobs)
    return jobs


def packed(runs: list[Frozen], parameters: dict) -> list[list[Frozen]]:
    """Runs in packs of `runs_per_task`, one pack a task; null: all in one."""
    size = parameters["runs_per_task"] or len(runs)
    return [runs[first : first + size] for first in range(0, len(runs), size)]


def split(packs: list[list[Frozen]], task: Task) -> list[list[list[Frozen]]]:
    """Packs in arrays that SLURM accepts, of nearly equal size."""
    if task.cluster == "local":
        return [packs]
    count = -(-len(packs) // slurm.max_array_size())
    return [packs[len(packs) * k // count : len(packs) * (k + 1) // count] for k in range(count)]


def shares(arrays: list[list], parallelism: int) -> list[int]:
    """How many tasks of each array may run at once, `parallelism` in all: SLURM counts per array, from 1."""
    total, rest = sum(map(len, arrays)), max(0, parallelism - len(arrays))
    ends = [round(rest * sum(map(len, arrays[: k + 1])) / total) for k in range(len(arrays))]
    return [1 + end - start for start, end in zip([0, *ends], ends, strict=False)]


def _submit_arrays(sweep: SweepFolder, task: Task, arrays: list, start: Path, now: dict, *, afresh: bool) -> list:
    first = sum(event["event"] == "submitted" for event in sweep.events())
    names = [f"gsdg-{sweep.name}-{first + k}" for k in range(len(arrays))]
    if task.cluster == "slurm":
        executors = _executors(sweep, task, arrays, names, start)
        for executor, array in zip(executors, arrays, strict=True):
            slurm.test(script(executor, len(array)))
    else:
        executors = [task.executor(sweep.jobs, start)]
    options, jobs = _options(sweep, task, afresh), []
    for name, array, executor in zip(names, arrays, executors, strict=True):
        packs = [Pack(sweep.path, name, name, pack, **options) for pack in array]
        ids = [[run.run_id for run in pack] for pack in array]
        try:
            sweep.append("submitted", cluster=task.cluster, array=name, packs=ids, code=code.snapshot_name(now))
            submitted = executor.submit_array(packs)
        except Exception as error:
            _withdraw(sweep, task, jobs, [run for array in arrays for pack in array for run in pack], error)
        jobs += submitted
        with suppress(OSError):  # the queue knows the array by its name, too
            sweep.append("accepted", array=name, jobs=[job.job_id for job in submitted], host=os.uname().nodename)
    return jobs


def _executors(sweep: SweepFolder, task: Task, arrays: list, names: list[str], start: Path) -> list:
    at_once = shares(arrays, task.parameters["array_parallelism"])
    more = {"chdir": sweep.read()["directory"], **task.parameters["additional_parameters"]}
    return [
        task.executor(sweep.jobs, start, name=name, array_parallelism=share, additional_parameters=more)
        for name, share in zip(names, at_once, strict=True)
    ]


def _options(sweep: SweepFolder, task: Task, afresh: bool) -> dict:
    environment: dict[str, str | None] = dict(sweep.read()["environment"])
    if task.cluster == "slurm":
        environment |= {"GSDG_OFFLINE": prepare_command(sweep.read()["overrides"]), "HF_HUB_OFFLINE": "1"}
    elif not task.parameters.get("gpus_per_node"):  # submitit hides every GPU from local jobs that ask for none
        alone = task.parameters["side_by_side"] == 1
        environment |= {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES") if alone else visible_gpus()}
    grace = max(5.0, task.parameters.get("signal_delay_s", 120) - 15.0)
    return {
        "side_by_side": task.parameters["side_by_side"],
        "grace": grace,
        "afresh": afresh,
        "environment": environment,
    }


def _withdraw(sweep: SweepFolder, task: Task, jobs: list, runs: list[Frozen], error: Exception) -> None:
    """SLURM refused an array: take back those before it, and say why."""
    if jobs:
        slurm.cancel([job.job_id for job in jobs])
    with suppress(OSError):
        sweep.append("cancelled", runs=[run.run_id for run in runs])
    reason = slurm.explain(str(error)) if task.cluster == "slurm" else str(error)
    withdrawn = (
        f"\nThe {len(jobs)} tasks submitted before it were withdrawn: nothing of this sweep is queued." if jobs else ""
    )
    raise UserError(f"the sweep could not be submitted: {reason}{withdrawn}") from error


def _say_code(sweep: SweepFolder, now: dict) -> None:
    print(f"code {described_code(now)}: jobs run a copy of it, whatever happens to the checkout")
    before = {event["code"] for event in sweep.events() if event["event"] == "submitted"} | {
        code.snapshot_name(sweep.read()["code"])
    }
    if others := before - {code.snapshot_name(now)}:
        print(f"note: it was submitted before with other code ({listing(sorted(others))}); runs go on with today's")


def _say_next(sweep: SweepFolder, task: Task, arrays: list, jobs: list) -> None:
    where = "" if task.cluster == "local" else f" as job {listing(sorted({job.job_id.split('_')[0] for job in jobs}))}"
    print(f"submitted: {plural(sum(map(len, arrays)), 'task')} in {plural(len(arrays), 'array')}{where}")
    if task.cluster == "slurm":
        print(f"follow it:  python -m gsdg.sweep status --watch --runs-dir {sweep.runs_dir}")
        print(f"the table:  python -m analysis {sweep.runs_dir}")


@contextmanager
def one_at_a_time(runs_dir: Path) -> Iterator[None]:
    """Two launches at the same moment would both find a run missing: the second waits for the first."""
    folder = runs_dir / ".sweeps"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("no lock on %s (%s): do not launch two sweeps at the same moment", folder, error.strerror)
        yield
