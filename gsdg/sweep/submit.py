"""Submits an enumerated sweep, in four stages: validate, freeze, plan the arrays, submit the arrays.

Everything that can be refused is refused before the first array is submitted. If SLURM refuses a later array, the
arrays before it are withdrawn. What is about to be queued is noted on disk before sbatch is called, so no run is ever
submitted twice, whenever the launching process dies.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gsdg.runs.provenance import code_state, described_code, visible_gpus
from gsdg.sweep import code_snapshot, earlier, slurm, slurm_environment, trust
from gsdg.sweep.cancel import withdraw_submission
from gsdg.sweep.executor import Task, script
from gsdg.sweep.folder import FrozenRun, SweepFolder, explain_write_errors, owners
from gsdg.sweep.prefetch import missing_inputs
from gsdg.sweep.run_states import TO_SUBMIT, run_states_from
from gsdg.sweep.status_text import counts
from gsdg.sweep.submissions import History
from gsdg.sweep.task_process import Pack
from gsdg.utils.errors import UserError, listing, plural
from gsdg.utils.file_locks import lock_open_file

log = logging.getLogger(__name__)


def launch(
    sweep: SweepFolder,
    runs: list[FrozenRun],
    task: Task,
    *,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    resubmit: str,
    config_dir: str | None = None,
) -> list:
    """Freeze the sweep in its folder and submit the runs that are due.

    Args:
        task: the launcher (slurm or local) and its parameters.
        overrides: the overrides of the command line.
        environment: variables that the processes of the runs get.
        resubmit: one of TO_SUBMIT.
        config_dir: the `--config-dir` of the command line.

    Returns:
        submitit's jobs; [] where no run is due.

    Raises:
        UserError: the sweep was refused, and nothing of it is left in the queue.
    """
    task = _validated(sweep, runs, task, resubmit)
    with explain_write_errors(sweep.runs_dir), launch_lock(sweep.runs_dir):
        launch_files, event_count = sweep.launch_files(), len(sweep.events())
        runs = _freeze(sweep, runs, task, overrides, environment, config_dir)
        try:
            return submit(sweep, runs, task, resubmit)
        except UserError:
            _undo_freeze(sweep, launch_files, event_count)
            raise


def resubmit(sweep: SweepFolder, runs: list[FrozenRun], resubmit: str) -> list:
    """Submit those of `runs` that are due again, with the sweep's frozen configs and launcher, and the current code."""
    parameters = dict(sweep.read()["launcher"])
    task = _with_shell_defaults(Task(parameters.pop("cluster"), parameters))
    with explain_write_errors(sweep.runs_dir), launch_lock(sweep.runs_dir):
        return submit(sweep, runs, task, resubmit)


def submit(sweep: SweepFolder, runs: list[FrozenRun], task: Task, resubmit: str) -> list:
    """Submit those of `runs` that are due. UserError, with nothing left in the queue, if SLURM refuses.

    The caller holds `launch_lock`.
    """
    submission = _plan_arrays(sweep, runs, task, resubmit)
    if submission is None:
        return []
    with slurm_environment.cleared():
        jobs = _submit_arrays(sweep, task, submission)
    _print_next_commands(sweep, task, submission.arrays, jobs)
    return jobs


@contextmanager
def launch_lock(runs_dir: Path) -> Generator[None]:
    """Only one launch per runs_dir at a time: two at once would both find a run missing, and submit it twice."""
    folder = runs_dir / ".sweeps"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            lock_open_file(file)
        except OSError as error:
            log.warning("no lock on %s (%s): do not launch two sweeps at the same moment", folder, error.strerror)
        yield


# ---- 1. validate ----------------------------------------------------------------------------------------------------


def _validated(sweep: SweepFolder, runs: list[FrozenRun], task: Task, resubmit: str) -> Task:
    """The task, completed with defaults from the shell. UserError for what can be refused without writing anything."""
    task = _with_shell_defaults(task)
    task.check()
    if resubmit not in TO_SUBMIT:
        raise UserError(f"resubmit={resubmit}. Valid: {listing(TO_SUBMIT)}.")
    if sweep.path.parent.name != ".sweeps":
        raise UserError(
            f"hydra.sweep.dir={sweep.path}: the folder of a sweep is in <runs_dir>/.sweeps. "
            "Leave hydra.sweep.dir out, and choose runs_dir."
        )
    check_place(sweep, runs)
    return task


def _with_shell_defaults(task: Task) -> Task:
    """The task with the user's SBATCH_PARTITION etc. where the launcher sets none.

    Prints which variables of the shell are used and which are not. UserError where nothing can be submitted from here.
    """
    if task.cluster != "slurm":
        return task
    slurm.check_can_submit()
    slurm_environment.check_clusters(os.environ)
    for line in slurm_environment.notes(task.parameters, os.environ):
        print(line)
    return replace(task, parameters=slurm_environment.with_defaults(task.parameters, os.environ))


def check_place(sweep: SweepFolder, runs: list[FrozenRun]) -> None:
    """UserError where the runs would be written to another folder than the sweep's runs_dir."""
    if "%" in str(sweep.path):
        raise UserError(
            f"runs_dir={sweep.runs_dir}: submitit and sbatch replace a % in a path, such as %j, by a number of the "
            "job.\nChoose a runs_dir without %."
        )
    elsewhere = {run.config["runs_dir"] for run in runs} - {str(sweep.runs_dir)}
    if elsewhere:
        raise UserError(
            f"hydra.sweep.dir={sweep.path}: that is under {sweep.runs_dir}, and the runs are under "
            f"{listing(sorted(elsewhere))}.\nLeave hydra.sweep.dir out, and choose one runs_dir per sweep."
        )


# ---- 2. freeze ------------------------------------------------------------------------------------------------------


def _freeze(
    sweep: SweepFolder,
    runs: list[FrozenRun],
    task: Task,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    config_dir: str | None,
) -> list[FrozenRun]:
    """Write sweep.json and runs.jsonl, and warn about data and weights that are missing on this host; the runs."""
    metadata = {
        "command": sys.argv,
        "overrides": list(overrides),
        "config_dir": config_dir,
        "directory": os.getcwd(),
        "environment": dict(environment),
    }
    metadata["code"] = code_state([run.config for run in runs])
    runs = [require_gpu(run) for run in runs] if task.wants_gpu else runs
    sweep.write({**metadata, "launcher": {"cluster": task.cluster, **task.parameters}}, runs)
    for problem in missing_inputs([run.config for run in runs]) if task.cluster == "slurm" else ():
        print(f"warning: {problem.splitlines()[0]}\n    before the jobs start, run: {prepare_command(metadata)}")
    return runs


def _undo_freeze(sweep: SweepFolder, launch_files: dict[str, bytes], event_count: int) -> None:
    """After a refused launch: restore the sweep's folder, unless the launch has noted events that refer to its files.

    Args:
        launch_files: `sweep.launch_files()` before the launch.
        event_count: number of the sweep's events before the launch.
    """
    if not sweep.events():  # nothing was ever submitted: `status` should not show this sweep
        shutil.rmtree(sweep.path)
    elif len(sweep.events()) == event_count:  # all events are those of an earlier launch under the same name
        sweep.restore(launch_files)


def require_gpu(run: FrozenRun) -> FrozenRun:
    """The run with device=cuda instead of device=auto, for a task that asked for a GPU.

    If the task finds no GPU, the run then fails at once instead of training on the CPU for a night, unnoticed.
    """
    device = "cuda" if run.config["device"] == "auto" else run.config["device"]
    return replace(run, config={**run.config, "device": device})


def prepare_command(metadata: Mapping) -> str:
    """The command that downloads, on the login node, all files that the jobs will need. metadata: of sweep.json."""
    folder = ["--config-dir", metadata["config_dir"]] if metadata.get("config_dir") else []
    return shlex.join(["python", "-m", "gsdg.sweep", "prepare", *folder, *metadata["overrides"]])


# ---- 3. plan the arrays ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """The arrays that are about to be submitted.

    Args:
        arrays: the runs of each array, by task: arrays[k][i] is the pack of task i of array k.
        start: the bootstrap.py of the code snapshot, which begins every job.
        event: what the `submitted` event of every array notes: {order, cluster, done_before, code}.
        from_scratch: whether the jobs remove what earlier submissions of their runs left.
    """

    arrays: list[list[list[FrozenRun]]]
    start: Path
    event: dict
    from_scratch: bool


def _plan_arrays(sweep: SweepFolder, runs: list[FrozenRun], task: Task, resubmit: str) -> Submission | None:
    """The submission of the runs that are due, with the code snapshot made; None where no run is due.

    UserError where on_code_change=refuse, changed data or weights, or insecure folders forbid the submission.
    """
    # SLURM's queue is read before the files, as gsdg.sweep.run_states requires.
    queue = slurm.queue(owners=owners(sweep.runs_dir)) if task.cluster == "slurm" else None
    history = History(sweep.runs_dir, queue)
    states = run_states_from(history, runs)
    current_code = code_state([run.config for run in runs])
    due = {run.run_id for run in earlier.runs_to_submit(runs, states, resubmit, sweep.runs_dir, current_code)}
    summary = f"{plural(len(states), 'run')}: {counts(states)}"
    print(f"sweep {sweep.name}: {summary}; {len(due)} to submit (resubmit={resubmit})")
    if not due:
        return None
    _print_code(sweep, current_code)
    start = snapshot_start_script(sweep, runs, current_code)
    packs = pack_runs([run for run in runs if run.run_id in due], task.parameters)
    event = {
        "order": history.next_order,
        "cluster": task.cluster,
        "done_before": [run.run_id for run in states if run.state == "done" and run.run_id in due],
        "code": code_snapshot.snapshot_name(current_code),
    }
    return Submission(split_into_arrays(packs, task), start, event, from_scratch=resubmit == "all")


def snapshot_start_script(sweep: SweepFolder, runs: list[FrozenRun], current_code: dict) -> Path:
    """Copy the code for the jobs; the copy's bootstrap.py.

    UserError where another user could change what the jobs execute: the copy, or submitit's pickles.
    """
    configs = [run.config for run in runs]
    code_snapshot.check_modules_found(configs, sweep.read().get("directory", "the folder"))
    for shared in (sweep.runs_dir, sweep.path.parent):
        trust.check_not_replaceable(shared)
    trust.make_private(sweep.path)
    trust.private_folder(sweep.jobs)
    return (
        code_snapshot.snapshot(code_snapshot.code_folder(sweep.runs_dir), current_code, configs)
        / "gsdg"
        / "sweep"
        / "bootstrap.py"
    )


def pack_runs(runs: list[FrozenRun], parameters: dict) -> list[list[FrozenRun]]:
    """Packs of `runs_per_task` runs, one pack per task; null: all runs in one pack."""
    size = parameters["runs_per_task"] or len(runs)
    return [runs[first : first + size] for first in range(0, len(runs), size)]


def split_into_arrays(packs: list[list[FrozenRun]], task: Task) -> list[list[list[FrozenRun]]]:
    """The packs in arrays of at most MaxArraySize tasks and of nearly equal size."""
    if task.cluster == "local":
        return [packs]
    count = -(-len(packs) // slurm.max_array_size())
    return [packs[len(packs) * k // count : len(packs) * (k + 1) // count] for k in range(count)]


def divide_parallelism(arrays: list[list], parallelism: int) -> list[int]:
    """How many tasks of each array may run at once: `parallelism` in all, at least 1 per array.

    SLURM's limit (`--array=0-9%4`) holds per array, so it is divided in proportion to the sizes of the arrays.
    """
    total, rest = sum(map(len, arrays)), max(0, parallelism - len(arrays))
    ends = [round(rest * sum(map(len, arrays[: k + 1])) / total) for k in range(len(arrays))]
    return [1 + end - start for start, end in zip([0, *ends], ends, strict=False)]


# ---- 4. submit the arrays -------------------------------------------------------------------------------------------


def _submit_arrays(sweep: SweepFolder, task: Task, submission: Submission) -> list:
    """Submit every array; submitit's jobs. UserError, with nothing left in the queue, if SLURM refuses one."""
    arrays = submission.arrays
    names = sweep.new_arrays(len(arrays))
    # Ask SLURM about every array before the first one is submitted.
    if task.cluster == "slurm":
        executors = _slurm_executors(sweep, task, arrays, names, submission.start)
        for executor, array in zip(executors, arrays, strict=True):
            slurm.check_accepted(script(executor, len(array)))
    else:
        executors = [task.executor(sweep.jobs, submission.start)]
    options, jobs = _pack_options(sweep, task, submission.from_scratch), []
    for name, array, executor in zip(names, arrays, executors, strict=True):
        packs = [Pack(sweep.path, name, name, pack, **options) for pack in array]
        run_ids = [[run.run_id for run in pack] for pack in array]
        try:
            # The event is on disk before sbatch is called: if this process dies in between, the runs count as
            # submitted and the batch script tells which array a job in the queue belongs to.
            sweep.append("submitted", array=name, packs=run_ids, **submission.event)
            with trust.not_writable_by_others():
                submitted = executor.submit_array(packs)
        except Exception as error:
            raise _withdraw(sweep, task, names, jobs, arrays, error) from error
        jobs += submitted
        with suppress(OSError):  # not essential: the batch script names the array, too
            sweep.append("accepted", array=name, jobs=[job.job_id for job in submitted], host=os.uname().nodename)
    return jobs


def _slurm_executors(sweep: SweepFolder, task: Task, arrays: list, names: list[str], start: Path) -> list:
    """One submitit executor per array."""
    limits = divide_parallelism(arrays, task.parameters["array_parallelism"])
    options = {"chdir": sweep.read()["directory"], **task.parameters["additional_parameters"]}
    return [
        task.executor(sweep.jobs, start, name, array_parallelism=limit, additional_parameters=options)
        for name, limit in zip(names, limits, strict=True)
    ]


def _pack_options(sweep: SweepFolder, task: Task, from_scratch: bool) -> dict:
    """The arguments of `Pack` that are the same for every task of the sweep."""
    metadata = sweep.read()
    environment: dict[str, str | None] = dict(metadata["environment"])
    if task.cluster == "slurm":
        # Jobs never download: GSDG_OFFLINE holds the command that their error messages give to the user.
        directory = shlex.join(["cd", metadata["directory"]])  # the command may name relative folders
        environment |= {"GSDG_OFFLINE": f"{directory} && {prepare_command(metadata)}", "HF_HUB_OFFLINE": "1"}
    elif not task.parameters.get("gpus_per_node"):  # submitit hides every GPU from local jobs that ask for none
        one_at_a_time = task.parameters["side_by_side"] == 1
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") if one_at_a_time else visible_gpus()
        environment |= {"CUDA_VISIBLE_DEVICES": gpus}
    return {
        "side_by_side": task.parameters["side_by_side"],
        "grace": max(5.0, task.parameters.get("signal_delay_s", 120) - 15.0),  # 15 s to put the task back in the queue
        "from_scratch": from_scratch,
        "environment": environment,
    }


def _withdraw(
    sweep: SweepFolder, task: Task, names: list[str], jobs: list, arrays: list[list], error: Exception
) -> UserError:
    """Withdraw the whole submission, after one of its arrays could not be submitted; the error for the user.

    The cancellation is noted before SLURM is asked: if SLURM does not answer, a task that starts later sees that its
    runs were cancelled, and ends.

    Args:
        names: the names of all arrays of the submission.
        jobs: submitit's jobs of the arrays that were accepted.
        error: why the array could not be submitted.
    """
    with suppress(OSError):
        sweep.append("cancelled", runs=[run.run_id for array in arrays for pack in array for run in pack])
    if task.cluster != "slurm":
        return UserError(f"the sweep could not be submitted: {error}")
    reason = slurm.explain_refusal(str(error))
    return UserError(
        f"the sweep could not be submitted: {reason}{withdraw_submission(sweep, names, [job.job_id for job in jobs])}"
    )


# ---- messages -------------------------------------------------------------------------------------------------------


def _print_code(sweep: SweepFolder, current_code: dict) -> None:
    """The code that the jobs will run, and a note if the sweep was submitted before with different code."""
    print(f"code {described_code(current_code)}: jobs run a copy of it, whatever happens to the checkout")
    before = {event["code"] for event in sweep.events() if event["event"] == "submitted"} | {
        code_snapshot.snapshot_name(sweep.read()["code"])
    }
    if others := before - {code_snapshot.snapshot_name(current_code)}:
        print(
            f"note: this sweep was submitted before with other code ({listing(sorted(others))}); "
            "its runs go on with the current code"
        )


def _print_next_commands(sweep: SweepFolder, task: Task, arrays: list, jobs: list) -> None:
    where = "" if task.cluster == "local" else f" as job {listing(sorted({job.job_id.split('_')[0] for job in jobs}))}"
    print(f"submitted: {plural(sum(map(len, arrays)), 'task')} in {plural(len(arrays), 'array')}{where}")
    if task.cluster == "slurm":
        command = ["python", "-m", "gsdg.sweep", "status", sweep.name, "--watch", "--runs-dir", str(sweep.runs_dir)]
        print(f"follow it:  {shlex.join(command)}")
        print(f"the table:  {shlex.join(['python', '-m', 'analysis', str(sweep.runs_dir)])}")
