"""How a task is run: the launcher's parameters, checked for what would lose work, as submitit's executor."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from gsdg.errors import UserError

OURS = (
    "submitit_folder",
    "max_num_timeout",
    "runs_per_task",
    "side_by_side",
)  # submitit's executors have none of these
SHARED = {  # parameters of every submitit executor; the others carry the cluster's name
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
    """`cluster` is slurm or local; `parameters` are those of the launcher's config, by their names there."""

    cluster: str
    parameters: dict

    @property
    def wants_gpu(self) -> bool:
        given = self.parameters
        return bool(given.get("gpus_per_node") or given.get("gpus_per_task") or "gpu" in (given.get("gres") or ""))

    def check(self) -> None:
        """UserError for what would lose work later."""
        for name in ("tasks_per_node", "nodes"):
            if self.parameters[name] != 1:
                raise UserError(f"hydra.launcher.{name}={self.parameters[name]}: a run is one process. Valid: 1.")
        for name in ("runs_per_task", "side_by_side", "array_parallelism"):
            if (value := self.parameters.get(name)) is not None and value < 1:
                raise UserError(f"hydra.launcher.{name}={value}. Valid: 1 or more.")
        if self.cluster == "slurm":
            self._check_end()

    def _check_end(self) -> None:
        delay, minutes = self.parameters["signal_delay_s"], self.parameters["timeout_min"]
        most, timeouts = min(0.2 * 60 * minutes, 600), self.parameters["max_num_timeout"]
        if not 0 < delay < most:
            raise UserError(
                f"hydra.launcher.signal_delay_s={delay} with timeout_min={minutes}. Valid: below {most:.0f} s, the "
                "smaller of 20% of the time limit and 10 min:\nsubmitit takes an earlier signal for a preemption, and "
                "queues the task again and again. Raise hydra.launcher.timeout_min or lower signal_delay_s."
            )
        if timeouts < 1:
            raise UserError(
                f"hydra.launcher.max_num_timeout={timeouts}: a run that reaches the time limit would not be queued "
                "again.\nValid: 1 or more; the preset has 1000."
            )

    def executor(self, jobs: Path, start: Path, **changed: object) -> object:
        """submitit's executor; a job's Python begins with the file `start`, which finds the snapshot of the code."""
        import submitit

        python = f"{shlex.quote(sys.executable)} {shlex.quote(str(start))}"
        first = {"python": python, "max_num_timeout": self.parameters["max_num_timeout"]}
        executor = submitit.AutoExecutor(jobs, self.cluster, **self._prefixed(first))
        given = {key: value for key, value in {**self.parameters, **changed}.items() if key not in OURS}
        executor.update_parameters(**self._prefixed(given))
        return executor

    def _prefixed(self, parameters: dict) -> dict:
        """As AutoExecutor wants them; what is null is submitit's own default."""
        return {
            key if key in SHARED else f"{self.cluster}_{key}": value
            for key, value in parameters.items()
            if value is not None
        }


def script(executor: object, tasks: int) -> str:
    """What submitit will give to sbatch. Its private method: there is no public way to see it before it is sent."""
    inner = executor._executor
    before = inner.parameters
    inner.parameters = {**before, **({"map_count": tasks} if tasks > 1 else {})}
    try:
        return inner._make_submission_file_text("true", "test")
    finally:
        inner.parameters = before
