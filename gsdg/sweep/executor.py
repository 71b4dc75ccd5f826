"""How a task is run: the parameters of hydra.launcher, their checks, and the submitit executor made from them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsdg.runs.batch_script import ARRAY_LINE
from gsdg.sweep.executor_checks import check
from gsdg.sweep.slurm_environment import setup_lines

if TYPE_CHECKING:
    from submitit import AutoExecutor

# Parameters of hydra.launcher that are not given to submitit's `update_parameters`.
NOT_OF_EXECUTOR = ("submitit_folder", "max_num_timeout", "runs_per_task", "side_by_side")
# Parameters of submitit's executors for every cluster. The names of all others begin with the cluster: slurm_partition.
SHARED = {
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
}


@dataclass(frozen=True)
class Task:
    """The settings of the tasks of a sweep.

    Args:
        cluster: slurm or local.
        parameters: the config hydra.launcher, {name: value}.
    """

    cluster: str
    parameters: dict[str, Any]

    @property
    def wants_gpu(self) -> bool:
        additional = self.parameters.get("additional_parameters") or {}
        gpus = (self.parameters.get("gpus_per_node"), self.parameters.get("gpus_per_task"), additional.get("gpus"))
        return any(gpus) or "gpu" in (self.parameters.get("gres") or "")

    def check(self) -> None:
        """UserError for parameters that would lose work, contradict one another or have no effect."""
        check(self.cluster, self.parameters)

    def executor(self, jobs: Path, start: Path, array: str = "", **changed: Any) -> AutoExecutor:
        """The submitit executor that submits tasks with these settings.

        Args:
            jobs: the folder for submitit's files and for logs.
            start: the bootstrap.py of the copy of the code: each job runs it first.
            array: the name of the array. It is written into the batch script, and names the job unless the user has
                chosen another name.
            changed: parameters to replace, under their names in hydra.launcher.
        """
        import submitit

        python = f"{shlex.quote(sys.executable)} {shlex.quote(str(start))}"
        constructor_arguments = {"python": python, "max_num_timeout": self.parameters["max_num_timeout"]}
        executor = submitit.AutoExecutor(jobs, self.cluster, **self._prefixed(constructor_arguments))
        parameters = {**self.parameters, **changed}
        parameters = {key: value for key, value in parameters.items() if key not in NOT_OF_EXECUTOR}
        if self.cluster == "slurm":
            setup = [f"{ARRAY_LINE}{array}", *(parameters.get("setup") or []), *setup_lines(self.parameters)]
            parameters["name"] = parameters.get("name") or array
            parameters["setup"] = setup
            parameters["additional_parameters"] = sbatch_options(parameters.get("additional_parameters") or {})
        executor.update_parameters(**self._prefixed(parameters))
        return executor

    def _prefixed(self, parameters: dict) -> dict:
        """The parameters under AutoExecutor's names. Those that are null are left out: submitit has defaults."""
        return {
            key if key in SHARED and not names_gpu_type(key, value) else f"{self.cluster}_{key}": value
            for key, value in parameters.items()
            if value is not None
        }


def names_gpu_type(key: str, value: object) -> bool:
    """Whether it is gpus_per_node with a type of GPU, `a100:1`: submitit's shared parameter takes only a number."""
    return key == "gpus_per_node" and isinstance(value, str)


def sbatch_options(parameters: dict) -> dict:
    """additional_parameters without those that are null and without flags that are false: they give no option."""
    return {key: value for key, value in parameters.items() if value is not None and value is not False}


def script(executor: AutoExecutor, tasks: int) -> str:
    """The batch script that submitit will give to sbatch for this many tasks.

    submitit has no public method that returns the script without submitting it, so a private one is called.
    """
    from submitit import SlurmExecutor

    slurm_executor = executor._executor
    assert isinstance(slurm_executor, SlurmExecutor)
    parameters = slurm_executor.parameters
    slurm_executor.parameters = {**parameters, **({"map_count": tasks} if tasks > 1 else {})}
    try:
        return slurm_executor._make_submission_file_text("true", "test")
    finally:
        slurm_executor.parameters = parameters
