"""Environment variables of the user's shell that would change a submission: hydra.launcher.* alone must decide.

sbatch reads the variables SBATCH_*, which override the options in a batch script. The srun in the script reads SLURM_*
and SRUN_*, which a job inherits from the shell that submitted it. A variable that users set as a default for all their
jobs (partition, account, ...) is used if the setting of hydra.launcher is null. All other variables are cleared while a
sweep is submitted, and listed in a note. The names are from the manual pages of SLURM 22.05 to 24.11. Standard library
only.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from gsdg.utils.errors import UserError, listing

# {variable: the setting of hydra.launcher that it is the default of}
DEFAULTS = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_WCKEY": "wckey",
}
IN_ADDITIONAL = ("reservation", "wckey")  # of these settings: those in hydra.launcher.additional_parameters

# The variables SLURM_<name> that srun reads (sbatch reads a few of them too). A job must get them from SLURM alone, not
# from the submitting shell. Not in this list, and so not cleared: how to reach SLURM (SLURM_CONF, SLURM_CLUSTERS,
# SLURM_JWT), the mode of new files (SLURM_UMASK), and variables that a cluster defines for its users.
SRUN_NAMES = """
ACCOUNT ACCTG_FREQ ARBITRARY_NODELIST BCAST BCAST_EXCLUDE BURST_BUFFER CLUSTER_CONSTRAINT COMPRESS CONSTRAINT
CONTAINER CONTAINER_ID CORE_SPEC CPUS_PER_GPU CPUS_PER_TASK CPU_BIND CPU_FREQ_REQ DEBUG DELAY_BOOT DEPENDENCY
DISABLE_STATUS DISTRIBUTION DIST_PLANESIZE EPILOG EXACT EXCLUSIVE EXPORT_ENV GET_USER_ENV GPUS GPUS_PER_NODE
GPUS_PER_SOCKET GPUS_PER_TASK GPU_BIND GPU_FREQ GRES GRES_FLAGS HINT HOSTFILE IMMEDIATE KILL_BAD_EXIT LABELIO
MEM_BIND MEM_BIND_SORT MEM_BIND_VERBOSE MEM_PER_CPU MEM_PER_GPU MEM_PER_NODE MPI_TYPE NCORES_PER_SOCKET NETWORK
NNODES NODELIST NO_KILL NPROCS NSOCKETS_PER_NODE NTASKS NTASKS_PER_CORE NTASKS_PER_GPU NTASKS_PER_NODE
NTASKS_PER_SOCKET NTASKS_PER_TRES OOM_KILL_STEP OPEN_MODE OVERCOMMIT OVERLAP PARTITION POWER PROFILE PROLOG QOS
REMOTE_CWD REQ_SWITCH RESERVATION RESV_PORTS SEND_LIBS SIGNAL SPREAD_JOB STDERRMODE STDINMODE STDOUTMODE TASK_EPILOG
TASK_PROLOG TEST_EXEC THREADS THREADS_PER_CORE THREAD_SPEC TIMELIMIT TREE_WIDTH TRES_BIND TRES_PER_TASK UNBUFFEREDIO
USE_MIN_NODES WAIT WAIT4SWITCH WCKEY WORKING_DIR
"""
READ_BY_SRUN = frozenset(f"SLURM_{name}" for name in SRUN_NAMES.split())

# The last lines of every batch script's setup, since the user's own setup lines may have set such variables again, such
# as by sourcing a profile. From SLURM 22.05 on, srun takes the number of cores from SRUN_CPUS_PER_TASK instead of from
# the job, and some clusters tell their users to export it. So it is set to the number of cores that the job has.
SETUP_LINES = (
    "unset SRUN_EXPORT_ENV; export SLURM_EXPORT_ENV=ALL",
    '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
)
# {setting of hydra.launcher: the variable that SLURM sets for it in a job}; srun refuses a job that has two of them
MEMORY = {"mem_gb": "SLURM_MEM_PER_NODE", "mem_per_cpu": "SLURM_MEM_PER_CPU", "mem_per_gpu": "SLURM_MEM_PER_GPU"}


def setup_lines(parameters: Mapping) -> list[str]:
    """Shell lines that come before srun in the batch script. parameters: the config hydra.launcher."""
    requested = {variable for name, variable in MEMORY.items() if parameters.get(name) is not None}
    others = [variable for variable in MEMORY.values() if requested and variable not in requested]
    return [*SETUP_LINES, f"unset {' '.join(others)}"] if others else [*SETUP_LINES]


def with_defaults(parameters: Mapping, environment: Mapping[str, str]) -> dict:
    """The parameters of hydra.launcher, where those that are null have the values of the user's DEFAULTS variables."""
    result = {**parameters, "additional_parameters": dict(parameters.get("additional_parameters") or {})}
    for variable, name in DEFAULTS.items():
        target = result["additional_parameters"] if name in IN_ADDITIONAL else result
        if environment.get(variable) and target.get(name) is None:
            target[name] = environment[variable]
    return result


def used_defaults(parameters: Mapping, environment: Mapping[str, str]) -> list[str]:
    """The variables that `with_defaults` uses, such as `SBATCH_PARTITION=gpu`."""
    before, after = _flat(parameters), _flat(with_defaults(parameters, environment))
    return [f"{variable}={after[name]}" for variable, name in DEFAULTS.items() if after.get(name) != before.get(name)]


def unused_variables(environment: Mapping[str, str]) -> list[str]:
    """The names of the variables that must reach neither sbatch nor the srun of a job, without DEFAULTS."""
    others = [name for name in environment if name.startswith(("SBATCH_", "SRUN_")) and name not in DEFAULTS]
    return sorted([*others, *(name for name in environment if name in READ_BY_SRUN)])


def check_clusters(environment: Mapping[str, str]) -> None:
    """UserError if jobs would go to another cluster than the one whose queue is read, or to one of several."""
    of_sbatch, of_all_commands = environment.get("SBATCH_CLUSTERS"), environment.get("SLURM_CLUSTERS")
    if of_sbatch and of_sbatch != of_all_commands:
        raise UserError(
            f"SBATCH_CLUSTERS={of_sbatch} is set, which only sbatch reads: squeue would show another cluster.\n"
            f"Set it for every command of SLURM:\n    unset SBATCH_CLUSTERS; export SLURM_CLUSTERS={of_sbatch}"
        )
    if of_all_commands and ("," in of_all_commands or of_all_commands == "all"):
        raise UserError(
            f"SLURM_CLUSTERS={of_all_commands} names several clusters, but the jobs of a sweep are in one queue.\n"
            "Choose one cluster: export SLURM_CLUSTERS=NAME"
        )


@contextmanager
def cleared() -> Generator[None]:
    """While inside, os.environ, which sbatch and the jobs inherit, has none of the variables described above."""
    names = {*unused_variables(os.environ), *(name for name in DEFAULTS if name in os.environ)}
    removed = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(removed)


def notes(parameters: Mapping, environment: Mapping[str, str]) -> list[str]:
    """Lines for the user: which variables of the shell are used, and which are not."""
    lines = []
    if used := used_defaults(parameters, environment):
        lines.append(f"note: from this shell: {listing(used)}")
    if unused := unused_variables(environment):
        lines.append(f"note: of this shell's variables the jobs do not get {listing(unused)}: use hydra.launcher.*")
    if overridden := _overridden_defaults(parameters, environment):
        lines.append(f"note: hydra.launcher.* is used instead of {listing(overridden)}")
    return lines


def _overridden_defaults(parameters: Mapping, environment: Mapping[str, str]) -> list[str]:
    """The DEFAULTS variables that are not used because hydra.launcher has another value."""
    values = _flat(with_defaults(parameters, environment))
    return [
        f"{variable}={environment[variable]}"
        for variable, name in DEFAULTS.items()
        if environment.get(variable) and values.get(name) != environment[variable]
    ]


def _flat(parameters: Mapping) -> dict:
    """The parameters, and those in additional_parameters beside them."""
    return {**parameters, **(parameters.get("additional_parameters") or {})}
