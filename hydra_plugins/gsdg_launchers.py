"""hydra/launcher=slurm, slurm_cpu, local: hydra-submitit-launcher's launchers with another way to submit a sweep.

Those compose every config again inside its job, and wait for all jobs. These enumerate and freeze the runs first
(gsdg/sweep/submit.py), leave out the runs that are done, and return as soon as SLURM has queued the rest.
Hydra looks for plugins in this package and imports them at every start, so slow imports are inside the functions.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher


@dataclass
class SlurmConf(SlurmQueueConf):
    """The settings of submitit's SLURM launcher, and how runs are packed into tasks."""

    _target_: str = "hydra_plugins.gsdg_launchers.SlurmSweep"
    # submitit_folder: null, because the jobs of every sweep lie in <runs_dir>/.sweeps/<sweep>/jobs
    submitit_folder: str | None = None  # ty: ignore[incompatible-attribute-override]  # the inherited one is never null
    # name: of the jobs; null: gsdg-<sweep>-<number of the array>
    name: str | None = None  # ty: ignore[incompatible-attribute-override]  # the inherited one is never null
    # gpus_per_node: a number, or a type and a number: a100:2
    gpus_per_node: int | str | None = None  # ty: ignore[incompatible-attribute-override]  # the inherited one: no type
    runs_per_task: int | None = 1  # null: all runs in one task
    side_by_side: int = 1  # how many runs of a task run at the same time


@dataclass
class LocalConf(LocalQueueConf):
    """The settings of submitit's local launcher, and how runs are packed into tasks."""

    _target_: str = "hydra_plugins.gsdg_launchers.LocalSweep"
    submitit_folder: str | None = None  # ty: ignore[incompatible-attribute-override]  # as in SlurmConf
    name: str | None = None  # ty: ignore[incompatible-attribute-override]  # as in SlurmConf
    max_num_timeout: int = 1000
    runs_per_task: int | None = None
    side_by_side: int = 1


class SlurmSweep(SlurmLauncher):
    """Submits the sweep to SLURM and returns; the sweep does not need this process any more."""

    composes = True  # tells GridSweeper not to check the configs: `launch` composes and checks them before it submits

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        _submit(self, job_overrides)
        return []


class LocalSweep(LocalLauncher):
    """Runs the sweep on this machine and waits for it."""

    composes = True

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from gsdg.config.places import absolute_path
        from gsdg.sweep.callback import note_run
        from gsdg.sweep.follow import follow
        from gsdg.sweep.run_states import read_statuses
        from gsdg.utils.errors import UserError, plural

        assert self.config is not None
        folder, runs_dir = (Path(absolute_path(path)) for path in (self.config.hydra.sweep.dir, self.config.runs_dir))
        runs, jobs = _submit(self, job_overrides)
        if jobs:
            print(f"running on this machine; complete output: {jobs[0].paths.stdout}", flush=True)
        follow(runs, runs_dir, lambda: all(job.done() for job in jobs), partial(print, flush=True))
        for run in runs:  # launch.py makes the table of these
            note_run(folder, run.run_id)
        states = [status.get("state") for status in read_statuses(runs_dir, [run.run_id for run in runs]).values()]
        if unfinished := len(states) - states.count("done"):
            command = ["python", "-m", "gsdg.sweep", "status", folder.name, "--runs-dir", str(runs_dir)]
            raise UserError(f"{plural(unfinished, 'run')} of {len(runs)} not done: {shlex.join(command)}")
        return []


def _submit(launcher: SlurmLauncher | LocalLauncher, job_overrides: Sequence[Sequence[str]]) -> tuple[list, list]:
    """Freeze all runs and submit those that are not done. Returns (the frozen runs, submitit's jobs)."""
    from gsdg.config.config_dirs import config_dir_of
    from gsdg.config.places import absolute_path
    from gsdg.sweep.compose import Composer, typed
    from gsdg.sweep.enumerate_runs import freeze_runs
    from gsdg.sweep.folder import SweepFolder
    from gsdg.sweep.submit import Task, launch

    config, context = launcher.config, launcher.hydra_context
    assert config is not None  # Hydra has called `setup`
    assert context is not None
    task = Task(launcher._EXECUTOR, dict(launcher.params))
    task.check()  # first: composing thousands of configs takes long
    composer = Composer(context.config_loader, config)
    runs = freeze_runs(composer, job_overrides)
    first = composer.compose(job_overrides[0])
    search_path = [text for text in typed(config.hydra.overrides.hydra) if text.startswith("hydra.searchpath=")]
    jobs = launch(
        SweepFolder(Path(absolute_path(config.hydra.sweep.dir))),
        runs,
        task,
        overrides=[*typed(config.hydra.overrides.task), *search_path],
        config_dir=config_dir_of(config),
        environment=dict(config.hydra.job.env_set),
        resubmit="all" if first.force else first.resubmit,
    )
    return runs, jobs


ConfigStore.instance().store(group="hydra/launcher", name="gsdg_slurm", node=SlurmConf(), provider="gsdg")
ConfigStore.instance().store(group="hydra/launcher", name="gsdg_local", node=LocalConf(), provider="gsdg")
