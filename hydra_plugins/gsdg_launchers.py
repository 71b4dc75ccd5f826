"""hydra/launcher=slurm, slurm_cpu, local: hydra-submitit-launcher's launchers, but for how a sweep is submitted.

Theirs composes every config again inside its job and waits for all of them. Ours enumerates and freezes the runs first
(gsdg/sweep/submit.py), leaves out what is done, and returns as soon as SLURM has the rest. Hydra wants its plugins in
this package, and imports them at every start: the work is imported where it is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher, SlurmLauncher


@dataclass
class SlurmConf(SlurmQueueConf):
    """submitit's, and how runs are put into tasks."""

    _target_: str = "hydra_plugins.gsdg_launchers.SlurmSweep"
    runs_per_task: int | None = 1  # null: all in one task
    side_by_side: int = 1  # of a task's runs, how many at once


@dataclass
class LocalConf(LocalQueueConf):
    """submitit's, and how runs are put into tasks."""

    _target_: str = "hydra_plugins.gsdg_launchers.LocalSweep"
    max_num_timeout: int = 1000
    runs_per_task: int | None = None
    side_by_side: int = 1


class SlurmSweep(SlurmLauncher):
    """Submits and returns: the sweep does not need this process any more."""

    composes = True  # GridSweeper need not: every config is composed and checked before anything is submitted

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        _submit(self, job_overrides)
        return []


class LocalSweep(LocalLauncher):
    """Runs the sweep on this machine, and waits for it."""

    composes = True

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from gsdg.errors import UserError, plural
        from gsdg.sweep.callback import note_run
        from gsdg.sweep.states import statuses

        folder, runs_dir = Path(self.config.hydra.sweep.dir), Path(self.config.runs_dir)
        runs, jobs = _submit(self, job_overrides)
        for job in jobs:
            job.wait()
        for run in runs:  # for the table at the end
            note_run(folder, run.run_id)
        states = [status.get("state") for status in statuses(runs_dir, [run.run_id for run in runs]).values()]
        if left := len(states) - states.count("done"):
            raise UserError(
                f"{plural(left, 'run')} of {len(runs)} not done: python -m gsdg.sweep status --runs-dir {runs_dir}"
            )
        return []


def _submit(launcher: SlurmLauncher | LocalLauncher, job_overrides: Sequence[Sequence[str]]) -> tuple[list, list]:
    from gsdg.sweep.folder import SweepFolder
    from gsdg.sweep.freeze import frozen
    from gsdg.sweep.grid import Composer
    from gsdg.sweep.submit import Task, launch

    config = launcher.config
    composer = Composer(launcher.hydra_context.config_loader, config)
    runs = frozen(composer, job_overrides)
    first = composer.compose(job_overrides[0])
    jobs = launch(
        SweepFolder(Path(config.hydra.sweep.dir).absolute()),
        runs,
        Task(launcher._EXECUTOR, dict(launcher.params)),
        overrides=list(config.hydra.overrides.task),
        environment=dict(config.hydra.job.env_set),
        resubmit="all" if first.force else first.resubmit,
    )
    return runs, jobs


ConfigStore.instance().store(group="hydra/launcher", name="gsdg_slurm", node=SlurmConf(), provider="gsdg")
ConfigStore.instance().store(group="hydra/launcher", name="gsdg_local", node=LocalConf(), provider="gsdg")
