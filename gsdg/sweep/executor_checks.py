"""Checks of hydra.launcher.*: settings that would lose work, contradict one another, or have no effect.

Each message names the setting, its value, and an override that works.
"""

from __future__ import annotations

from collections.abc import Mapping

from gsdg.utils.errors import UserError

LAUNCHER = "hydra.launcher"
ADDITIONAL = f"{LAUNCHER}.additional_parameters"
ONE_OF = (("mem_gb", "mem_per_cpu", "mem_per_gpu"), ("cpus_per_task", "cpus_per_gpu"))
UNUSED_LOCALLY = ("name", "cpus_per_task", "mem_gb")

# {option of sbatch: the launcher's setting that must be used instead}
HAS_SETTING = {
    "account": "account",
    "comment": "comment",
    "constraint": "constraint",
    "cpus-per-gpu": "cpus_per_gpu",
    "cpus-per-task": "cpus_per_task",
    "exclude": "exclude",
    "gpus-per-node": "gpus_per_node",
    "gpus-per-task": "gpus_per_task",
    "gres": "gres",
    "job-name": "name",
    "mem": "mem_gb",
    "mem-per-cpu": "mem_per_cpu",
    "mem-per-gpu": "mem_per_gpu",
    "nodes": "nodes",
    "ntasks-per-node": "tasks_per_node",
    "partition": "partition",
    "qos": "qos",
    "signal": "signal_delay_s",
    "time": "timeout_min",
}
# {option of sbatch: why it cannot be set}
REFUSED = {
    "array": f"{LAUNCHER}.runs_per_task and array_parallelism decide how tasks are put into arrays",
    "clusters": "a sweep uses the cluster of this shell; choose it with: export SLURM_CLUSTERS=NAME",
    "error": "the output of a task is in <sweep>/jobs, where `status` reads it",
    "export": "a task needs the variables of the shell that submits it; unset the variables that jobs must not have",
    "export-file": "a task needs the variables of the shell that submits it",
    "ntasks": "a run is one process",
    "no-requeue": "a task that is preempted, or whose node is lost, would not come back",
    "open-mode": "the output of a task that was queued again must not overwrite its earlier output",
    "output": "the output of a task is in <sweep>/jobs, where `status` reads it",
    "parsable": "sbatch's answer is read",
    "quiet": "sbatch's answer is read",
    "test-only": "nothing would be submitted",
    "wait": "the command that submits a sweep returns at once; `python -m gsdg.sweep status --watch` waits",
    "wrap": "the sweep writes the batch script itself",
}
NOT_ABBREVIATIONS = ("gpus",)  # options whose name is also the beginning of another option's name


def check(cluster: str, given: Mapping) -> None:
    """UserError for a wrong setting. cluster: slurm or local; given: the config hydra.launcher."""
    for name in ("tasks_per_node", "nodes"):
        if given[name] != 1:
            raise UserError(f"{LAUNCHER}.{name}={given[name]}: a run is one process. Valid: 1.")
    for name in ("runs_per_task", "side_by_side", "array_parallelism"):
        if (value := given.get(name)) is not None and value < 1:
            raise UserError(f"{LAUNCHER}.{name}={value}. Valid: 1 or more.")
    if (folder := given.get("submitit_folder")) is not None:
        raise UserError(
            f"{LAUNCHER}.submitit_folder={folder}: a sweep's jobs and logs are in <runs_dir>/.sweeps/<sweep>/jobs.\n"
            "Leave it out, and choose runs_dir=..."
        )
    if cluster == "slurm":
        check_time_limit(given)
        check_resources(given)
        check_additional(given.get("additional_parameters") or {})
    else:
        check_local(given)


def check_time_limit(given: Mapping) -> None:
    """UserError if submitit would not take the signal for a timeout, or would not queue the task again after it."""
    delay, minutes, timeouts = given["signal_delay_s"], given["timeout_min"], given["max_num_timeout"]
    largest = min(0.2 * 60 * minutes, 600)  # seconds; from submitit's own rule for recognising a timeout
    if not 0 < delay < largest:
        raise UserError(
            f"{LAUNCHER}.signal_delay_s={delay} with timeout_min={minutes}. Valid: below {largest:.0f} s, the "
            "smaller of 20% of the time limit and 10 min:\nsubmitit takes an earlier signal for a preemption, and "
            f"queues the task again and again. Raise {LAUNCHER}.timeout_min or lower signal_delay_s."
        )
    if timeouts < 1:
        raise UserError(
            f"{LAUNCHER}.max_num_timeout={timeouts}: a run that reaches the time limit would not be queued "
            "again.\nValid: 1 or more; the preset has 1000."
        )


def check_resources(given: Mapping) -> None:
    """UserError if memory, cores or GPUs are requested in two ways: SLURM may refuse that or combine them somehow."""
    for names in ONE_OF:
        _refuse_several({name: given[name] for name in names if given.get(name) is not None})
    gpus = {name: given[name] for name in ("gpus_per_node", "gpus_per_task") if given.get(name)}
    if "gpu" in (given.get("gres") or ""):
        gpus["gres"] = given["gres"]
    if (value := (given.get("additional_parameters") or {}).get("gpus")) is not None:
        gpus["additional_parameters.gpus"] = value
    _refuse_several(gpus)


def _refuse_several(settings: Mapping) -> None:
    if len(settings) > 1:
        first, *_ = settings
        listed = " and ".join(f"{LAUNCHER}.{name}={value}" for name, value in settings.items())
        raise UserError(f"{listed}: SLURM needs one of them.\nTo use the last, add: {LAUNCHER}.{first}=null")


def check_additional(options: Mapping) -> None:
    """UserError for an option of sbatch that hydra.launcher has a setting for, or that a sweep cannot use."""
    for key, value in options.items():
        option = key.replace("_", "-")
        if option == "requeue" and value is False:
            raise UserError(
                f"{ADDITIONAL}.requeue=false: a task that is preempted, or whose node is lost, would not come back.\n"
                f"Leave it out, or use the cluster's default: {ADDITIONAL}.requeue=null"
            )
        name = _full_name(option)
        if name in HAS_SETTING:
            raise UserError(f"{ADDITIONAL}.{key}={value}: use {LAUNCHER}.{HAS_SETTING[name]}=... instead.")
        if name in REFUSED:
            raise UserError(f"{ADDITIONAL}.{key}={value}: {REFUSED[name]}.\nLeave it out.")


def _full_name(option: str) -> str:
    """The refused option that `option` abbreviates for sbatch, which accepts abbreviations; else `option` itself."""
    if option in NOT_ABBREVIATIONS:
        return option
    names = [name for name in (*HAS_SETTING, *REFUSED) if name.startswith(option)]
    return option if option in names or not names else names[0]


def check_local(given: Mapping) -> None:
    """UserError for a setting that has no effect on a sweep on this machine."""
    for name in UNUSED_LOCALLY:
        if (value := given.get(name)) is not None:
            raise UserError(
                f"{LAUNCHER}.{name}={value} has no effect with hydra/launcher=local.\n"
                "Leave it out, or choose hydra/launcher=slurm."
            )
